"""A replay, and a simulation of the same tokens with the costs that the replay's device was measured to have.

This is what `specmoe replay` runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis.documents.replay import ReplayResult, ReplayRow
from profiler.errors import SpecmoeError
from profiler.models.gpus import find_gpu
from profiler.trace.reader import Trace
from speculation.data.routes import Routes, load_routes
from speculation.data.tasks import Shape, Task
from speculation.evaluation.evaluate import check_run
from speculation.offload.costs import MEMORY_SHARE, Costs, costs_of, find_entry
from speculation.offload.policy_scores import Evictor, learned_evictors
from speculation.offload.replay import Sizes, measure, open_device
from speculation.offload.replay import replay as run_tokens
from speculation.offload.requests import requests_of
from speculation.offload.simulation.records import Count
from speculation.offload.simulation.simulate import Setting, Workload, capacities, simulate
from speculation.offload.state import Rule
from speculation.offload.studies.sweep import (
    NONE,
    PlannedPrefetcher,
    PrefetchOptions,
    popularity_of,
    prefetcher_of,
    simple_prefetcher,
)
from speculation.training.runs import load_run


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What to replay.

    Attributes:
        trace: The trace.
        part: Part of the split by problem: `test`, `validation`, `train` or `all`.
        run: Run directory of a predictor for next-layer; None replays without predictions only.
        policy: Which expert a full cache evicts; any but Belady's, and not `Rule.LEARNED`.
        reuse: Run directory of a predictor of reuse, whose policy is replayed instead. Its scores are computed before the
            replay, so that their time is not part of it.
        fraction: Share of all experts that the cache holds, 0 to 1.
        kind: Device: `cuda` or `cpu`.
        model: Registered model whose sizes the dummy experts have. Default: the trace's model.
        precision: Precision of the weights. Default: that of the model's first checkpoint.
        expert_bytes: Bytes of an expert, instead of the model's.
        rest_bytes: Bytes of a layer's other weights, instead of the model's.
        experts: Experts to prefetch per prediction and layer. Default: the model's top-k.
        tokens: Tokens to replay.
    """

    trace: Trace
    part: str
    run: Path | None
    policy: Rule
    fraction: float
    kind: str
    model: str | None = None
    precision: str | None = None
    expert_bytes: int | None = None
    rest_bytes: int | None = None
    experts: int | None = None
    tokens: int = 500
    reuse: Path | None = None


