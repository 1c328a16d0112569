"""Baseline: counts of which experts follow the last known experts of the layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from speculation.data.routes import Routes, RouteSource, each_group
from speculation.data.tasks import Shape, Task, targets
from speculation.predictors.base import Arrays, Predictor, expected_array
from speculation.predictors.features import expert_frequency, log_odds
from speculation.predictors.options import Epochs, Progress, TrainingOptions

# The weight of popularity in each row, in tokens: smooths the rows of experts that are rarely seen.
PRIOR_TOKENS = 10.0


class ConditionalCounts(Predictor):
    """Naive Bayes over the K experts of the last known route of layer l, with a table of counts for each (l, h).

    The last known route is the token's own at layer l; for whole-path, the preceding token's. log-odds(j) = log-odds(popularity
    of j) + sum over the known experts i of the change in log-odds of j that i brings. Rows of rare experts are smoothed toward
    popularity. It sees no other layers, and not which token it is. The K experts are not independent, so its probabilities are
    too extreme; use its ranking.
    """

    name: ClassVar[str] = "conditional-counts"
    about: ClassVar[str] = "naive Bayes over the last known experts of layer l, from counts of P(expert | expert)"
    source: ClassVar[str] = "baseline; the conditional probabilities of MoE-Infinity and of many papers"
    sees: ClassVar[str] = "routes of layer l"

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self._popularity_LHE = np.zeros((shape.layers, shape.horizon, shape.experts), dtype=np.float32)
        self._change_HLEE = np.zeros((shape.horizon, shape.layers, shape.experts, shape.experts), dtype=np.float32)

    def fit(
        self,
        train: RouteSource,
        validation: RouteSource | None,
        options: TrainingOptions,
        on_progress: Progress,
        out: Path | None = None,
    ) -> Epochs:
        shape, experts = self.shape, self.shape.experts
        count_HLEE = np.zeros(self._change_HLEE.shape, dtype=np.int64)
        given_HLE = np.zeros(count_HLEE.shape[:3], dtype=np.int64)
        for routes in each_group(train):
            tokens_T = np.arange(len(routes))
            known_T = self._known(routes, tokens_T)
            for hop in range(1, shape.horizon + 1):
                true = targets(routes, shape, tokens_T, hop)
                for layer in np.flatnonzero(shape.target_layers(hop) >= 0):
                    chosen_T = np.flatnonzero(true.is_valid_TL[:, layer] & (known_T >= 0))
                    given_TK = routes.expert_ids_TLK[known_T[chosen_T], layer].astype(np.int64)
                    pair_TKK = given_TK[:, :, None] * experts + true.ids_TLK[chosen_T, layer].astype(np.int64)[:, None, :]
                    count_E2 = np.bincount(pair_TKK.reshape(-1), minlength=experts**2)
                    count_HLEE[hop - 1, layer] += count_E2.reshape(experts, experts)
                    given_HLE[hop - 1, layer] += np.bincount(given_TK.reshape(-1), minlength=experts)
        frequency_LE = expert_frequency(train, shape)
        for hop in range(1, shape.horizon + 1):
            for layer, target in enumerate(shape.target_layers(hop)):
                if target < 0:
                    continue
                smoothed_EE = count_HLEE[hop - 1, layer] + PRIOR_TOKENS * frequency_LE[target]
                chance_EE = smoothed_EE / (given_HLE[hop - 1, layer] + PRIOR_TOKENS)[:, None]
                self._popularity_LHE[layer, hop - 1] = log_odds(frequency_LE[target])
                self._change_HLEE[hop - 1, layer] = log_odds(chance_EE) - self._popularity_LHE[layer, hop - 1]
        return []

    def probabilities(self, routes: Routes, tokens: slice) -> npt.NDArray[np.float32]:
        known_T = self._known(routes, np.arange(*tokens.indices(len(routes))))
        ids_TLK = routes.expert_ids_TLK[known_T].astype(np.int64)
        layers = np.arange(self.shape.layers)[:, None]
        change_TLHE = np.stack([change_LEE[layers, ids_TLK].sum(2) for change_LEE in self._change_HLEE], axis=2)
        log_odds_TLHE = self._popularity_LHE + change_TLHE * (known_T >= 0)[:, None, None, None]
        return np.asarray(1 / (1 + np.exp(-log_odds_TLHE)), dtype=np.float32)

    def _known(self, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return routes.previous_T[tokens_T] if self.shape.task == Task.WHOLE_PATH else tokens_T

    def arrays(self) -> Arrays:
        return {"popularity_LHE": self._popularity_LHE, "change_HLEE": self._change_HLEE}

    @classmethod
    def restore(cls, shape: Shape, settings: dict[str, Any], arrays: Arrays) -> Self:
        predictor = cls(shape)
        predictor._popularity_LHE = expected_array(arrays, "popularity_LHE", predictor._popularity_LHE.shape)
        predictor._change_HLEE = expected_array(arrays, "change_HLEE", predictor._change_HLEE.shape)
        return predictor
