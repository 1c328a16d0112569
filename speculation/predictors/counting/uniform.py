"""Baseline: chance, as a random ranking."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from speculation.data.routes import Routes, RouteSource
from speculation.data.tasks import Shape
from speculation.predictors.base import Arrays, Predictor
from speculation.predictors.options import Epochs, Progress, TrainingOptions


class Uniform(Predictor):
    """K / E for every expert, plus relative noise of up to 0.00005, so that the ranking is random instead of by expert id."""

    name: ClassVar[str] = "uniform"
    about: ClassVar[str] = "a random ranking: chance, measured"
    source: ClassVar[str] = "baseline"
    sees: ClassVar[str] = "nothing"

    def fit(
        self,
        train: RouteSource,
        validation: RouteSource | None,
        options: TrainingOptions,
        on_progress: Progress,
        out: Path | None = None,
    ) -> Epochs:
        return []

    def probabilities(self, routes: Routes, tokens: slice) -> npt.NDArray[np.float32]:
        shape = self.shape
        count = len(range(*tokens.indices(len(routes))))
        random = np.random.default_rng([tokens.start or 0, count])
        noise = random.random((count, shape.layers, shape.horizon, shape.experts), dtype=np.float32)
        return np.asarray(shape.top_k / shape.experts * (1 + 1e-4 * (noise - 0.5)), dtype=np.float32)

    def arrays(self) -> Arrays:
        return {}

    @classmethod
    def restore(cls, shape: Shape, settings: dict[str, Any], arrays: Arrays) -> Self:
        return cls(shape)
