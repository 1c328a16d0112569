"""Curves, working sets and slots of a trace: what `specmoe curve` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from analysis.documents.curves import CacheCurves, HitRateCurve, SlotHitRates, SlotsRow, WorkingSetRow
from profiler.errors import EmptyPartError, UsageError, counted
from profiler.trace.reader import Trace
from speculation.data.routes import Routes, load_routes, route_digests
from speculation.data.tasks import Shape, Task
from speculation.offload.curves.hit_curves import HitCurves, knee, lru_curves, sampled_sizes
from speculation.offload.curves.slots import best_slots, even_slots, hits_of
from speculation.offload.curves.working_sets import WorkingSets, step_sets, window_sets
from speculation.offload.requests import requests_of
from speculation.offload.simulation.records import Count
from speculation.offload.simulation.simulate import Setting, Workload, capacities, simulate
from speculation.offload.state import Rule
from speculation.predictors.features import expert_frequency

LRU, BELADY = Rule.LRU.label, Rule.BELADY.label
# Windows and batches whose working sets are counted.
WINDOWS = (1, 8, 64, 512)
BATCHES = (4, 16, 64)
# The window that the summary names.
_SUMMARY_WINDOW = 64
_PERCENT = 90


@dataclass(frozen=True, kw_only=True)
class CurveStudy:
    """What to compute. The fields are the options of `specmoe curve`.

    Attributes:
        trace: The trace whose requests are counted.
        part: Part of the split by problem: `test`, `validation`, `train` or `all`.
        training: Another trace, from all of which popularity and slots come, except from problems of `trace`. Default: the
            training part of `trace`.
        policies: LRU is computed in any case, at every size. Other policies are simulated, at about 14 sizes.
        fractions: Numbers of slots to divide among layers, as shares of all experts.
        windows: Numbers of consecutive tokens whose distinct experts are counted (working sets).
        batches: Numbers of sequences whose distinct experts in one step are counted.
        batch: Sequences that are decoded at the same time.
    """

    trace: Trace
    part: str
    training: Trace | None = None
    policies: tuple[Rule, ...] = (Rule.BELADY,)
    fractions: tuple[float, ...] = ()
    windows: tuple[int, ...] = WINDOWS
    batches: tuple[int, ...] = BATCHES
    batch: int = 1


def run_curves(study: CurveStudy, on_done: Callable[[int, int], None] = lambda done, total: None) -> CacheCurves:
    """Compute the curves of one part of a trace, its working sets, and slots for each layer.

    Args:
        study: What to compute.
        on_done: Called with the number of finished simulations, and of all, after each one.

    Returns:
        The curves, with hits by the number of slots; working sets in experts of a layer; and slots for each layer.

    Raises:
        SpecmoeError: The part has no problems, the traces are of different models, or a number is out of range.

    Example:
        >>> from profiler import Trace
        >>> from speculation import CurveStudy, run_curves
        >>> curves = run_curves(CurveStudy(trace=Trace.open("traces/math"), part="test", fractions=(0.25,)))
        >>> for curve in curves.curves:
        ...     print(curve.policy, curve.knee)
    """
    for name, values in (("window", study.windows), ("batch", (*study.batches, study.batch))):
        if min(values, default=1) < 1:
            raise UsageError(f"{name} of {min(values)} tokens: expected at least 1")
    facts = study.trace.metadata.model
    shape = Shape.of(facts, 1, Task.NEXT_TOKEN)
    notes: list[str] = []
    routes = _all_generated_if_unknown(load_routes(study.trace, study.part), notes)
    training = _training_routes(study, shape, routes, notes)
    popularity_LE = expert_frequency(routes if training is None else training, shape)
    workload = Workload(requests_of(routes, shape.experts, batch=study.batch), popularity_LE)
    # Checked before anything long begins.
    totals = [each * shape.layers for each in dict.fromkeys(capacities(workload, list(study.fractions), [], None, False))]
    own, shared = lru_curves(workload), lru_curves(workload, is_global=True)
    policies = [rule for rule in dict.fromkeys(study.policies) if rule != Rule.LRU]
    curves = [_exact(own), _exact(shared), *_sampled(workload, policies, on_done)]
    working_sets = _working_sets(study, routes, shape, notes)
    slots = [] if training is None else _slots(workload, training, study.batch, (own, shared), totals)
    decode_tokens = int(routes.is_decode_T.sum())
    caches = "Caches start with the experts most popular in " + (
        "these problems themselves" if training is None else f"{counted(len(training.problem_ids), 'training problem')}"
    )
    notes += [
        f"{counted(len(routes.problem_ids), 'problem')}, {decode_tokens:,} generated and {len(routes) - decode_tokens:,} "
        "prompt tokens "
        f"({study.part} part); {study.batch} at a time. Only hits of generated tokens are counted. {caches}.",
        *study.trace.caveats(),
    ]
    return CacheCurves(
        trace=study.trace.path.name,
        model=facts.id,
        moe_layers=facts.moe_layers,
        num_experts=shape.experts,
        top_k=shape.top_k,
        part=study.part,
        problems=len(routes.problem_ids),
        tokens=len(routes),
        decode_tokens=decode_tokens,
        batch=study.batch,
        training_problems=None if training is None else len(training.problem_ids),
        summary=summary_of(curves, working_sets, slots, shape.experts),
        notes=notes,
        curves=curves,
        working_sets=working_sets,
        slots=slots,
    )


def summary_of(
    curves: Sequence[HitRateCurve], working_sets: Sequence[WorkingSetRow], slots: Sequence[SlotsRow], num_experts: int
) -> list[str]:
    """State the main results: a quarter of the experts cached, the knee, working sets, Belady's policy, slots."""
    by_policy = {curve.policy: curve for curve in curves if not curve.is_global}
    lru, belady = by_policy[LRU], by_policy.get(BELADY)
    size = max(1, num_experts // 4)
    first = (
        f"lru: {size} of {num_experts} experts per layer hit {lru.hit_rate(size):.3f}; the knee is at {lru.knee} "
        f"({lru.hit_rate(lru.knee):.3f})"
    )
    for row in working_sets:
        if not row.is_batch and row.tokens == _SUMMARY_WINDOW:
            first += f"; {row.tokens} tokens use {row.mean:.1f} experts of a layer on average (90 %: {row.percentile_90})"
    found = [f"{first}."]
    if belady is not None:
        size = min(belady.sizes, key=lambda other: abs(other - size))
        rate = belady.hit_rate(size)
        needed = next(each for each, own in zip(lru.sizes, lru.hit_rates, strict=True) if own >= rate)
        found.append(f"belady, which knows the future: {size} per layer hit {rate:.3f}, for which lru needs {needed}.")
    steps = [row for row in working_sets if row.is_batch]
    if steps:
        tokens, means, percentiles = (
            ", ".join(each)
            for each in zip(*((str(r.tokens), f"{r.mean:.1f}", str(r.percentile_90)) for r in steps), strict=True)
        )
        found.append(
            f"A step that decodes {tokens} sequences requests {means} experts of a layer on average (90 %: {percentiles})."
        )
    for each in slots:
        even, by_curves, shared = each.evaluated.even, each.evaluated.by_curves, each.evaluated.shared
        found.append(
            f"{counted(each.slots, 'slot')} ({each.share:.0%}): {even:.3f} if every layer has the same, {by_curves:.3f} if "
            "divided by the "
            f"curves of training, {shared:.3f} in one cache for all layers."
        )
    return found


def _all_generated_if_unknown(routes: Routes, notes: list[str]) -> Routes:
    if routes.is_decode_T.any():
        return routes
    notes.append("The trace does not say which tokens were generated: all count as if they were.")
    return replace(routes, is_decode_T=np.ones(len(routes), dtype=np.bool_))


def _training_routes(study: CurveStudy, shape: Shape, routes: Routes, notes: list[str]) -> Routes | None:
    """The routes that popularity and slots come from; None if the trace has no training part."""
    if study.training is not None:
        shape.check(study.training.metadata, study.training.path, study.trace.path)
        without = route_digests(study.trace, routes)
        return _all_generated_if_unknown(load_routes(study.training, "all", without=without), notes)
    try:
        training = load_routes(study.trace, "train")
    except EmptyPartError:
        notes.append(
            "NOT held out: popularity is that of these problems themselves, and no slots are divided, because the trace has no "
            "training part."
        )
        return None
    if study.part in {"train", "all"}:
        notes.append("NOT held out: popularity and slots come from problems that are also evaluated.")
    return _all_generated_if_unknown(training, notes)


def _exact(found: HitCurves) -> HitRateCurve:
    return HitRateCurve(
        policy=LRU,
        is_global=found.is_global,
        is_exact=True,
        sizes=list(range(len(found.hits_C))),
        hits=found.hits_C.tolist(),
        requested=int(found.requested_L.sum()),
        hits_by_layer=[] if found.is_global else found.hits_LC.tolist(),
        requested_by_layer=[] if found.is_global else found.requested_L.tolist(),
        knee=knee(range(len(found.hits_C)), found.hits_C),
    )


def _sampled(workload: Workload, policies: Sequence[Rule], on_done: Callable[[int, int], None]) -> list[HitRateCurve]:
    """Simulate caches of some sizes for each layer, on all cores."""
    sizes = sampled_sizes(workload.requests.num_experts)
    settings = [Setting(rule, size) for rule in policies for size in sizes]
    # Cached properties: computed once here, instead of by every thread.
    _ = workload.ahead, workload.popularity
    results = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) as threads:
        for result in threads.map(lambda setting: simulate(workload, setting), settings):
            results.append(result)
            on_done(len(results), len(settings))
    curves = []
    for number, rule in enumerate(policies):
        own = results[number * len(sizes) : (number + 1) * len(sizes)]
        hits_LC = np.stack([result.counts_LC[:, Count.HIT] for result in own], axis=1)
        requested_L = own[0].counts_LC[:, Count.REQUESTED]
        curve = HitRateCurve(
            policy=rule.label,
            is_global=False,
            is_exact=False,
            sizes=sizes,
            hits=hits_LC.sum(0).tolist(),
            requested=int(requested_L.sum()),
            hits_by_layer=hits_LC.tolist(),
            requested_by_layer=requested_L.tolist(),
            knee=knee(sizes, hits_LC.sum(0)),
        )
        curves.append(curve)
    return curves


