"""Baseline: each layer's most used experts, whatever the token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from analysis.load import count_experts
from speculation.predictors import Arrays, Shape, TrainingOptions, expected_array
from speculation.routes import Routes


class Popularity:
    """P(expert among the K) = its frequency in the training problems, per layer `[L, E]`."""

    name: ClassVar[str] = "popularity"
    about: ClassVar[str] = "frequency of each expert per layer"

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._probability_LE = np.full((shape.layers, shape.experts), shape.top_k / shape.experts, dtype=np.float32)

    def fit(
        self,
        train: Routes,
        validation: Routes | None,
        options: TrainingOptions,
        on_progress: Callable[[int, int, dict[str, float]], None],
    ) -> list[dict[str, float]]:
        counts_LE = count_experts(train.expert_ids_TLK, self.shape.experts)
        self._probability_LE = (counts_LE / len(train)).astype(np.float32)
        return []

    def probabilities(self, routes: Routes, tokens: slice) -> npt.NDArray[np.float32]:
        layers, experts, horizon = self.shape.layers, self.shape.experts, self.shape.horizon
        ahead_LHE = np.zeros((layers, horizon, experts), dtype=np.float32)
        for hop in range(1, horizon + 1):
            ahead_LHE[: layers - hop, hop - 1] = self._probability_LE[hop:]
        count = len(range(*tokens.indices(len(routes))))
        return np.broadcast_to(ahead_LHE, (count, *ahead_LHE.shape))

    def arrays(self) -> Arrays:
        return {"probability_LE": self._probability_LE}

    def settings(self) -> dict[str, Any]:
        return {}

    @classmethod
    def restore(cls, shape: Shape, settings: dict[str, Any], arrays: Arrays) -> Self:
        predictor = cls(shape)
        predictor._probability_LE = expected_array(arrays, "probability_LE", (shape.layers, shape.experts))
        return predictor
