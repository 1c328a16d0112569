"""Baseline: an n-gram model over the last experts, backing off to shorter contexts where longer ones are rare."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from profiler.errors import SpecmoeError
from speculation.data.routes import Routes, RouteSource
from speculation.data.tasks import Shape, Task, targets
from speculation.predictors.base import Arrays, Predictor, expected_array, single_group
from speculation.predictors.features import at_targets, expert_frequency, last_known
from speculation.predictors.options import Epochs, Progress, TrainingOptions

# The maximum number of experts in a context.
MAX_ORDER = 3
# The weight of the shorter context's estimate in the longer one's, in tokens.
BACK_OFF = 5.0
# The maximum size of the table, over all layers, horizons and orders, in numbers.
MAX_NUMBERS = 20_000_000
# Stands for an expert or a context that is not known.
MISSING = -1


class BackoffCounts(Predictor):
    """An n-gram model: P(expert | context), where the context is up to three experts of the nearest known routes.

    The context of order 1 is the strongest expert of the nearest known route. Order 2 is its two strongest experts. Order 3
    adds the strongest expert of the second nearest route. If K is 1, order 2 holds the one expert twice.

    For next-layer, the nearest route is the token's own at layer l, and the second nearest its own at layer l-1. For the other
    tasks, they are the routes at layer l of the last known token and of the token before it.

    Counts of each order are smoothed with the estimate of the order below; order 0 is popularity. Only the most frequent
    contexts are kept.
    """

    name: ClassVar[str] = "backoff-counts"
    about: ClassVar[str] = "n-gram counts over the last experts, backing off to shorter contexts"
    source: ClassVar[str] = "baseline; n-gram models with back-off"
    sees: ClassVar[str] = "routes of layers l and l-1, or of the last two tokens"

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self._popularity_LHE = np.zeros((shape.layers, shape.horizon, shape.experts), dtype=np.float32)
        self._contexts_N = np.zeros(0, dtype=np.int64)
        self._rows_NE = np.zeros((0, shape.experts), dtype=np.float32)

    def fit(
        self,
        train: RouteSource,
        validation: RouteSource | None,
        options: TrainingOptions,
        on_progress: Progress,
        out: Path | None = None,
    ) -> Epochs:
        shape, experts = self.shape, self.shape.experts
        routes = single_group(self, train)
        self._popularity_LHE = at_targets(expert_frequency(routes, shape), shape)
        tokens_T = np.arange(len(routes))
        known_TLO = self._known(routes, tokens_T)
        most = MAX_NUMBERS // experts // (shape.layers * shape.horizon * MAX_ORDER)
        contexts, rows = [], []
        for hop in range(1, shape.horizon + 1):
            true = targets(routes, shape, tokens_T, hop)
            for layer, target in enumerate(shape.target_layers(hop)):
                below, below_N = self._popularity_LHE[layer, hop - 1][None], np.zeros(0, dtype=np.int64)
                for order in range(1, MAX_ORDER + 1) if target >= 0 else ():
                    codes_T = self._codes(known_TLO, layer, hop, order)
                    chosen_T = np.flatnonzero(true.is_valid_TL[:, layer] & (codes_T != MISSING))
                    if not len(chosen_T):
                        break
                    if order == MAX_ORDER:
                        # There may be very many of the longest contexts, and no longer one backs off to them: count only those
                        # that will be kept.
                        codes_N, uses_N = np.unique(codes_T[chosen_T], return_counts=True)
                        stays = np.isin(codes_T[chosen_T], codes_N[np.argsort(-uses_N, kind="stable")[:most]])
                        chosen_T = chosen_T[stays]
                    codes_N, place_T, uses_N = np.unique(codes_T[chosen_T], return_inverse=True, return_counts=True)
                    cells = place_T[:, None] * experts + true.ids_TLK[chosen_T, layer].astype(np.int64)
                    count_NE = np.bincount(cells.reshape(-1), minlength=len(codes_N) * experts).reshape(-1, experts)
                    # All tokens of a context share the shorter context, so the first one identifies it.
                    first_N = chosen_T[np.unique(place_T, return_index=True)[1]]
                    shorter_NE = np.broadcast_to(below[0], count_NE.shape)
                    if order > 1:
                        shorter_NE = _rows(below_N, below, self._codes(known_TLO, layer, hop, order - 1)[first_N])
                    row_NE = (count_NE + BACK_OFF * shorter_NE) / (uses_N + BACK_OFF)[:, None]
                    kept = np.sort(np.argsort(-uses_N, kind="stable")[:most])
                    contexts.append(codes_N[kept])
                    rows.append(row_NE[kept].astype(np.float32))
                    below, below_N = row_NE, codes_N
        if contexts:
            order_N = np.argsort(np.concatenate(contexts))
            self._contexts_N = np.concatenate(contexts)[order_N]
            # Rounded to half precision as in the file, so that the predictor behaves the same before and after storage.
            self._rows_NE = np.concatenate(rows)[order_N].astype(np.float16).astype(np.float32)
        return []

    def probabilities(self, routes: Routes, tokens: slice) -> npt.NDArray[np.float32]:
        tokens_T = np.arange(*tokens.indices(len(routes)))
        known_TLO = self._known(routes, tokens_T)
        result_TLHE = np.broadcast_to(self._popularity_LHE, (len(tokens_T), *self._popularity_LHE.shape)).copy()
        for hop in range(1, self.shape.horizon + 1):
            for layer in range(self.shape.layers):
                # Estimates of longer contexts, where they were kept, replace those of shorter ones.
                for order in range(1, MAX_ORDER + 1) if len(self._contexts_N) else ():
                    codes_T = self._codes(known_TLO, layer, hop, order)
                    place_T = np.minimum(np.searchsorted(self._contexts_N, codes_T), len(self._contexts_N) - 1)
                    found_T = self._contexts_N[place_T] == codes_T
                    result_TLHE[found_T, layer, hop - 1] = self._rows_NE[place_T[found_T]]
        return result_TLHE

    def _known(self, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The experts of each layer's context in order, `[T, L, 3]`; MISSING where none is known."""
        second = min(1, self.shape.top_k - 1)
        known_TLO = np.full((len(tokens_T), self.shape.layers, MAX_ORDER), MISSING, dtype=np.int64)
        if self.shape.task == Task.NEXT_LAYER:
            strongest_TLK = routes.expert_ids_TLK[tokens_T].astype(np.int64)
            known_TLO[:, :, :2] = strongest_TLK[:, :, [0, second]]
            known_TLO[:, 1:, 2] = strongest_TLK[:, :-1, 0]
            return known_TLO
        last_T = last_known(routes, self.shape, tokens_T)
        before_T = np.where(last_T >= 0, routes.previous_T[last_T], -1)
        known_TLO[last_T >= 0, :, :2] = routes.expert_ids_TLK[last_T[last_T >= 0]][:, :, [0, second]].astype(np.int64)
        known_TLO[before_T >= 0, :, 2] = routes.expert_ids_TLK[before_T[before_T >= 0], :, 0]
        return known_TLO

    def _codes(self, known_TLO: npt.NDArray[np.int64], layer: int, hop: int, order: int) -> npt.NDArray[np.int64]:
        """A number that identifies each token's context at this layer, horizon and order, `[T]`; MISSING if it is not known."""
        code_T = np.full(len(known_TLO), (layer * self.shape.horizon + hop - 1) * MAX_ORDER + order - 1, dtype=np.int64)
        is_there_T = np.ones(len(known_TLO), dtype=np.bool_)
        for place in range(MAX_ORDER):
            expert_T = known_TLO[:, layer, place] if place < order else np.zeros(len(known_TLO), dtype=np.int64)
            is_there_T &= expert_T != MISSING
            code_T = code_T * self.shape.experts + expert_T
        return np.where(is_there_T, code_T, MISSING)

    @classmethod
    def parameters_for(cls, shape: Shape) -> int | None:
        return None

    def arrays(self) -> Arrays:
        return {
            "popularity_LHE": self._popularity_LHE,
            "contexts": self._contexts_N,
            "rows_NE": self._rows_NE.astype(np.float16),
        }

    @classmethod
    def restore(cls, shape: Shape, settings: dict[str, Any], arrays: Arrays) -> Self:
        predictor = cls(shape)
        predictor._popularity_LHE = expected_array(arrays, "popularity_LHE", predictor._popularity_LHE.shape)
        contexts = arrays.get("contexts")
        if contexts is None or contexts.ndim != 1 or contexts.dtype != np.int64 or (np.diff(contexts) <= 0).any():
            raise SpecmoeError("stored predictor: expected 'contexts' to be integers in ascending order")
        predictor._contexts_N = contexts
        predictor._rows_NE = expected_array(arrays, "rows_NE", (len(contexts), shape.experts))
        return predictor


def _rows(codes_N: npt.NDArray[np.int64], rows_NE: npt.NDArray[Any], wanted: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """The row of each context in `wanted`; `codes_N` contains all of them."""
    return np.asarray(rows_NE[np.searchsorted(codes_N, wanted)])
