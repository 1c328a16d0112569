"""What a user chooses for a run: the cache's size, the policy, what is prefetched, the device and the type of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from profiler.errors import EngineError, SpecmoeError, UsageError, counted
from speculation.data.tasks import Shape, Task
from speculation.offload.state import Rule
from speculation.runtime.model_loading import DTYPES
from speculation.runtime.slots import bytes_besides_slots
from speculation.runtime.storage.checkpoint import ExpertsModule
from speculation.runtime.storage.integer_groups import GROUPS, IntegerGroups
from speculation.runtime.storage.layout import ExpertLayout
from speculation.runtime.storage.mxfp4 import MXFP4
from speculation.training.runs import Run, load_run

NEXT_GATE, NONE = "next-gate", "none"
COPY, HOST = "copy", "host"


class Store(StrEnum):
    """Where experts are kept that are not in the cache."""

    ram = "ram"
    disk = "disk"


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """How many experts are on the device: a share of all, or a size in GB. Exactly one of them is set.

    Attributes:
        fraction: The share, 0 to 1; rounded down to whole experts per layer. With 0, every expert is loaded for each use.
        gigabytes: The size of the memory: slots, buffers, and all that it takes to unpack a packed expert.
    """

    fraction: float | None = None
    gigabytes: float | None = None

    def capacity(self, layouts: Sequence[ExpertLayout], num_experts: int, top_k: int) -> int:
        """Slots per layer.

        Raises:
            SpecmoeError: There is not room for the K experts of one token.
        """
        per_layer = sum(layout.bytes for layout in layouts)
        if (self.fraction is None) == (self.gigabytes is None):
            raise UsageError("the size of the cache: expected either a share or a size in GB")
        if self.fraction is not None:
            if not 0 <= self.fraction <= 1:
                raise UsageError(f"cache fraction {self.fraction}: expected 0 to 1")
            found = int(self.fraction * num_experts + 1e-9)
            if not self.fraction:
                return 0
        else:
            size = (self.gigabytes or 0.0) * 1e9
            if not 0 <= size < inf:
                raise UsageError(f"cache of {self.gigabytes} GB: expected 0 or more")
            found = min(num_experts, int((size - bytes_besides_slots(layouts)) / per_layer))
        if found < top_k:
            raise SpecmoeError(
                f"a cache of {max(0, found)} of {num_experts} experts per layer cannot hold the {top_k} of one token: choose "
                f"at least a share of {top_k / num_experts:.3g}, or {self._least(layouts, top_k):.3g} GB"
            )
        return found

    def _least(self, layouts: Sequence[ExpertLayout], top_k: int) -> float:
        return (top_k * sum(layout.bytes for layout in layouts) + bytes_besides_slots(layouts)) / 1e9


def choose_device(name: str | None) -> torch.device:
    """The device of a name, or the best there is. Raises `SpecmoeError` if it is unknown, or is a GPU that is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UsageError(f"device {name!r}: expected cuda, cuda:N or cpu") from error
    if device.type not in {"cuda", "cpu"}:
        raise UsageError(f"device {name!r}: expected cuda, cuda:N or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EngineError(f"PyTorch finds no GPU {device} on this machine: choose the device cpu")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def weights_dtype(name: str, config: Any) -> torch.dtype:
    """The type of a name, or the one that the checkpoint is stored in. Raises `SpecmoeError` if it is unknown."""
    if name != "auto":
        if name not in DTYPES:
            raise UsageError(f"dtype {name!r}: expected auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
    found = DTYPES.get(stored) if isinstance(stored, str) else next((kind for kind in DTYPES.values() if kind == stored), None)
    return found or torch.float32


def check_bits(bits: int | None) -> None:
    """Raise `SpecmoeError` if experts cannot be packed to so many bits."""
    if bits is not None and bits not in GROUPS:
        raise UsageError(f"experts in {bits} bits: expected {' or '.join(map(str, GROUPS))}")


def choose_packings(bits: int | None, modules: Sequence[ExpertsModule]) -> list[IntegerGroups] | None:
    """How each layer's experts are packed when they are read; None if they stay as they are.

    Raises:
        SpecmoeError: The checkpoint has them in a packed form already.
    """
    if bits is None:
        return None
    if any(module.layout.packing is not None for module in modules):
        raise SpecmoeError(
            f"experts in {bits} bits: the experts of this checkpoint are packed already ({MXFP4}, about 4 bits), and rounding "
            "them again only adds errors; leave this option out"
        )
    return [IntegerGroups(bits, module.layout, module.is_transposed) for module in modules]


def choose_policy(policy: str, shape: Shape) -> tuple[Rule, Run | None]:
    """The rule of a policy by name, or a run of the task reuse."""
    labels = {rule.label: rule for rule in Rule if rule not in (Rule.BELADY, Rule.LEARNED)}
    if policy in labels:
        return labels[policy], None
    if policy == Rule.BELADY.label:
        raise UsageError("belady needs to know the future: it can be simulated, but not run")
    if not Path(policy).is_dir():
        raise UsageError(
            f"unknown policy {policy!r}: expected one of {', '.join(labels)}, or the directory of a run of "
            f"'specmoe train --task {Task.REUSE}'"
        )
    run = load_run_for(policy, shape)
    if run.predictor.shape.task != Task.REUSE:
        raise SpecmoeError(
            f"{policy} was trained for {run.predictor.shape.task}: a policy needs a run of 'specmoe train --task {Task.REUSE}'"
        )
    return Rule.LEARNED, run


def load_run_for(path: str, shape: Shape) -> Run:
    """A run for a model of this shape. Raises `SpecmoeError` if it is for another one, or cannot be used while a model runs."""
    if not Path(path).is_dir():
        raise UsageError(f"unknown predictor {path!r}: expected {NEXT_GATE}, {NONE}, or the directory of 'specmoe train'")
    run = load_run(Path(path))
    own = run.predictor.shape
    if (own.layers, own.experts, own.top_k) != (shape.layers, shape.experts, shape.top_k):
        raise SpecmoeError(
            f"{path} is for {counted(own.layers, 'MoE layer')} and top-{own.top_k} of {own.experts} experts, but this model "
            "has "
            f"{shape.layers} and top-{shape.top_k} of {shape.experts}"
        )
    if run.predictor.takes_router_inputs:
        raise SpecmoeError(f"{path} needs router inputs, which the runtime does not give to predictors: choose {NEXT_GATE}")
    return run


def popularity_ranks(run: Run | None, shape: Shape) -> npt.NDArray[np.int64]:
    """Ranks of all experts `[L * E]`: by the problems that a run was trained on; without a run, the lowest number first."""
    count = shape.layers * shape.experts
    popularity = np.zeros(count)
    if run is not None and "popularity" in run.baselines:
        popularity = run.baselines["popularity"].arrays()["probability_LE"].astype(np.float64).reshape(-1)
    ranks = np.empty(count, dtype=np.int64)
    ranks[np.lexsort((-np.arange(count), popularity))] = np.arange(count)
    return ranks
