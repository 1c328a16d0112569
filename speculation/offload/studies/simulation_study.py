"""Simulate caches of experts for a trace, runs and devices: what `specmoe simulate` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from analysis.documents.simulation import DEFINITIONS, ORACLE, SimulatedCosts, SimulatedDevice, SimulatedRow, Simulation
from profiler.errors import SpecmoeError, UsageError, counted
from speculation.data.routes import Routes, load_routes, route_digests
from speculation.data.tasks import Shape, Task
from speculation.evaluation.evaluate import check_run
from speculation.offload.curves.division import BY_CURVE, EVEN, division_of
from speculation.offload.policy_scores import Evictor, learned_evictors
from speculation.offload.requests import Requests, requests_of
from speculation.offload.simulation.records import Miss
from speculation.offload.simulation.simulate import Workload, capacities
from speculation.offload.state import Rule
from speculation.offload.studies.simulated_devices import check_tiers, costs_on_devices, experts_in_memory, too_large
from speculation.offload.studies.simulation_options import SimulationStudy
from speculation.offload.studies.sweep import (
    NONE,
    POPULARITY,
    PlannedPrefetcher,
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


def run_study(study: SimulationStudy, on_done: OnDone = lambda done, total: None) -> Simulation:
    """Simulate every combination of device, cache size, policy and prefetcher.

    Args:
        study: What to simulate.
        on_done: Called with the number of finished simulations, and of all, after each one.

    Returns:
        A row for each combination, with hit rates (0 to 1) and, where costs are known, tokens per second; and for a run the
        rows of its shuffled control.

    Raises:
        SpecmoeError: A name is unknown, a run does not fit the trace, or the part has no problems.

    Example:
        >>> from profiler import Trace
        >>> from speculation import SimulationStudy, run_study
        >>> trace = Trace.open("traces/math")
        >>> study = SimulationStudy(trace=trace, part="test", predictors=("none",), policies=("lru",), fractions=(0.5,))
        >>> for row in run_study(study).rows:
        ...     print(row.policy, row.share, row.hit_rate)
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
    check_tiers(study)
    costs = costs_on_devices(study, notes)
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
    notes += too_large(study, costs, sizes, shape)
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
        memories=[experts_in_memory(study, cost, shape) for cost in costs],
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


def _policies(name: str, study: SimulationStudy, runs: dict[str, Run], routes: Routes, requests: Requests) -> Iterator[Evictor]:
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


def _drafting_notes(study: SimulationStudy, requests: Requests) -> list[str]:
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
    name: str, study: SimulationStudy, runs: dict[str, Run], workload: Workload, routes: Routes, how: PrefetchOptions
) -> Iterator[PlannedPrefetcher]:
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


def _prefetching_notes(study: SimulationStudy, how: PrefetchOptions) -> list[str]:
    if set(study.predictors) == {NONE}:
        return []
    return [
        f"Prefetched: {how.experts} experts per prediction; popularity and oracle {_layers(how.horizon)} ahead. "
        "Predictors predict for generated tokens only. Their time was measured on this machine, one prediction after the "
        "other. The shuffled control prefetches what was predicted for other tokens."
    ]


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"
