"""Simulate caches of experts for a trace, runs and devices: what `specmoe simulate` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from analysis.documents.simulation import DEFINITIONS, ORACLE, SimulatedCosts, SimulatedDevice, SimulatedRow, Simulation
from profiler.errors import SpecmoeError, UsageError, counted
from profiler.models.gpus import Gpu
from profiler.models.hosts import Host, Storage
from profiler.models.registry import USED_SHARE
from profiler.trace.reader import Trace
from speculation.data.routes import Routes, load_routes, route_digests
from speculation.data.tasks import Shape, Task
from speculation.evaluation.evaluate import check_run
from speculation.offload.costs import Costs, costs_of, find_entry
from speculation.offload.curves.division import BY_CURVE, EVEN, division_of
from speculation.offload.policy_scores import Evictor, learned_evictors
from speculation.offload.replay import default_device, measure
from speculation.offload.requests import NO_DRAFTS, Drafting, Requests, requests_of
from speculation.offload.simulation.records import Miss
from speculation.offload.simulation.simulate import Workload, capacities
from speculation.offload.state import TIME_CONSTANT, Rule
from speculation.offload.studies.host_measure import measured_on_host
from speculation.offload.studies.replay_study import Replay, sizes_of
from speculation.offload.studies.sweep import (
    NONE,
    POPULARITY,
    Prefetcher,
    PrefetchOptions,
    popularity_of,
    prefetcher_of,
    prefetchers_for,
    simple_prefetcher,
    sweep,
)
from speculation.offload.studies.token_outcomes import simulated_sample
from speculation.predictors.options import TrainingOptions
from speculation.predictors.registry import find_predictor, predictor_classes
from speculation.training.runs import CONFIG_FILE, Run, load_run

OnDone = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Study:
    """What to simulate. The fields are the options of `specmoe simulate`.

    policies: names of rules (`Rule.label`), or run directories of the task `reuse`.
    """

    trace: Trace
    part: str
    predictors: tuple[str, ...]
    policies: tuple[str, ...]
    fractions: tuple[float, ...] = ()
    gigabytes: tuple[float, ...] = ()
    is_global: bool = False
    devices: tuple[Gpu, ...] = ()
    measure: bool = False
    model: str | None = None
    precision: str | None = None
    link: float | None = None
    horizon: int = 1
    experts: int | None = None
    threshold: float = 0.0
    queue: int = 64
    batch: int = 1
    time_constant: float = TIME_CONSTANT
    host: Host | None = None
    host_bandwidth: float | None = None
    misses: tuple[Miss, ...] = (Miss.COPY,)
    storage: Storage | None = None
    ram_gigabytes: float | None = None
    ram_fraction: float | None = None
    drafting: Drafting = NO_DRAFTS
    draft_milliseconds: float = 0.0
    slots: str = EVEN

    @property
    def is_tiered(self) -> bool:
        """Whether some experts are on storage only."""
        return self.ram_gigabytes is not None or self.ram_fraction is not None


def run_study(study: Study, on_done: OnDone = lambda done, total: None) -> Simulation:
    """Simulate every combination of device, cache size, policy and prefetcher.

    Args:
        study: What to simulate.
        on_done: Called with the number of finished simulations, and of all, after each one.

    Raises:
        SpecmoeError: A name is unknown, a run does not fit the trace, or the part has no problems.
    """
    runs = {name: load_run(Path(name)) for name in study.predictors if (Path(name) / CONFIG_FILE).is_file()}
    learned = {name: load_run(Path(name)) for name in study.policies if (Path(name) / CONFIG_FILE).is_file()}
    facts = study.trace.metadata.model
    # Only the sizes are used. Unlike next-layer, this task also exists for a single layer.
    shape = Shape.of(facts, 1, Task.NEXT_TOKEN)
    notes: list[str] = []
    for name, run in (runs | learned).items():
        check_run(run, study.trace)
        if run.predictor.takes_router_inputs:
            raise SpecmoeError(f"{name} takes router inputs, which a simulation does not have")
    for name, run in runs.items():
        if not run.predictor.shape.task.predicts_experts:
            raise SpecmoeError(f"{name} was trained for {run.predictor.shape.task}: use it as a policy, not as a predictor")
    _check_tiers(study)
    costs = _costs(study, notes)
    routes = load_routes(study.trace, study.part)
    if not routes.is_decode_T.any():
        notes.append("The trace does not say which tokens were generated: all are simulated as if they were.")
        routes = replace(routes, is_decode_T=np.ones(len(routes), dtype=np.bool_))
    requests = requests_of(routes, shape.experts, batch=study.batch, drafting=study.drafting)
    popularity_LE = popularity_of(study.trace, study.part, next(iter((runs | learned).values()), None), shape, notes)
    workload = Workload(requests, popularity_LE)
    how = PrefetchOptions(experts=study.experts or shape.top_k, threshold=study.threshold, horizon=study.horizon)
    prefetchers = [
        each for name in dict.fromkeys(study.predictors) for each in _prefetchers(name, study, runs, workload, routes, how)
    ]
    policies = [each for name in dict.fromkeys(study.policies) for each in _policies(name, study, learned, routes, requests)]
    sizes = [
        list(dict.fromkeys(capacities(workload, list(study.fractions), list(study.gigabytes), cost, study.is_global)))
        for cost in costs
    ]
    notes += _too_large(study, costs, sizes, shape)
    if study.is_global and study.slots != EVEN:
        raise UsageError(f"slots {study.slots!r} are of caches for each layer: leave out the one cache for all layers")
    division = division_of(study.slots, study.trace, shape, workload, study.batch)
    pairs = sum(len(prefetchers_for(policy, prefetchers)) for policy in policies)
    bounds = 2 + any(miss != Miss.COPY for miss in study.misses)
    total = sum(bounds + len(each) * len(study.misses) * pairs for each in sizes)
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        on_done(done, total)

    rows, jobs = sweep(
        workload,
        sizes,
        policies,
        prefetchers,
        costs,
        is_global=study.is_global,
        queue=study.queue,
        misses=study.misses,
        memories=[_memory(study, cost, shape) for cost in costs],
        draft_seconds=study.drafting.tokens * study.draft_milliseconds / 1e3,
        division=division,
        on_done=count,
    )
    held_out = route_digests(study.trace, routes)
    trained_on = {name: int(np.isin(held_out, run.trained_on).sum()) for name, run in (runs | learned).items()}
    notes += [
        f"NOT held out: {name} was trained on {number} of these problems" for name, number in trained_on.items() if number
    ]
    decode = int(requests.kept_S[requests.is_decode_S].sum())
    if not runs and study.part in {"train", "all"}:
        notes.append("NOT held out: popularity and counting predictors were fitted on the simulated problems.")
    if division is not None:
        source = "of the training part" if study.slots == BY_CURVE else f"in {study.slots}"
        notes.append(f"Slots are divided among layers by the curves {source}; sizes are those of a layer on average.")
        if study.slots == BY_CURVE and study.part in {"train", "all"}:
            notes.append("NOT held out: slots were chosen on the simulated problems.")
    kinds = "one cache for all layers" if study.is_global else "a cache for each layer"
    notes += [
        f"{counted(len(routes.problem_ids), 'problem')}, {decode:,} generated and {len(routes) - decode:,} prompt tokens "
        f"({study.part} part); {study.batch} at a time; {kinds}, which starts with the experts most popular in training.",
        *_prefetching_notes(study, how),
        *_drafting_notes(study, requests),
        *study.trace.caveats(),
    ]
    best = best_of(rows)
    return Simulation(
        trace=study.trace.path.name,
        model=study.model or facts.id,
        layers=shape.layers,
        num_experts=shape.experts,
        top_k=shape.top_k,
        part=study.part,
        problems=len(routes.problem_ids),
        tokens=len(routes),
        batch=study.batch,
        draft_tokens=study.drafting.tokens,
        acceptance=study.drafting.acceptance,
        is_global=study.is_global,
        definitions=DEFINITIONS,
        devices=[
            SimulatedDevice(
                name=None if cost is None else cost.device,
                costs=None if cost is None else SimulatedCosts.model_validate(cost.to_json()),
                assumptions=[] if cost is None else cost.describe(),
            )
            for cost in costs
        ],
        notes=notes,
        best=best,
        rows=rows,
        sample=simulated_sample(study.trace, routes, workload, rows, best, jobs),
    )


def best_of(rows: list[SimulatedRow]) -> list[SimulatedRow]:
    """Find the fastest row of each device and size that uses no future knowledge, with its gain over no prefetching."""
    found = []
    possible = [row for row in rows if row.is_possible and row.tokens_per_second]
    for device, capacity in dict.fromkeys((row.device, row.capacity) for row in possible):
        own = [row for row in possible if (row.device, row.capacity) == (device, capacity)]
        best = max(own, key=_speed)
        plain = max((_speed(row) for row in own if row.prefetch == NONE), default=None)
        found.append(best.model_copy(update={"gain": _speed(best) / plain if plain else None}))
    return found


def _speed(row: SimulatedRow) -> float:
    return row.tokens_per_second or 0.0


def _too_large(study: Study, costs: list[Costs | None], sizes: list[list[int]], shape: Shape) -> list[str]:
    """Name the caches that do not fit on their device together with the model's other weights."""
    entry = find_entry(study.model or study.trace.metadata.model.id)
    found = []
    for gpu, cost, each in zip(study.devices, costs, sizes, strict=False):
        if entry is None or cost is None:
            continue
        experts = shape.layers * shape.experts * cost.expert_bytes / 1e9
        rest = max(0.0, entry.weights_gb(cost.precision) - experts)
        largest = max(each, default=0) * (1 if study.is_global else shape.layers) * cost.expert_bytes / 1e9
        if largest + rest > gpu.memory * USED_SHARE:
            found.append(f"{largest:.0f} GB of experts and {rest:.0f} GB of other weights do not fit on an {gpu.name}.")
    return found


