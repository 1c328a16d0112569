"""Baseline: the experts of the last token whose routes are known are selected again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from speculation.data.routes import Routes, RouteSource, each_group
from speculation.data.tasks import Shape, targets
from speculation.predictors.base import Arrays, Predictor, expected_array
from speculation.predictors.features import at_targets, expert_frequency, last_known
from speculation.predictors.options import Epochs, Progress, TrainingOptions


class PreviousToken(Predictor):
    """P(e is selected), counted separately for an expert that had rank r in the last known route at that layer, and for each
    expert that was not in it.

    The last known route is the preceding token's; for next-token, the token's own. A token without a predecessor is predicted
    by popularity.
    """

    name: ClassVar[str] = "previous-token"
    about: ClassVar[str] = "the experts of the last known token at that layer, then the most popular ones"
    source: ClassVar[str] = "baseline; repetition as in Mixtral (arXiv:2401.04088, Table 5)"
    sees: ClassVar[str] = "routes of the last known token"

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self._popularity_LHE = np.zeros((shape.layers, shape.horizon, shape.experts), dtype=np.float32)
        self._others_LHE = np.zeros_like(self._popularity_LHE)
        self._again_LHK = np.zeros((shape.layers, shape.horizon, shape.top_k), dtype=np.float32)

    def fit(
        self,
        train: RouteSource,
        validation: RouteSource | None,
        options: TrainingOptions,
        on_progress: Progress,
        out: Path | None = None,
    ) -> Epochs:
        shape, experts = self.shape, self.shape.experts
        self._popularity_LHE = at_targets(expert_frequency(train, shape), shape)
        tokens_LH = np.zeros((shape.layers, shape.horizon), dtype=np.int64)
        again_LHK = np.zeros(self._again_LHK.shape, dtype=np.int64)
        new_LHE, before_LHE = (np.zeros(self._others_LHE.shape, dtype=np.int64) for _ in range(2))
        for routes in each_group(train):
            tokens_T = np.arange(len(routes))
            known_T = last_known(routes, shape, tokens_T)
            for hop in range(1, shape.horizon + 1):
                true = targets(routes, shape, tokens_T, hop)
                for layer, target in enumerate(shape.target_layers(hop)):
                    if target < 0:
                        continue
                    chosen_T = np.flatnonzero(true.is_valid_TL[:, layer] & (known_T >= 0))
                    now_TK = true.ids_TLK[chosen_T, layer].astype(np.int64)
                    before_TK = routes.expert_ids_TLK[known_T[chosen_T], target].astype(np.int64)
                    is_again_TKK = before_TK[:, :, None] == now_TK[:, None, :]
                    tokens_LH[layer, hop - 1] += len(chosen_T)
                    again_LHK[layer, hop - 1] += is_again_TKK.any(2).sum(0)
                    new_LHE[layer, hop - 1] += np.bincount(now_TK[~is_again_TKK.any(1)], minlength=experts)
                    before_LHE[layer, hop - 1] += np.bincount(before_TK.reshape(-1), minlength=experts)
        is_about_LH1 = at_targets(np.ones((shape.layers, 1), dtype=np.float32), shape)
        absent_LHE = tokens_LH[:, :, None] - before_LHE
        self._again_LHK = (is_about_LH1 * (again_LHK + 0.5) / (tokens_LH[:, :, None] + 1)).astype(np.float32)
        self._others_LHE = (is_about_LH1 * (new_LHE + self._popularity_LHE) / (absent_LHE + 1)).astype(np.float32)
        return []

    def probabilities(self, routes: Routes, tokens: slice) -> npt.NDArray[np.float32]:
        shape = self.shape
        known_T = last_known(routes, shape, np.arange(*tokens.indices(len(routes))))
        result_TLHE = np.where((known_T >= 0)[:, None, None, None], self._others_LHE, self._popularity_LHE)
        for hop in range(1, shape.horizon + 1):
            layers = shape.target_layers(hop)
            sources = np.flatnonzero(layers >= 0)
            before_TLK = routes.expert_ids_TLK[known_T][:, layers[sources]].astype(np.int64)
            at_hop_TLE = result_TLHE[:, sources, hop - 1]
            again_TLK = np.broadcast_to(self._again_LHK[sources, hop - 1], before_TLK.shape)
            again_TLE = at_hop_TLE.copy()
            np.put_along_axis(again_TLE, before_TLK, again_TLK, axis=2)
            result_TLHE[:, sources, hop - 1] = np.where((known_T >= 0)[:, None, None], again_TLE, at_hop_TLE)
        return np.asarray(result_TLHE, dtype=np.float32)

    def arrays(self) -> Arrays:
        return {"popularity_LHE": self._popularity_LHE, "others_LHE": self._others_LHE, "again_LHK": self._again_LHK}

    @classmethod
    def restore(cls, shape: Shape, settings: dict[str, Any], arrays: Arrays) -> Self:
        predictor = cls(shape)
        predictor._popularity_LHE = expected_array(arrays, "popularity_LHE", predictor._popularity_LHE.shape)
        predictor._others_LHE = expected_array(arrays, "others_LHE", predictor._others_LHE.shape)
        predictor._again_LHK = expected_array(arrays, "again_LHK", predictor._again_LHK.shape)
        return predictor
