"""Baseline: which experts followed the experts of the current layer, by counting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from analysis.load import count_experts
from speculation.predictors import Arrays, Shape, TrainingOptions, expected_array
from speculation.routes import Routes

# Tokens' worth of popularity mixed into each row, for experts that are rarely seen.
PRIOR_TOKENS = 10.0
# Keeps the odds of experts that never or always follow finite.
SMALLEST_PROBABILITY = 1e-4


class ConditionalCounts:
    """Naive Bayes over the K experts of layer l, with a table of counts for each (l, h).

    log-odds(j at l+h) = log-odds(popularity of j) + sum over the token's experts i at l of the change that knowing i makes.
    Rows of rare experts are smoothed towards popularity. Knows the current layer only: no earlier layers, no tokens.
    The K experts are not independent, so its probabilities are too extreme; the ranking is what it is for.
    """

    name: ClassVar[str] = "conditional-counts"
    about: ClassVar[str] = "naive Bayes over the experts of layer l, from counts of P(expert at l+h | expert at l)"

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._popularity_LHE = np.zeros((shape.layers, shape.horizon, shape.experts), dtype=np.float32)
        self._change_HLEE = np.zeros((shape.horizon, shape.layers, shape.experts, shape.experts), dtype=np.float32)

    def fit(
        self,
        train: Routes,
        validation: Routes | None,
        options: TrainingOptions,
        on_progress: Callable[[int, int, dict[str, float]], None],
    ) -> list[dict[str, float]]:
        layers, experts = self.shape.layers, self.shape.experts
        count_LE = count_experts(train.expert_ids_TLK, experts)
        popularity_LE = count_LE / len(train)
        ids_TLK = train.expert_ids_TLK.astype(np.int64)
        for hop in range(1, self.shape.horizon + 1):
            for layer in range(layers - hop):
                pair_TKK = ids_TLK[:, layer, :, None] * experts + ids_TLK[:, layer + hop, None, :]
                count_EE = np.bincount(pair_TKK.reshape(-1), minlength=experts**2).reshape(experts, experts)
                smoothed_EE = count_EE + PRIOR_TOKENS * popularity_LE[layer + hop]
                given_EE = smoothed_EE / (count_LE[layer] + PRIOR_TOKENS)[:, None]
                popularity_E = _log_odds(popularity_LE[layer + hop])
                self._popularity_LHE[layer, hop - 1] = popularity_E
                self._change_HLEE[hop - 1, layer] = _log_odds(given_EE) - popularity_E
        return []

    def probabilities(self, routes: Routes, tokens: slice) -> npt.NDArray[np.float32]:
        ids_TLK = routes.expert_ids_TLK[tokens].astype(np.int64)
        layers = np.arange(self.shape.layers)[:, None]
        change_THLE = [change_LEE[layers, ids_TLK].sum(2) for change_LEE in self._change_HLEE]
        log_odds_TLHE = self._popularity_LHE + np.stack(change_THLE, axis=2)
        return np.asarray(1 / (1 + np.exp(-log_odds_TLHE)), dtype=np.float32)

    def arrays(self) -> Arrays:
        return {"popularity_LHE": self._popularity_LHE, "change_HLEE": self._change_HLEE}

    def settings(self) -> dict[str, Any]:
        return {}

    @classmethod
    def restore(cls, shape: Shape, settings: dict[str, Any], arrays: Arrays) -> Self:
        predictor = cls(shape)
        predictor._popularity_LHE = expected_array(arrays, "popularity_LHE", predictor._popularity_LHE.shape)
        predictor._change_HLEE = expected_array(arrays, "change_HLEE", predictor._change_HLEE.shape)
        return predictor


def _log_odds(probability: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
    clipped = np.clip(probability, SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    return np.asarray(np.log(clipped / (1 - clipped)))