def _costs(study: Study, notes: list[str]) -> list[Costs | None]:
    """Estimate the costs on each device; a single None if the model's sizes are unknown."""
    name = study.model or study.trace.metadata.model.id
    entry = find_entry(name)
    if entry is None:
        if study.model is not None:
            raise UsageError(f"unknown model {study.model!r}: see 'specmoe models'")
        notes.append(
            f"The sizes of {name} are unknown, so no device was simulated and transfers take no time. Choose a model with "
            "known sizes (see 'specmoe models')."
        )
        return [None]
    facts = study.trace.metadata.model
    if (len(entry.moe_layers), entry.experts, entry.top_k) != (len(facts.moe_layers), facts.num_experts, facts.top_k):
        raise SpecmoeError(
            f"{entry.name} has {counted(len(entry.moe_layers), 'MoE layer')} of {entry.experts} experts, top-{entry.top_k}; "
            "the trace "
            f"has {len(facts.moe_layers)} of {facts.num_experts}, top-{facts.top_k}: choose another model"
        )
    found: list[Costs | None] = [
        costs_of(
            entry,
            gpu,
            study.precision,
            link=study.link,
            host=study.host,
            host_bandwidth=study.host_bandwidth,
            storage=study.storage,
        )
        for gpu in study.devices
    ]
    for gpu in study.devices:
        weights = entry.weights_gb(study.precision or entry.precisions[0])
        if weights <= gpu.memory * USED_SHARE:
            notes.append(f"All of {entry.name}, {weights:.0f} GB, would fit on an {gpu.name} of {gpu.memory} GB.")
    if study.measure:
        wanted = Replay(
            trace=study.trace,
            part=study.part,
            run=None,
            policy=Rule.LRU,
            fraction=0.0,
            kind=default_device(),
            model=study.model,
            precision=study.precision,
        )
        costs, sizes = sizes_of(wanted, Shape.of(facts, 1, Task.NEXT_TOKEN))
        measured = measure(wanted.kind, sizes, costs)
        if study.is_tiered or any(miss != Miss.COPY for miss in study.misses):
            measured = measured_on_host(measured, sizes.width, storage=study.is_tiered)
        found.append(measured)
    return found