def run_replay(wanted: Replay) -> ReplayResult:
    """Measure the device, replay the tokens, and simulate the same with the measured costs.

    There are up to three cases: no cache, a cache, and a cache with prefetching if there is a run.

    Raises:
        SpecmoeError: There is no GPU, the sizes of the model are unknown, or the run does not fit the trace.
    """
    facts = wanted.trace.metadata.model
    shape = Shape.of(facts, 1, Task.NEXT_TOKEN)
    run = None if wanted.run is None else load_run(wanted.run)
    if run is not None:
        check_run(run, wanted.trace)
    costs, sizes = sizes_of(wanted, shape)
    routes = _first(load_routes(wanted.trace, wanted.part), wanted.tokens)
    workload = Workload(requests_of(routes, shape.experts), popularity_of(wanted.trace, wanted.part, run, shape, []))
    measured = measure(wanted.kind, sizes, costs)
    (capacity,) = capacities(workload, [wanted.fraction], [], None, False)
    experts = wanted.experts or shape.top_k
    evictor = Evictor.of(wanted.policy)
    if wanted.reuse is not None:
        reuse = load_run(wanted.reuse)
        check_run(reuse, wanted.trace)
        evictor = next(learned_evictors(reuse.predictor, wanted.reuse.name, routes, workload.requests))
    cases: list[tuple[str, int, PlannedPrefetcher, Any]] = [
        ("on demand", 0, simple_prefetcher(NONE, workload, PrefetchOptions(experts=1)), None),
        (evictor.name, capacity, simple_prefetcher(NONE, workload, PrefetchOptions(experts=1)), None),
    ]
    if run is not None and wanted.run is not None:
        first = next(prefetcher_of(run.predictor, wanted.run.name, routes, workload.requests, PrefetchOptions(experts=experts)))
        cases.append((f"{evictor.name}, {wanted.run.name}", capacity, first, run.predictor))
    rows = []
    for name, size, prefetcher, predictor in cases:
        device = open_device(wanted.kind, shape.layers * size + shape.top_k, sizes)
        try:
            found = run_tokens(
                device,
                routes,
                sizes,
                evictor.rule,
                size,
                workload.popularity,
                predictor,
                experts=experts,
                tokens=wanted.tokens,
                scores_TX=evictor.scores_SX,
            )
        finally:
            device.close()
        setting = Setting(evictor.rule, size, predict_seconds=prefetcher.predict_seconds)
        estimate = simulate(workload, setting, prefetcher.plan, measured, evictor.scores_SX)
        assert estimate.tokens_per_second is not None  # it has costs
        rows.append(
            ReplayRow(
                case=name,
                capacity=size,
                tokens_per_second=found.tokens_per_second,
                estimated=estimate.tokens_per_second,
                hit_rate=found.hits / found.requested,
                late=found.late / found.requested,
                estimated_hit_rate=estimate.hit_rate,
                estimated_late=estimate.total(Count.LATE) / found.requested,
                prefetched_per_token=found.prefetched / found.tokens,
            )
        )
    lines = list(measured.describe())
    if wanted.reuse is not None:
        lines.append(f"the scores of {wanted.reuse.name} were computed before the replay: their time is in no row")
    return ReplayResult(device=measured.device, assumptions=lines, tokens=len(routes), rows=rows)


def _first(routes: Routes, tokens: int) -> Routes:
    """The first `tokens` tokens, all taken as decoded ones."""
    chosen = routes.of_problems(np.arange(len(routes)) < tokens)
    return replace(chosen, is_decode_T=np.ones(len(chosen), dtype=np.bool_))


def sizes_of(wanted: Replay, shape: Shape) -> tuple[Costs, Sizes]:
    """Costs with the sizes of the model but without its times, and the sizes of the dummy weights.

    Raises:
        SpecmoeError: The model is not registered, and no sizes are given.
    """
    name = wanted.model or wanted.trace.metadata.model.id
    entry = find_entry(name)
    if entry is None and (wanted.expert_bytes is None or wanted.rest_bytes is None):
        raise SpecmoeError(
            f"the sizes of {name} are unknown: name a registered model, or give the size of an expert and that of the rest "
            "of a layer"
        )
    width = 2048 if entry is None else entry.hidden
    if entry is None:
        costs = Costs(
            model=wanted.trace.metadata.model.id,
            device="",
            precision="bfloat16",
            expert_bytes=float(wanted.expert_bytes or 0),
            copy_seconds=0.0,
            expert_seconds=0.0,
            token_seconds=0.0,
            layer_seconds=0.0,
            layer_token_seconds=0.0,
        )
        rest = wanted.rest_bytes or 0
    else:
        gpu = find_gpu("RTX 4090")
        costs = costs_of(entry, gpu, wanted.precision)
        # Only the sizes matter: the times are measured later. Any GPU gives the same sizes.
        rest = wanted.rest_bytes or int(costs.layer_seconds * gpu.bandwidth * 1e9 * MEMORY_SHARE)
        costs = replace(
            costs, expert_bytes=wanted.expert_bytes or costs.expert_bytes, token_seconds=0.0, layer_token_seconds=0.0
        )
    sizes = Sizes(
        expert_bytes=int(costs.expert_bytes), rest_bytes=rest, width=width, layers=shape.layers, num_experts=shape.experts
    )
    return costs, sizes