def _working_sets(study: CurveStudy, routes: Routes, shape: Shape, notes: list[str]) -> list[WorkingSetRow]:
    rows = [
        _working_set(window_sets(routes, shape.experts, tokens), tokens, False) for tokens in dict.fromkeys(study.windows)
    ] + [
        _working_set(step_sets(requests_of(routes, shape.experts, batch=batch), batch), batch, True)
        for batch in dict.fromkeys(study.batches)
    ]
    notes.extend(
        f"No step decodes {counted(row.tokens, 'sequence')}: there is no working set of such steps."
        if row.is_batch
        else f"No problem has {row.tokens} consecutive generated tokens: there is no working set of so many."
        for row in rows
        if row.count == 0
    )
    return [row for row in rows if row.count]


def _working_set(sets: WorkingSets, tokens: int, is_batch: bool) -> WorkingSetRow:
    return WorkingSetRow(
        is_batch=is_batch,
        tokens=tokens,
        count=sets.windows,
        mean=float(sets.mean_L.mean()),
        percentile_90=sets.percentile(_PERCENT),
        mean_by_layer=sets.mean_L.tolist(),
        percentile_90_by_layer=sets.percentile_L(_PERCENT).tolist(),
    )


def _slots(
    workload: Workload, training: Routes, batch: int, evaluated: tuple[HitCurves, HitCurves], totals: list[int]
) -> list[SlotsRow]:
    """Divide each of these numbers of slots by the curves of the training problems. evaluated: per layer, and shared."""
    requests = workload.requests
    trained = Workload(requests_of(training, requests.num_experts, batch=batch), workload.popularity_LE)
    both = lru_curves(trained), lru_curves(trained, is_global=True)
    rows = []
    for total in totals:
        slots_L = best_slots(both[0].hits_LC, total)
        even_L = even_slots(requests.layers, total)
        rates = [
            SlotHitRates(
                even=hits_of(own.hits_LC, even_L) / max(1, int(own.requested_L.sum())),
                by_curves=hits_of(own.hits_LC, slots_L) / max(1, int(own.requested_L.sum())),
                shared=float(shared.hit_rate_C[total]),
            )
            for own, shared in (both, evaluated)
        ]
        share = total / (requests.layers * requests.num_experts)
        rows.append(SlotsRow(share=share, slots=total, by_layer=slots_L.tolist(), training=rates[0], evaluated=rates[1]))
    return rows