def _policies(name: str, study: Study, runs: dict[str, Run], routes: Routes, requests: Requests) -> Iterator[Evictor]:
    """The policies that a name stands for: for a run, also its shuffled control."""
    known = {rule.label: rule for rule in Rule if rule != Rule.LEARNED}
    if name in runs:
        folder = Path(name).name
        is_taken = folder in known or sum(Path(each).name == folder for each in runs) > 1
        yield from learned_evictors(runs[name].predictor, name if is_taken else folder, routes, requests)
    elif name in known:
        yield Evictor.of(known[name], study.time_constant)
    else:
        raise UsageError(f"policy {name!r} is neither the folder of a run nor one of {', '.join(known)}")


def _check_tiers(study: Study) -> None:
    """Raise `SpecmoeError` if what the options say of the host and of storage does not go together."""
    needs_host = any(miss != Miss.COPY for miss in study.misses)
    if needs_host and study.devices and study.host is None:
        raise UsageError("which host computes the experts that the cache lacks? Name one (see 'specmoe models MODEL')")
    if study.is_tiered and study.devices and study.storage is None:
        raise UsageError("which storage holds the experts that host memory does not? Name one (see 'specmoe models MODEL')")
    is_unified = study.host is not None and study.host.gpu is not None
    if study.storage is not None and not study.is_tiered and not is_unified:
        raise UsageError(f"{study.storage.name}: how many experts fit in host memory? Give their size in GB, or their share")
    if study.ram_fraction is not None and not 0 <= study.ram_fraction <= 1:
        raise UsageError(f"share of {study.ram_fraction} of all experts in host memory: expected 0 to 1")
    if study.host is not None and is_unified and (study.is_tiered or needs_host):
        raise UsageError(
            f"{study.host.name} has one memory for CPU and GPU: its cache is what the memory holds, and misses are copied from "
            "storage"
        )


