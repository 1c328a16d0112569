"""Many simulations of one trace side by side: capacities, policies, and what is fetched ahead."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from profiler.errors import EmptyPartError, SpecmoeError
from profiler.trace.reader import Trace
from speculation.data.routes import Routes, load_routes
from speculation.data.tasks import Shape, Task
from speculation.evaluation.evaluate import microseconds_per_prediction
from speculation.offload.costs import Costs
from speculation.offload.kernel import Count, Rule
from speculation.offload.plans import Plan, no_plan, oracle_plan, plan_of, popularity_plan, ranked
from speculation.offload.requests import Requests
from speculation.offload.simulate import QUEUE, Result, Setting, Workload, simulate
from speculation.predictors.base import Predictor
from speculation.predictors.features import expert_frequency
from speculation.training.runs import Run

Row = dict[str, Any]
NONE, ORACLE, POPULARITY = "none", "oracle", "popularity"
CONTROL = "shuffled control"


@dataclass(frozen=True)
class Prefetcher:
    """What is fetched ahead. predict_seconds: of a prediction, measured on this machine; 0 for popularity and the oracle."""

    name: str
    plan: Plan
    predict_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """How predictions are used. experts: of each prediction. threshold: the least probability. horizon: of popularity and the
    oracle; predictors have their own.
    """

    experts: int
    threshold: float = 0.0
    horizon: int = 1


def prefetcher_of(predictor: Predictor, name: str, routes: Routes, requests: Requests, how: Ahead) -> Iterator[Prefetcher]:
    """A predictor, and beside it the same predictions made about other tokens: what is won by guessing anything at all."""
    best = ranked(predictor, routes, how.experts, how.threshold)
    seconds = microseconds_per_prediction(predictor, routes) / 1e6
    if predictor.shape.task != Task.NEXT_LAYER:
        # Told per layer; asked for all of a token at once.
        seconds *= predictor.shape.layers
    yield Prefetcher(name, plan_of(best, predictor.shape, requests), seconds)
    order = np.random.default_rng(0).permutation(len(routes))
    other = replace(best, ids_TLHM=best.ids_TLHM[order], scores_TLHM=best.scores_TLHM[order])
    yield Prefetcher(f"{name}, {CONTROL}", plan_of(other, predictor.shape, requests), seconds)


def popularity_of(trace: Trace, part: str, run: Run | None, shape: Shape, notes: list[str]) -> Any:
    """Frequencies `[L, E]` in the training problems of the run; without one, of the trace's own training part."""
    if run is not None:
        return run.baselines[POPULARITY].arrays()["probability_LE"]
    try:
        return expert_frequency(load_routes(trace, "train"), shape)
    except EmptyPartError:
        notes.append("Popularity is of the simulated problems themselves: the trace has no training part.")
        return expert_frequency(load_routes(trace, part), shape)


def simple_prefetcher(name: str, workload: Workload, how: Ahead) -> Prefetcher:
    """none, popularity or oracle. Raises `SpecmoeError` for another name."""
    if name == NONE:
        return Prefetcher(name, no_plan(workload.requests))
    if name == POPULARITY:
        return Prefetcher(name, popularity_plan(workload.popularity_LE, how.experts, how.horizon, workload.requests))
    if name == ORACLE:
        return Prefetcher(name, oracle_plan(workload.requests, how.horizon))
    raise SpecmoeError(f"unknown prefetcher {name!r}: expected {NONE}, {POPULARITY}, {ORACLE}, a baseline of a run, or a run")


def sweep(
    workload: Workload,
    capacities: list[list[int]],
    policies: list[Rule],
    prefetchers: list[Prefetcher],
    costs: list[Costs | None],
    *,
    is_global: bool = False,
    queue: int = QUEUE,
    on_done: Callable[[], None] = lambda: None,
) -> list[Row]:
    """A row for each device, capacity (a list for each device), policy and prefetcher, and for each device one with everything
    copied on demand, and one with every expert resident. Runs on all cores.
    """
    everything = workload.requests.num_experts * (workload.requests.layers if is_global else 1)
    # Counted once, before the threads ask for it together.
    _ = workload.ahead, workload.popularity
    none = simple_prefetcher(NONE, workload, Ahead(experts=1))
    jobs: list[tuple[Costs | None, Setting, Prefetcher, str | None]] = []
    for cost, sizes in zip(costs, capacities, strict=True):
        jobs.append((cost, Setting(Rule.LRU, 0, is_global, queue), none, "on demand"))
        for capacity in sizes:
            for policy in policies:
                for prefetcher in prefetchers:
                    setting = Setting(policy, capacity, is_global, queue, prefetcher.predict_seconds)
                    jobs.append((cost, setting, prefetcher, None))
        jobs.append((cost, Setting(Rule.LRU, everything, is_global, queue), none, "all resident"))

    def run(job: tuple[Costs | None, Setting, Prefetcher, str | None]) -> Result:
        cost, setting, prefetcher, _ = job
        result = simulate(workload, setting, prefetcher.plan, cost)
        on_done()
        return result

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) as threads:
        results = list(threads.map(run, jobs))
    slowest = {id(cost): result for (cost, _, _, label), result in zip(jobs, results, strict=True) if label == "on demand"}
    return [
        _row(workload, cost, prefetcher, label, result, everything, slowest[id(cost)].tokens_per_second)
        for (cost, _, prefetcher, label), result in zip(jobs, results, strict=True)
    ]


def _row(
    workload: Workload,
    cost: Costs | None,
    prefetcher: Prefetcher,
    label: str | None,
    result: Result,
    everything: int,
    on_demand: float | None,
) -> Row:
    requests, setting, of = workload.requests, result.setting, result.total
    pools = 1 if setting.is_global else requests.layers
    tokens = max(1, result.decode_tokens)
    requested = max(1, of(Count.REQUESTED))
    speed = result.tokens_per_second
    return {
        "device": None if cost is None else cost.device,
        "capacity": setting.capacity,
        "share": setting.capacity / everything,
        "gigabytes": None if cost is None else setting.capacity * pools * cost.expert_bytes / 1e9,
        "policy": label or setting.policy.name.lower(),
        "prefetch": prefetcher.name,
        "predict_microseconds": round(setting.predict_seconds * 1e6, 1),
        "hit_rate": result.hit_rate,
        "late": of(Count.LATE) / requested,
        "miss": of(Count.MISS) / requested,
        "loads_per_token": of(Count.LOADS) / tokens,
        "gigabytes_per_token": None if cost is None else of(Count.LOADS) * cost.expert_bytes / 1e9 / tokens,
        "prefetched_per_token": of(Count.PREFETCHED) / tokens,
        "wasted": of(Count.WASTED) / max(1, of(Count.PREFETCHED)),
        "collisions_per_token": of(Count.COLLISION) / tokens,
        "streamed_per_token": of(Count.STREAMED) / tokens,
        "dropped_per_token": of(Count.DROPPED) / tokens,
        "prefill_hit_rate": result.prefill_hit_rate,
        "tokens_per_second": speed,
        "prefill_tokens_per_second": result.prefill_tokens_per_second,
        "stalled": result.decode_stall / result.decode_seconds if speed else None,
        "times_on_demand": speed / on_demand if speed and on_demand else None,
        "counts_by_layer": {count.name.lower(): result.counts_LC[:, count].tolist() for count in Count},
    }
