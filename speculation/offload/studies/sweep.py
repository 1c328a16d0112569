"""Many simulations of one trace, side by side: cache capacities, eviction policies and prefetchers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from analysis.documents.evaluation import CONTROL
from analysis.documents.simulation import ALL_RESIDENT, ON_DEMAND, ON_HOST, ORACLE, SimulatedRow
from profiler.errors import EmptyPartError, UsageError
from profiler.trace.reader import Trace
from speculation.data.routes import Routes, load_routes
from speculation.data.tasks import Shape, Task
from speculation.evaluation.evaluate import microseconds_per_prediction
from speculation.offload.costs import Costs
from speculation.offload.curves.division import Division
from speculation.offload.plans import PrefetchPlan, no_plan, oracle_plan, plan_of, popularity_plan, ranked
from speculation.offload.policy_scores import Evictor, policy_seconds
from speculation.offload.requests import Requests
from speculation.offload.simulation.records import Count, Miss
from speculation.offload.simulation.simulate import QUEUE, Setting, SimulationResult, Workload, simulate
from speculation.offload.state import Rule
from speculation.offload.studies.gap_to_belady import Gap
from speculation.predictors.base import Predictor
from speculation.predictors.features import expert_frequency
from speculation.training.runs import Run

NONE, POPULARITY = "none", "popularity"


@dataclass(frozen=True)
class PlannedPrefetcher:
    """What to prefetch.

    Attributes:
        name: Name in the results.
        plan: Experts to prefetch, and when.
        predict_seconds: Time of one prediction, measured on this machine; 0 for popularity and the oracle.
    """

    name: str
    plan: PrefetchPlan
    predict_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PrefetchOptions:
    """How predictions become prefetches.

    Attributes:
        experts: Experts to prefetch per prediction and layer.
        threshold: Least probability of an expert to prefetch.
        horizon: Layers ahead for popularity and the oracle; predictors have a horizon of their own.
    """

    experts: int
    threshold: float = 0.0
    horizon: int = 1


def prefetcher_of(
    predictor: Predictor, name: str, routes: Routes, requests: Requests, options: PrefetchOptions
) -> Iterator[PlannedPrefetcher]:
    """A prefetcher that follows a predictor, and its shuffled control.

    The control uses the predictions for other, randomly chosen tokens. It shows what prefetching gains if the predictions know
    nothing of the token.
    """
    best = ranked(predictor, routes, options.experts, options.threshold)
    seconds = microseconds_per_prediction(predictor, routes) / 1e6
    if predictor.shape.task != Task.NEXT_LAYER:
        # The measured time is per layer, but one prediction is for all layers of a token.
        seconds *= predictor.shape.layers
    yield PlannedPrefetcher(name, plan_of(best, predictor.shape, requests), seconds)
    order = np.random.default_rng(0).permutation(len(routes))
    other = replace(best, ids_TLHM=best.ids_TLHM[order], scores_TLHM=best.scores_TLHM[order])
    yield PlannedPrefetcher(f"{name}, {CONTROL}", plan_of(other, predictor.shape, requests), seconds)


def popularity_of(trace: Trace, part: str, run: Run | None, shape: Shape, notes: list[str]) -> Any:
    """How often each expert is used `[L, E]`, in the run's training problems or, without a run, in the trace's training part.

    Adds a note to `notes` if the trace has no training part: the frequencies are then those of the simulated problems.
    """
    if run is not None:
        return run.baselines[POPULARITY].arrays()["probability_LE"]
    try:
        return expert_frequency(load_routes(trace, "train"), shape)
    except EmptyPartError:
        notes.append("Popularity is taken from the simulated problems themselves, because the trace has no training part.")
        return expert_frequency(load_routes(trace, part), shape)


def simple_prefetcher(name: str, workload: Workload, options: PrefetchOptions) -> PlannedPrefetcher:
    """The prefetcher `none`, `popularity` or `oracle`. Raises `SpecmoeError` for another name."""
    if name == NONE:
        return PlannedPrefetcher(name, no_plan(workload.requests))
    if name == POPULARITY:
        return PlannedPrefetcher(
            name, popularity_plan(workload.popularity_LE, options.experts, options.horizon, workload.requests)
        )
    if name == ORACLE:
        return PlannedPrefetcher(name, oracle_plan(workload.requests, options.horizon))
    raise UsageError(f"unknown prefetcher {name!r}: expected {NONE}, {POPULARITY} or {ORACLE}")


def prefetchers_for(policy: Evictor, prefetchers: list[PlannedPrefetcher]) -> list[PlannedPrefetcher]:
    """The prefetchers to simulate with a policy: of a shuffled control one only, `none` if it is among them."""
    if not policy.is_control:
        return prefetchers
    return [each for each in prefetchers if each.name == NONE][:1] or prefetchers[:1]


def sweep(
    workload: Workload,
    capacities: list[list[int]],
    policies: list[Evictor],
    prefetchers: list[PlannedPrefetcher],
    costs: list[Costs | None],
    *,
    is_global: bool = False,
    queue: int = QUEUE,
    misses: Sequence[Miss] = (Miss.COPY,),
    memories: Sequence[int | None] | None = None,
    draft_seconds: float = 0.0,
    division: Division | None = None,
    on_done: Callable[[], None] = lambda: None,
) -> tuple[list[SimulatedRow], list[SimulationJob]]:
    """Simulate every combination of device, capacity, policy and prefetcher, on all cores.

    Each device also gets bounds: `on demand` (no cache, every expert is demand-loaded), `on host` (no cache, the host computes
    every expert) if there is a host, and `all resident`.

    Args:
        workload: The requests, and how popular each expert is.
        capacities: For each device, experts that the cache holds: per layer, or in all if `is_global`.
        policies: What a full cache evicts by.
        prefetchers: What to prefetch.
        costs: Costs of each device; None for a device on which nothing takes time.
        is_global: One cache for all layers instead of one per layer.
        queue: Prefetches that may wait for the interconnect.
        misses: What happens to experts that the cache lacks.
        memories: For each device, experts that host memory holds, the others being on storage; None: all.
        draft_seconds: Time in which a draft model drafts the tokens of one step.
        division: How the slots of caches for each layer are divided among the layers; default: evenly.
        on_done: Called after every simulation, in this thread.

    Returns:
        A row per simulation, whose numbers `analysis.documents.simulation.DEFINITIONS` defines, and the job of each row.
    """
    everything = workload.requests.num_experts * (workload.requests.layers if is_global else 1)
    # Cached properties: computed once here, instead of by every thread.
    _ = workload.ahead, workload.popularity
    none = simple_prefetcher(NONE, workload, PrefetchOptions(experts=1))
    lru = Evictor.of(Rule.LRU)
    jobs: list[SimulationJob] = []
    everywhere = Setting(Rule.LRU, 0, is_global, queue, draft_seconds=draft_seconds)
    for cost, sizes, ram in zip(costs, capacities, memories or [None] * len(costs), strict=True):
        nowhere = replace(everywhere, ram=ram)
        jobs.append(SimulationJob(cost, nowhere, lru, none, ON_DEMAND))
        if any(miss != Miss.COPY for miss in misses):
            jobs.append(SimulationJob(cost, replace(nowhere, miss=Miss.HOST), lru, none, ON_HOST))
        for capacity, policy in product(sizes, policies):
            slots = None if division is None else division(capacity)
            own_seconds = policy_seconds(workload, policy, capacity, is_global, slots)
            for miss, prefetcher in product(misses, prefetchers_for(policy, prefetchers)):
                setting = replace(
                    nowhere,
                    policy=policy.rule,
                    capacity=capacity,
                    slots=slots,
                    miss=miss,
                    predict_seconds=prefetcher.predict_seconds,
                    time_constant=policy.time_constant,
                    policy_seconds=own_seconds,
                    score_seconds=policy.score_seconds,
                )
                jobs.append(SimulationJob(cost, setting, policy, prefetcher))
        jobs.append(SimulationJob(cost, replace(everywhere, capacity=everything), lru, none, ALL_RESIDENT))

    results: list[SimulationResult] = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) as threads:
        for result in threads.map(lambda job: job.run(workload), jobs):
            results.append(result)
            on_done()
    slowest = {id(job.cost): result for job, result in zip(jobs, results, strict=True) if job.label == ON_DEMAND}
    gaps = {
        size: Gap(workload, size, is_global, None if division is None else division(size))
        for size in {size for sizes in capacities for size in sizes}
    }
    rows = [
        _row(workload, job, result, everything, slowest[id(job.cost)].tokens_per_second, gaps.get(job.setting.capacity))
        for job, result in zip(jobs, results, strict=True)
    ]
    return rows, jobs


@dataclass(frozen=True)
class SimulationJob:
    """One simulation. label: what bound it is, if it is one."""

    cost: Costs | None
    setting: Setting
    policy: Evictor
    prefetcher: PlannedPrefetcher
    label: str | None = None

    def run(self, workload: Workload, *, with_outcomes: bool = False) -> SimulationResult:
        """Simulate it. with_outcomes: also record what happened to each requested expert."""
        return simulate(
            workload, self.setting, self.prefetcher.plan, self.cost, self.policy.scores_SX, with_outcomes=with_outcomes
        )


def _row(
    workload: Workload,
    job: SimulationJob,
    result: SimulationResult,
    everything: int,
    on_demand: float | None,
    gap: Gap | None,
) -> SimulatedRow:
    cost, prefetcher, label = job.cost, job.prefetcher, job.label
    requests, setting, of = workload.requests, result.setting, result.total
    is_comparable = label is None and prefetcher.name == NONE and setting.miss == Miss.COPY and setting.ram is None
    captured, low, high = gap.captured(result) if gap is not None and is_comparable else (None, None, None)
    pools = 1 if setting.is_global else requests.layers
    tokens = max(1, result.decode_tokens)
    requested = max(1, of(Count.REQUESTED))
    speed = result.tokens_per_second
    return SimulatedRow(
        device=None if cost is None else cost.device,
        capacity=setting.capacity,
        share=setting.capacity / everything,
        gigabytes=None if cost is None else setting.capacity * pools * cost.expert_bytes / 1e9,
        policy=label or job.policy.name,
        on_miss=setting.miss.name.lower(),
        ram=setting.ram,
        prefetch=prefetcher.name,
        predict_microseconds=round(setting.predict_seconds * 1e6, 1),
        policy_microseconds=round(setting.policy_seconds * 1e6, 2),
        score_microseconds=round(setting.score_seconds * 1e6, 1),
        gap_captured=captured,
        gap_low=low,
        gap_high=high,
        hit_rate=result.hit_rate,
        late=of(Count.LATE) / requested,
        miss=of(Count.MISS) / requested,
        on_host=of(Count.HOST) / requested,
        loads_per_token=of(Count.LOADS) / tokens,
        gigabytes_per_token=None if cost is None else of(Count.LOADS) * cost.expert_bytes / 1e9 / tokens,
        filled_per_token=of(Count.FILLED) / tokens,
        ram_hit_rate=None if setting.ram is None else 1 - of(Count.RAM_MISS) / max(1, of(Count.MISS)),
        reads_per_token=of(Count.READS) / tokens,
        prefetched_per_token=of(Count.PREFETCHED) / tokens,
        wasted=of(Count.WASTED) / max(1, of(Count.PREFETCHED)),
        collisions_per_token=of(Count.COLLISION) / tokens,
        streamed_per_token=of(Count.STREAMED) / tokens,
        dropped_per_token=of(Count.DROPPED) / tokens,
        prefill_hit_rate=result.prefill_hit_rate,
        tokens_per_second=speed,
        prefill_tokens_per_second=result.prefill_tokens_per_second,
        stalled=result.decode_stall / result.decode_seconds if speed else None,
        times_on_demand=speed / on_demand if speed and on_demand else None,
        slots_by_layer=list(setting.slots or ()),
        counts_by_layer={count.name.lower(): result.counts_LC[:, count].tolist() for count in Count},
    )