def _memory(study: Study, cost: Costs | None, shape: Shape) -> int | None:
    """How many experts host memory holds; None: all."""
    everything = shape.layers * shape.experts
    if study.ram_fraction is not None:
        return int(study.ram_fraction * everything + 1e-9)
    if study.ram_gigabytes is None:
        return None
    if cost is None:
        raise SpecmoeError(
            "host memory in GB needs the size of an expert: name a model of known sizes (see 'specmoe models'), "
            "or give a share of all experts instead"
        )
    return min(everything, int(study.ram_gigabytes * 1e9 / cost.expert_bytes))


def _drafting_notes(study: Study, requests: Requests) -> list[str]:
    if not study.drafting.tokens:
        return []
    decodes = requests.is_decode_S
    kept = requests.kept_S[decodes].sum() / max(1, requests.sequences_S[decodes].sum())
    return [
        f"Speculative decoding: {study.drafting.tokens} draft tokens per step and sequence, each accepted with probability "
        f"{study.drafting.acceptance} (given) if the one before it was; a step keeps {kept:.2f} tokens of a sequence, and only "
        f"these count as tokens. The draft model takes {study.draft_milliseconds} ms per token (given). The sequence's own "
        "tokens stand in for rejected ones."
    ]


def _prefetchers(
    name: str, study: Study, runs: dict[str, Run], workload: Workload, routes: Routes, how: PrefetchOptions
) -> Iterator[Prefetcher]:
    if name in runs:
        folder = Path(name).name
        others = {each for each in study.predictors if each not in runs} | {NONE, ORACLE, POPULARITY}
        is_taken = folder in others or sum(Path(each).name == folder for each in runs) > 1
        yield from prefetcher_of(runs[name].predictor, name if is_taken else folder, routes, workload.requests, how)
    elif name in {NONE, POPULARITY, ORACLE}:
        yield simple_prefetcher(name, workload, how)
    elif name in predictor_classes():
        for run in runs.values():
            if name in run.baselines:
                yield from prefetcher_of(run.baselines[name], name, routes, workload.requests, how)
                return
        layers = len(study.trace.metadata.model.moe_layers)
        predictor = find_predictor(name)(Shape.of(study.trace.metadata.model, min(study.horizon, max(1, layers - 1))))
        predictor.fit(load_routes(study.trace, "train"), None, TrainingOptions(), lambda *_: None)
        yield from prefetcher_of(predictor, name, routes, workload.requests, how)
    else:
        raise UsageError(
            f"predictor {name!r} is neither the folder of a run, nor {NONE}, {POPULARITY}, {ORACLE} or the name of a predictor"
        )


def _prefetching_notes(study: Study, how: PrefetchOptions) -> list[str]:
    if set(study.predictors) == {NONE}:
        return []
    return [
        f"Prefetched: {how.experts} experts per prediction; popularity and oracle {_layers(how.horizon)} ahead. "
        "Predictors predict for generated tokens only. Their time was measured on this machine, one prediction after the "
        "other. The shuffled control prefetches what was predicted for other tokens."
    ]


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"
