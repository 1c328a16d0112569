"""Baseline: each layer's most frequently used experts, regardless of the token."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from speculation.data.routes import Routes, RouteSource
from speculation.data.tasks import Shape
from speculation.predictors.base import Arrays, Predictor, expected_array
from speculation.predictors.features import at_targets, expert_frequency
from speculation.predictors.options import Epochs, Progress, TrainingOptions


class Popularity(Predictor):
    """P(expert is among the K) = the share of training tokens that selected it, per layer `[L, E]`."""

    name: ClassVar[str] = "popularity"
    about: ClassVar[str] = "frequency of each expert per layer"
    source: ClassVar[str] = "baseline"
    sees: ClassVar[str] = "nothing"

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self._probability_LE = np.full((shape.layers, shape.experts), shape.top_k / shape.experts, dtype=np.float32)

    def fit(
        self,
        train: RouteSource,
        validation: RouteSource | None,
        options: TrainingOptions,
        on_progress: Progress,
        out: Path | None = None,
    ) -> Epochs:
        self._probability_LE = expert_frequency(train, self.shape)
        return []

    def probabilities(self, routes: Routes, tokens: slice) -> npt.NDArray[np.float32]:
        ahead_LHE = at_targets(self._probability_LE, self.shape)
        return np.broadcast_to(ahead_LHE, (len(range(*tokens.indices(len(routes)))), *ahead_LHE.shape))

    def arrays(self) -> Arrays:
        return {"probability_LE": self._probability_LE}

    @classmethod
    def restore(cls, shape: Shape, settings: dict[str, Any], arrays: Arrays) -> Self:
        predictor = cls(shape)
        predictor._probability_LE = expected_array(arrays, "probability_LE", (shape.layers, shape.experts))
        return predictor
