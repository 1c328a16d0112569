"""What the simulation says of the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runtime.rows import Case, Measured
from profiler.trace.reader import Trace
from speculation.data.routes import load_routes
from speculation.offload.costs import Costs
from speculation.offload.simulation.simulate import Setting
from speculation.offload.state import Rule
from speculation.runtime.agreement import simulate_routes
from speculation.training.runs import load_run


class Simulator:
    """The simulation of the rows of our runtime, on the trace that one of them wrote."""

    def __init__(self, trace: Trace, experts: int) -> None:
        self._experts, self._routes = experts, load_routes(trace, "all")

    def tokens_per_second(self, row: Case, one: Measured, base: Measured) -> float | None:
        """What the simulation gives for a row; None for what it does not know.

        Args:
            row: The row.
            one: What it measured: the means of its transfers and of its experts' computation are the costs.
            base: The row without a cache, whose rest of a layer has no predictions in it.
        """
        # The simulation cannot know what the routers choose for another layer's input.
        if row.kind != "runtime" or not row.direct or row.predictor == "next-gate" or row.device != "cpu" or row.fraction == 1:
            return None
        costs = Costs(
            model="demo",
            device="cpu",
            precision="float32",
            expert_bytes=1.0,
            copy_seconds=one.copy_seconds,
            expert_seconds=one.expert_seconds,
            token_seconds=0.0,
            layer_seconds=base.layer_seconds,
            layer_token_seconds=0.0,
            computes_on_arrival=True,
        )
        predictor = None if row.predictor is None else load_run(Path(row.predictor)).predictor
        rule, reuse = Rule.LRU, None
        if Path(row.policy).is_dir():
            rule, reuse = Rule.LEARNED, load_run(Path(row.policy)).predictor
        elif row.policy != "lru":
            rule = Rule[row.policy.upper()]
        layers, top_k = self._routes.expert_ids_TLK.shape[1:]
        return simulate_routes(
            self._routes,
            _ranks(row, layers, self._experts),
            Setting(rule, int(row.fraction * self._experts)),
            costs,
            prefetcher=predictor,
            prefetch=row.prefetch or top_k,
            threshold=row.threshold,
            reuse=reuse,
        ).tokens_per_second


def _ranks(row: Case, layers: int, experts: int) -> Any:
    """What the cache of a row begins with: the popular experts of its predictor's training, or the lowest numbers."""
    run = next((path for path in (row.policy, row.predictor) if path is not None and Path(path).is_dir()), None)
    return (
        np.zeros((layers, experts)) if run is None else load_run(Path(run)).baselines["popularity"].arrays()["probability_LE"]
    )
