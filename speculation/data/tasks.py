"""The prediction tasks: what each predicts and what it may see. `Shape` is a task applied to one model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.errors import SpecmoeError, TraceError, UsageError, counted
from profiler.trace.schema import INFERRED_EXPERTS, Metadata, ModelMetadata
from speculation.data.routes import Routes

# Numbers in a table of a counting predictor: 1 GB in float32. Also bounds what an untrusted run can make a reader allocate.
MAX_TABLE = 250_000_000


class Task(StrEnum):
    """What a predictor predicts at token t and MoE layer l, for h = 1..H ahead.

    Every task also sees all routes of earlier tokens.

    - `NEXT_LAYER` sees the vocabulary id of token t and its routes at layers up to l, and predicts its experts at layer l + h.
    - `NEXT_TOKEN` sees the vocabulary id and all routes of token t, and predicts the experts of token t + h at layer l.
    - `WHOLE_PATH` sees the vocabulary id of token t and none of its routes, and predicts its experts at every layer l.
      Its horizon is 1.
    - `REUSE` sees the same as `WHOLE_PATH`, and predicts how soon after token t each expert is used again, at every layer: the
      discounted next use, from 0 (never) to 1 (by the next token). It serves to choose which experts a cache evicts.

    Example:
        >>> Task("next-layer")
        <Task.NEXT_LAYER: 'next-layer'>
    """

    NEXT_LAYER = "next-layer"
    NEXT_TOKEN = "next-token"
    WHOLE_PATH = "whole-path"
    REUSE = "reuse"

    @property
    def predicts_experts(self) -> bool:
        """Whether the prediction is which experts are chosen, which can be compared with those that were."""
        return self != Task.REUSE


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes that a predictor is built for: those of the model, and the task.

    Args:
        layers: L, the number of MoE layers, 1 to 10,000.
        experts: E, the number of experts per layer, 1 to 65,536.
        top_k: K, the number of experts selected per token and layer, 1 to 1,024 and at most E.
        horizon: H, how far ahead the predictor predicts: layers for `next-layer` (at most L - 1), tokens for `next-token`,
            1 for `whole-path` and `reuse`.
        task: What is predicted.

    Raises:
        SpecmoeError: A size is out of range, or the count tables would exceed 250 million numbers.

    Example:
        >>> shape = Shape(layers=4, experts=8, top_k=2, horizon=2)
        >>> shape.target_layers(hop=2).tolist()
        [2, 3, -1, -1]
    """

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
        if self.task == Task.NEXT_LAYER and self.layers == 1:
            raise SpecmoeError(
                "next-layer: there is one MoE layer, so none comes next; predict next-token or whole-path instead"
            )
        if self.task == Task.NEXT_LAYER and self.horizon >= self.layers:
            raise UsageError(f"horizon {self.horizon}: expected 1 to {self.layers - 1} for {counted(self.layers, 'MoE layer')}")
        if self.task in {Task.WHOLE_PATH, Task.REUSE} and self.horizon > 1:
            raise UsageError(f"horizon {self.horizon}: {self.task} has no horizon to choose, expected 1")
        if self.top_k > self.experts:
            raise SpecmoeError(f"top_k {self.top_k} exceeds experts {self.experts}")
        if self.horizon * self.layers * self.experts**2 > MAX_TABLE:
            raise SpecmoeError(
                f"horizon {self.horizon} with {self.layers} layers of {self.experts} experts: the count tables would exceed "
                f"{MAX_TABLE:,} numbers; choose a smaller horizon"
            )

    @classmethod
    def of(cls, model: ModelMetadata, horizon: int, task: Task = Task.NEXT_LAYER) -> Shape:
        """The shape of a traced model.

        Args:
            model: The model in a trace's metadata (`trace.metadata.model`).
            horizon: H, how far ahead to predict, in layers or tokens.
            task: What is predicted.

        Raises:
            SpecmoeError: The horizon does not suit the task and the model, or the shape exceeds a limit.
        """
        return cls(layers=len(model.moe_layers), experts=model.num_experts, top_k=model.top_k, horizon=horizon, task=task)

    def check(self, metadata: Metadata, path: object, expected_by: object) -> None:
        """Raise `TraceError` if the model of the trace at `path` has other sizes, naming what expects these sizes."""
        model = metadata.model
        sizes = [(len(model.moe_layers), model.top_k, model.num_experts), (self.layers, self.top_k, self.experts)]
        if sizes[0] == sizes[1]:
            return
        theirs, ours = (
            f"{counted(layers, 'MoE layer')} and top-{top_k} of {experts} experts" for layers, top_k, experts in sizes
        )
        inferred = model.num_experts != self.experts and INFERRED_EXPERTS in metadata.gaps
        hint = "; its number of experts was inferred: convert its source again with the model's number" if inferred else ""
        raise TraceError(f"{path}: its model has {theirs}, but that of {expected_by} has {ours}{hint}")

    def target_layers(self, hop: int) -> npt.NDArray[np.int64]:
        """For each MoE layer l, the index of the layer that a prediction `hop` ahead is about; -1 if it does not exist.

        Args:
            hop: How far ahead, 1 to H. For tasks other than `next-layer`, the predicted layer is l itself.

        Returns:
            int64 `[L]`.
        """
        layers = np.arange(self.layers)
        if self.task != Task.NEXT_LAYER:
            return layers
        return np.where(layers + hop < self.layers, layers + hop, -1)


@dataclass(frozen=True)
class Targets:
    """The true experts that some predictions are about.

    ids_TLK: `[T, L, K]`, the experts' ids.
    is_valid_TL: `[T, L]`, false where nothing is predicted: the target layer or token does not exist.
    tokens_T: `[T]`, the index in the routes of the token that these experts belong to; meaningless where nothing is predicted.
    """

    ids_TLK: npt.NDArray[Any]
    is_valid_TL: npt.NDArray[np.bool_]
    tokens_T: npt.NDArray[np.int64]


def targets(routes: Routes, shape: Shape, tokens_T: npt.NDArray[np.int64], hop: int) -> Targets:
    """The true experts for predictions made at the tokens `tokens_T` of `routes`, `hop` layers or tokens ahead."""
    layers_L = shape.target_layers(hop)
    target_T, exists_T = tokens_T, np.ones(len(tokens_T), dtype=np.bool_)
    if shape.task == Task.NEXT_TOKEN:
        exists_T = routes.followers_T[tokens_T] >= hop
        target_T = np.where(exists_T, tokens_T + hop, tokens_T)
    ids_TLK = routes.expert_ids_TLK[target_T][:, np.maximum(layers_L, 0)]
    return Targets(ids_TLK, exists_T[:, None] & (layers_L >= 0), target_T)
