"""Baseline: the experts that this token of the vocabulary was routed to in the training problems."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from speculation.data.routes import Routes, RouteSource, each_group
from speculation.data.tasks import MAX_TABLE, Shape, Task, targets
from speculation.predictors.base import Arrays, Predictor, expected_array
from speculation.predictors.features import expert_frequency, frequent_tokens, stored_keys, token_rows
from speculation.predictors.options import Epochs, Progress, TrainingOptions

# The maximum number of distinct tokens with their own row; the most frequent ones have one.
MAX_VOCABULARY = 16_384
# The weight of popularity in each row, in tokens.
PRIOR_TOKENS = 1.0


class TokenIdentity(Predictor):
    """P(e at layer l | token), a table of counts `[V, S, L, E]`.

    For next-token, S = H: step s is about the token s + 1 after the given one. For other tasks, S = 1 and the table is about
    the token itself. Row 0 holds popularity, for tokens without their own row.
    """

    name: ClassVar[str] = "token-identity"
    about: ClassVar[str] = "the experts that the same token of the vocabulary selected in the training problems"
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
        self._keys = frequent_tokens(train, max_tokens=min(MAX_VOCABULARY, MAX_TABLE // row_numbers - 1), min_count=1)
        popularity_LE = expert_frequency(train, shape)
        # float32 counts tokens exactly up to 16 million per cell.
        table_VSLE = np.zeros((len(self._keys) + 1, self._steps, shape.layers, shape.experts), dtype=np.float32)
        tokens_VS = np.zeros(table_VSLE.shape[:2], dtype=np.int64)
        for routes in each_group(train):
            row_T = token_rows(self._keys, routes.token_keys_T)
            for step in range(self._steps):
                # Count the routes of the token itself or, for next-token, of the token step + 1 later.
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
        max_tokens = min(MAX_VOCABULARY, MAX_TABLE // (shape.layers * shape.experts * steps) - 1)
        predictor = cls(shape, stored_keys(arrays, max_tokens))
        table = predictor._probability_VSLE
        predictor._probability_VSLE = expected_array(arrays, "probability_VSLE", table.shape)
        return predictor
