"""How `specmoe simulate --slots` divides the slots of a cache among the layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from analysis.documents.curves import CURVES_FILE, read_curves
from profiler.errors import EmptyPartError, SpecmoeError, UsageError, counted
from profiler.trace.reader import Trace
from speculation.data.routes import load_routes
from speculation.data.tasks import Shape
from speculation.offload.curves.hit_curves import lru_curves
from speculation.offload.curves.slots import best_slots
from speculation.offload.requests import requests_of
from speculation.offload.simulation.simulate import Workload

EVEN, BY_CURVE = "even", "curve"
# The slots of each layer, given how many a layer has on average.
Division = Callable[[int], tuple[int, ...]]


def division_of(name: str, trace: Trace, shape: Shape, workload: Workload, batch: int) -> Division | None:
    """Choose how slots are divided among layers; None for evenly.

    Args:
        name: `even`; `curve`, by the curves of the trace's training part; or a file or folder of `specmoe curve`, whose slots
            are taken.
        trace: The simulated trace.
        shape: The sizes of its model.
        workload: The simulated requests, whose popularity the caches start with.
        batch: Sequences that are decoded at the same time.

    Raises:
        SpecmoeError: The trace has no training part, or the file is of another model. The division raises it if the file has
            no slots for a size.
    """
    if name == EVEN:
        return None
    if name == BY_CURVE:
        return _by_curve(trace, shape, workload, batch)
    if Path(name).exists():
        return _from_file(Path(name), shape)
    raise UsageError(f"slots {name!r}: expected {EVEN}, {BY_CURVE}, or a folder that 'specmoe curve TRACE --out DIR' wrote")


def _by_curve(trace: Trace, shape: Shape, workload: Workload, batch: int) -> Division:
    try:
        training = load_routes(trace, "train")
    except EmptyPartError as error:
        raise SpecmoeError(
            f"slots {BY_CURVE!r}: {trace.path} has no training part: give the folder that 'specmoe curve --training OTHER "
            "--out DIR' wrote"
        ) from error
    if not training.is_decode_T.any():
        training = replace(training, is_decode_T=np.ones(len(training), dtype=np.bool_))
    requests = requests_of(training, shape.experts, batch=batch)
    hits_LC = lru_curves(Workload(requests, workload.popularity_LE)).hits_LC
    return lambda capacity: tuple(best_slots(hits_LC, capacity * shape.layers).tolist())


def _from_file(path: Path, shape: Shape) -> Division:
    curves = read_curves(path)
    if (len(curves.moe_layers), curves.num_experts) != (shape.layers, shape.experts):
        raise SpecmoeError(
            f"{path}: its model has {counted(len(curves.moe_layers), 'MoE layer')} of {curves.num_experts} experts, the "
            "trace's has "
            f"{shape.layers} of {shape.experts}"
        )
    by_total = {row.slots: tuple(row.by_layer) for row in curves.slots}

    def divide(capacity: int) -> tuple[int, ...]:
        total = capacity * shape.layers
        if total not in by_total:
            has = ", ".join(map(str, by_total)) or "none"
            share = capacity / shape.experts
            raise SpecmoeError(
                f"{path}: {CURVES_FILE} divides {has} slots, not {total}: run 'specmoe curve' with --cache-fraction {share:.4g}"
            )
        return by_total[total]

    return divide
