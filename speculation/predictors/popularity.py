"""Baseline: each layer's most used experts, whatever the token."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from analysis.load import count_experts
from speculation.options import Epochs, Progress, TrainingOptions
from speculation.predictors import Arrays, Predictor, expected_array
from speculation.routes import Routes, RouteSource, each_group
from speculation.tasks import Shape


class Popularity(Predictor):
    """P(expert among the K) = its frequency in the training problems, per layer `[L, E]`."""

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


def expert_frequency(source: RouteSource, shape: Shape) -> npt.NDArray[np.float32]:
    """Share of tokens that select each expert `[L, E]`; a row sums to K."""
    counts_LE = sum(count_experts(routes.expert_ids_TLK, shape.experts) for routes in each_group(source))
    return np.asarray(counts_LE / len(source), dtype=np.float32)


def at_targets(values_LX: npt.NDArray[Any], shape: Shape) -> npt.NDArray[Any]:
    """Values by layer `[L, ...]` where predictions are about that layer `[L, H, ...]`; zero where there is none."""
    ahead_LHX = np.zeros((shape.layers, shape.horizon, *values_LX.shape[1:]), dtype=values_LX.dtype)
    for hop in range(1, shape.horizon + 1):
        layers_L = shape.target_layers(hop)
        ahead_LHX[layers_L >= 0, hop - 1] = values_LX[layers_L[layers_L >= 0]]
    return ahead_LHX
