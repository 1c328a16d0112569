"""Baseline: which experts this token of the vocabulary went to before."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from profiler.errors import SpecmoeError
from speculation.options import Epochs, Progress, TrainingOptions
from speculation.predictors import Arrays, Predictor, expected_array
from speculation.predictors.popularity import expert_frequency
from speculation.repeats import UNKNOWN_TOKEN
from speculation.routes import Routes, RouteSource, each_group
from speculation.tasks import MAX_TABLE, Shape, Task, targets

# Kinds of tokens with a row of their own, the most frequent ones.
MAX_KINDS = 16_384
# Tokens' worth of popularity mixed into each row.
PRIOR_TOKENS = 1.0


class TokenIdentity(Predictor):
    """P(e at layer l | token), counted `[V, S, L, E]`; S = H for next-token, where the token is the one H before, else 1.

    Row 0 is popularity: of tokens without a row.
    """

    name: ClassVar[str] = "token-identity"
    about: ClassVar[str] = "where the same token of the vocabulary went in the training problems"
    source: ClassVar[str] = "baseline; tokens as in OLMoE (arXiv:2409.02060)"
    sees: ClassVar[str] = "which token it is"

    def __init__(self, shape: Shape, keys: npt.NDArray[np.int64] | None = None) -> None:
        super().__init__(shape)
        self._keys = np.zeros(0, dtype=np.int64) if keys is None else keys
        self._steps = shape.horizon if shape.task == Task.NEXT_TOKEN else 1
        self._probability_VSLE = np.zeros((len(self._keys) + 1, self._steps, shape.layers, shape.experts), dtype=np.float32)

    def fit(
        self,
        train: RouteSource,
        validation: RouteSource | None,
        options: TrainingOptions,
        on_progress: Progress,
        out: Path | None = None,
    ) -> Epochs:
        shape = self.shape
        row_numbers = shape.layers * shape.experts * self._steps
        self._keys = frequent_tokens(train, most=min(MAX_KINDS, MAX_TABLE // row_numbers - 1), at_least=1)
        popularity_LE = expert_frequency(train, shape)
        # Of tokens: float32 counts exactly up to 16 million per cell.
        table_VSLE = np.zeros((len(self._keys) + 1, self._steps, shape.layers, shape.experts), dtype=np.float32)
        tokens_VS = np.zeros(table_VSLE.shape[:2], dtype=np.int64)
        for routes in each_group(train):
            row_T = token_rows(self._keys, routes.token_keys_T)
            for step in range(self._steps):
                # The token itself, at every layer; or the one that is step + 1 later.
                ids_TLK, row_N = routes.expert_ids_TLK, row_T
                if shape.task == Task.NEXT_TOKEN:
                    true = targets(routes, shape, np.arange(len(routes)), step + 1)
                    ids_TLK, row_N = true.ids_TLK[true.is_valid_TL[:, 0]], row_T[true.is_valid_TL[:, 0]]
                tokens_VS[:, step] += np.bincount(row_N, minlength=len(table_VSLE))
                for layer in range(shape.layers):
                    cells = row_N[:, None] * shape.experts + ids_TLK[:, layer].astype(np.int64)
                    count = np.bincount(cells.reshape(-1), minlength=len(table_VSLE) * shape.experts)
                    table_VSLE[:, step, layer] += count.reshape(-1, shape.experts)
        for row in range(len(table_VSLE)):
            prior_SLE = PRIOR_TOKENS * popularity_LE[None]
            table_VSLE[row] = (table_VSLE[row] + prior_SLE) / (tokens_VS[row] + PRIOR_TOKENS)[:, None, None]
        table_VSLE[0] = popularity_LE
        self._probability_VSLE = table_VSLE
        return []

    def probabilities(self, routes: Routes, tokens: slice) -> npt.NDArray[np.float32]:
        shape = self.shape
        row_T = token_rows(self._keys, routes.token_keys_T[tokens])
        if shape.task == Task.NEXT_TOKEN:
            return np.ascontiguousarray(self._probability_VSLE[row_T].transpose(0, 2, 1, 3))
        result_TLHE = np.zeros((len(row_T), shape.layers, shape.horizon, shape.experts), dtype=np.float32)
        for hop in range(1, shape.horizon + 1):
            layers_L = shape.target_layers(hop)
            result_TLHE[:, layers_L >= 0, hop - 1] = self._probability_VSLE[row_T, 0][:, layers_L[layers_L >= 0]]
        return result_TLHE

    @classmethod
    def parameters_for(cls, shape: Shape) -> int | None:
        return None

    def arrays(self) -> Arrays:
        return {"keys": self._keys, "probability_VSLE": self._probability_VSLE}

    @classmethod
    def restore(cls, shape: Shape, settings: dict[str, Any], arrays: Arrays) -> Self:
        steps = shape.horizon if shape.task == Task.NEXT_TOKEN else 1
        most = min(MAX_KINDS, MAX_TABLE // (shape.layers * shape.experts * steps) - 1)
        predictor = cls(shape, stored_keys(arrays, most))
        table = predictor._probability_VSLE
        predictor._probability_VSLE = expected_array(arrays, "probability_VSLE", table.shape)
        return predictor


def frequent_tokens(source: RouteSource, most: int, at_least: int) -> npt.NDArray[np.int64]:
    """Keys of the most frequent tokens, ascending; of those that occur at least so often."""
    found = [np.unique(routes.token_keys_T, return_counts=True) for routes in each_group(source)]
    keys, place_N = np.unique(np.concatenate([keys for keys, _ in found]), return_inverse=True)
    counts = np.bincount(place_N, np.concatenate([counts for _, counts in found]), len(keys)).astype(np.int64)
    keys, counts = keys[keys != UNKNOWN_TOKEN], counts[keys != UNKNOWN_TOKEN]
    keys, counts = keys[counts >= at_least], counts[counts >= at_least]
    return np.sort(keys[np.argsort(-counts, kind="stable")[: max(0, most)]])


def token_rows(keys: npt.NDArray[np.int64], token_keys_T: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """1 + the place of each token in `keys`, which are ascending; 0 if it is not among them."""
    if not len(keys):
        return np.zeros(len(token_keys_T), dtype=np.int64)
    found_T = np.minimum(np.searchsorted(keys, token_keys_T), len(keys) - 1)
    return np.where(keys[found_T] == token_keys_T, found_T + 1, 0)


def stored_keys(arrays: Arrays, most: int) -> npt.NDArray[np.int64]:
    """The keys of a stored predictor. Raises `SpecmoeError` if they are none, or more than `most`."""
    keys = arrays.get("keys")
    if keys is None or keys.ndim != 1 or keys.dtype != np.int64 or len(keys) > most or (np.diff(keys) <= 0).any():
        raise SpecmoeError(f"stored predictor: expected 'keys' of at most {most} tokens, ascending")
    return keys
