"""What is predicted from what: the three tasks, and a task for one model (`Shape`)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.errors import SpecmoeError
from profiler.trace.schema import ModelMetadata
from speculation.data.routes import Routes

# Numbers in the tables of the counting predictors: 1 GB. Also bounds what a stranger's run can make a reader allocate.
MAX_TABLE = 250_000_000


class Task(StrEnum):
    """A prediction for token t and layer l, h = 1..H ahead; every task also knows all routes of earlier tokens."""

    # Known: t's routes at layers <= l, t's identity. Predicted: t's experts at layer l + h.
    NEXT_LAYER = "next-layer"
    # Known: everything of t. Predicted: the experts of token t + h at layer l.
    NEXT_TOKEN = "next-token"
    # Known: t's identity, nothing of t's routes. Predicted: t's experts at layer l; h is 1.
    WHOLE_PATH = "whole-path"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a predictor must know: the model's L MoE layers, E experts, K per token; the task, and how far ahead (H)."""

    layers: int
    experts: int
    top_k: int
    horizon: int
    task: Task = Task.NEXT_LAYER

    def __post_init__(self) -> None:
        limits = {"layers": 10_000, "experts": 65_536, "top_k": 1024, "horizon": 10_000}
        for name, limit in limits.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= limit:
                raise SpecmoeError(f"{name} {value!r}, expected 1 to {limit}")
        if self.task == Task.NEXT_LAYER and self.horizon >= self.layers:
            raise SpecmoeError(f"horizon {self.horizon}: expected 1 to {self.layers - 1} for {self.layers} MoE layers")
        if self.task == Task.WHOLE_PATH and self.horizon > 1:
            raise SpecmoeError(f"horizon {self.horizon}: whole-path predicts the token itself, expected 1")
        if self.top_k > self.experts:
            raise SpecmoeError(f"top_k {self.top_k} exceeds experts {self.experts}")
        if self.horizon * self.layers * self.experts**2 > MAX_TABLE:
            raise SpecmoeError(
                f"{self.horizon} horizons over {self.layers} layers of {self.experts} experts: the count tables would exceed "
                f"{MAX_TABLE:,} numbers; choose a smaller horizon"
            )

    @classmethod
    def of(cls, model: ModelMetadata, horizon: int, task: Task = Task.NEXT_LAYER) -> Shape:
        """The shape of a traced model. Raises `SpecmoeError` if it has no layer `horizon` ahead."""
        return cls(layers=len(model.moe_layers), experts=model.num_experts, top_k=model.top_k, horizon=horizon, task=task)

    def target_layers(self, hop: int) -> npt.NDArray[np.int64]:
        """For each layer l `[L]`, the layer that is predicted from it `hop` ahead; -1 where there is none."""
        layers = np.arange(self.layers)
        if self.task != Task.NEXT_LAYER:
            return layers
        return np.where(layers + hop < self.layers, layers + hop, -1)


@dataclass(frozen=True)
class Targets:
    """The true experts of some predictions: ids_TLK `[T, L, K]`; is_valid_TL `[T, L]`, false where nothing is predicted.

    tokens_T `[T]`: index in the routes of the token whose experts these are; meaningless where nothing is predicted.
    """

    ids_TLK: npt.NDArray[Any]
    is_valid_TL: npt.NDArray[np.bool_]
    tokens_T: npt.NDArray[np.int64]


def targets(routes: Routes, shape: Shape, tokens_T: npt.NDArray[np.int64], hop: int) -> Targets:
    """What predictions `hop` ahead, made at these tokens of `routes`, are about."""
    layers_L = shape.target_layers(hop)
    target_T, exists_T = tokens_T, np.ones(len(tokens_T), dtype=np.bool_)
    if shape.task == Task.NEXT_TOKEN:
        exists_T = routes.followers_T[tokens_T] >= hop
        target_T = np.where(exists_T, tokens_T + hop, tokens_T)
    ids_TLK = routes.expert_ids_TLK[target_T][:, np.maximum(layers_L, 0)]
    return Targets(ids_TLK, exists_T[:, None] & (layers_L >= 0), target_T)
