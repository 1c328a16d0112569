"""The compiled core of the simulation: caches of experts, one transfer engine and one compute engine, in order of time.

Experts are numbered `layer * E + expert`. All times are in seconds. Nothing is allocated per event.

What a simulation does not use costs it nothing: numba compiles a version for each combination of argument types, and leaves
out branches on an argument that is None. So there are three versions: without predictions, with them, and with a host or
storage. Functions of the loop are inlined by LLVM (`forceinline`): a call copies seven words for each array. If numba inlined
them instead, it would count references to each array at every call.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import numpy.typing as npt

from analysis.documents.token_results import DEMAND, HIT, LATE
from speculation.offload.eviction_policies import begin_step, demote_oldest, note_next_use, note_use, set_scores
from speculation.offload.numba_recompiling import recompile_after
from speculation.offload.plans import PrefetchPlan
from speculation.offload.simulation.background import begin_reads, begin_transfers, enqueue_fill, enqueue_prediction
from speculation.offload.simulation.host_memory import OUT, Ram
from speculation.offload.simulation.misses import compute_on_arrival, load_missing, serve_misses
from speculation.offload.simulation.occupancy import IN_USE, fill, note_key, note_keys
from speculation.offload.simulation.records import (
    ALL,
    PREDICTED,
    READS,
    Clock,
    Count,
    Limits,
    Line,
    Lines,
    Pool,
    Pools,
    Queues,
    StepInputs,
    StepResults,
    Tiers,
)
from speculation.offload.state import COMING, MISSED, NEVER, ORDER, PRESENT, WAITING, Experts, Integers, Rule

recompile_after(
    __file__,
    "analysis.documents.token_results",
    "speculation.offload.eviction_policies",
    "speculation.offload.state",
    "speculation.offload.simulation.background",
    "speculation.offload.simulation.host_memory",
    "speculation.offload.simulation.misses",
    "speculation.offload.simulation.occupancy",
    "speculation.offload.simulation.records",
)

_inlined = numba.njit(cache=True, nogil=True, forceinline=True)


@numba.njit(cache=True, nogil=True)
def play(
    experts_N: npt.NDArray[np.int32],
    starts_R: Integers,
    next_use_N: Integers,
    steps: StepInputs,
    plan: PrefetchPlan | None,
    scores_SX: npt.NDArray[np.float32],
    limits: Limits,
    tiers: Tiers | None,
    popularity: Integers,
    most_popular: Integers,
    experts: Experts,
    slots: Integers,
    keys: Integers,
    pools: Pools,
    ram: Ram,
    on_host: npt.NDArray[np.bool_],
    queues: Queues,
    lines: Lines,
    clocks: Sequence[Clock],
    counts: Integers,
    found: StepResults,
) -> None:
    """Play all requests.

    Args:
        experts_N, starts_R: See `Requests`.
        next_use_N: For each entry of `experts_N`, the next request that chooses the same expert; `NEVER` if none does.
        steps: What is given of each step.
        plan: What is prefetched; None for nothing.
        scores_SX: For `Rule.LEARNED`, the reuse score of every expert in each step `[S, L * E]`; else of no step.
        limits, tiers: Numbers that stay. tiers: None if all misses are copied from host memory. Else there must be a plan.
        popularity: Ranks of all experts `[L * E]`, the most popular highest.
        most_popular: The experts that each cache can hold, the most popular first, `[pools, size]`.
        experts: All experts' records `[L * E]`, from `expert_records`; changed.
        slots, keys: Room for the expert and the key of each slot, see `occupancy`; changed.
        pools: A `POOL` record of each cache, `[L]`, or `[1]` if there is one for all layers; changed.
        ram: Host memory, from `ram_records`; of no experts if it holds all. Changed.
        on_host: Room for a request, `[E]`.
        queues, lines: Room for queued transfers, and what of it is in use (three `LINE` records); changed.
        clocks: One `CLOCK` record of zeros; changed.
        counts: Zeros `[2, L, len(Count)]`; changed to the counts of prompts and of generated tokens.
        found: Room for what is found of each step.
    """
    layers, num_experts = limits.layers, limits.num_experts
    can_copy = np.isfinite(limits.copy_seconds)
    outcomes_N = found.outcomes
    clock = clocks[0]
    if plan is not None:
        # Here, because numba counts a reference whenever an array is taken out of a tuple.
        plan_starts_Q, plan_layers_N, plan_experts_N, plan_scores_N = plan
    fill(popularity, most_popular, limits.rule, experts, slots, keys, pools)
    # The latest step whose reuse scores are known, and the one whose scores are being computed.
    scored_step = scoring_step = -1

    for step in range(len(steps.is_decode)):
        stall, hits = 0.0, 0
        layer_seconds, expert_floor, host_floor = steps.layer_seconds[step], steps.expert_floor[step], steps.host_floor[step]
        asking = steps.asking[step]
        clock.now += steps.draft_seconds[step]
        clock.step = step
        clock.kind = 1 if steps.is_decode[step] else 0
        if begin_step(step, limits.rule, limits.time_constant, experts):
            for number in range(len(pools)):
                note_keys(pools[number], experts, slots, keys)
        # A thread of its own scores all experts, from when the step's tokens are known. While it is busy, steps are left out.
        if limits.rule == Rule.LEARNED and clock.scored <= clock.now:
            scored_step, scoring_step = scoring_step, step
            clock.scored = clock.now + layers * limits.score_seconds * asking
        for point in range(layers + 1):
            # Point 0 is before the first layer; point l + 1 is layer l.
            layer = point - 1
            clock.layer, clock.request = layer, step * layers + layer
            routed = clock.now
            if layer >= 0:
                clock.now += layer_seconds
                routed = clock.now
                pool = pools[0 if limits.is_global else layer]
                if tiers is not None and lines[READS].waiting:
                    begin_reads(clock.request, queues, lines, clock, limits, tiers, experts, counts, ram)
                if plan is not None:
                    begin_transfers(
                        clock.computed,
                        clock.request,
                        queues,
                        lines,
                        clock,
                        limits,
                        tiers,
                        experts,
                        slots,
                        keys,
                        pools,
                        counts,
                        ram,
                    )
                if limits.rule == Rule.LEARNED:
                    if clock.scored <= clock.now:
                        scored_step = scoring_step
                    if scored_step >= 0:
                        # Experts of later layers keep their scores, which include their use by this step.
                        set_scores(scores_SX[scored_step], layer * num_experts, num_experts, experts)
                        note_keys(pool, experts, slots, keys)
                start, size = starts_R[clock.request], starts_R[clock.request + 1] - starts_R[clock.request]
                misses, late, needed = _look_up(
                    start, size, experts_N, next_use_N, plan, tiers, clock, limits, experts, keys, counts, outcomes_N
                )
                hits += size - misses - late
                on_device, host_ends = size, 0.0
                if tiers is not None:
                    if misses or late:
                        host_seconds = max(tiers.host_seconds, host_floor / size)
                        needed, on_device, host_ends = serve_misses(
                            start,
                            size,
                            experts_N,
                            host_seconds,
                            on_host,
                            clock,
                            limits,
                            tiers,
                            pool,
                            experts,
                            slots,
                            keys,
                            counts,
                            ram,
                        )
                elif misses:
                    loaded = load_missing(start, size, experts_N, clock, limits, pool, experts, slots, keys, counts)
                    needed = max(needed, loaded)
                _note_uses(start, size, experts_N, clock, limits, pool, experts, slots, keys)
            # Predictions are known with the routing; their transfers come after those that the routing itself needs.
            if plan is not None:
                first, end = plan_starts_Q[step * (layers + 1) + point], plan_starts_Q[step * (layers + 1) + point + 1]
                if can_copy and first < end:
                    clock.predictor_ends = max(clock.predictor_ends, routed) + limits.predict_seconds * asking
                    for entry in range(first, end):
                        at_layer, target = plan_layers_N[entry], step * layers + plan_layers_N[entry]
                        if at_layer >= layers:
                            at_layer -= layers
                        x = at_layer * num_experts + plan_experts_N[entry]
                        line = lines[PREDICTED]
                        # What is prefetched from storage is first in host memory. Either may have no room.
                        has_room = pools[0 if limits.is_global else at_layer].capacity > 0
                        if tiers is not None and tiers.ram != ALL and ram[x].before == OUT:
                            line = lines[READS]
                            has_room = has_room and tiers.ram > 0
                        if not has_room or not enqueue_prediction(
                            x, target, plan_scores_N[entry], experts[x], queues, line, clock
                        ):
                            counts[clock.kind, at_layer, Count.DROPPED.value] += 1
            if layer >= 0:
                if tiers is not None and on_device < size and can_copy and pool.capacity:
                    for place in range(size):
                        if on_host[place]:
                            x = layer * num_experts + experts_N[start + place]
                            since = max(clock.now, ram[x].ready) if tiers.ram != ALL else clock.now
                            enqueue_fill(x, since, queues, lines, clock, limits, experts)
                computation = max(on_device * limits.expert_seconds, expert_floor * on_device / size)
                ready = clock.now
                if tiers is None and limits.computes_on_arrival:
                    clock.now = compute_on_arrival(start, size, experts_N, computation / size, clock, limits, experts)
                else:
                    clock.now = max(needed + computation, host_ends)
                stall += clock.now - ready - computation
                clock.computed = clock.now
                # None of these experts is evicted while they are computed.
                if tiers is not None and lines[READS].waiting:
                    begin_reads(clock.request + 1, queues, lines, clock, limits, tiers, experts, counts, ram)
                if plan is not None:
                    begin_transfers(
                        0.0,
                        clock.request + 1,
                        queues,
                        lines,
                        clock,
                        limits,
                        tiers,
                        experts,
                        slots,
                        keys,
                        pools,
                        counts,
                        ram,
                    )
                for at in range(start, start + size):
                    note_key(experts[layer * num_experts + experts_N[at]], keys)
        found.hits[step] = hits
        found.ends[step] = clock.now
        found.stalls[step] = stall
    if plan is not None:
        _count_dropped(queues, lines[PREDICTED], clock, limits, experts, counts)
        _count_dropped(queues, lines[READS], clock, limits, experts, counts)
        for x in range(len(experts)):
            if experts[x].is_unused_prefetch:
                counts[clock.kind, x // num_experts, Count.WASTED.value] += 1


@_inlined
def _look_up(
    start: int,
    size: int,
    experts_N: npt.NDArray[np.int32],
    next_use_N: Integers,
    plan: PrefetchPlan | None,
    tiers: Tiers | None,
    clock: Clock,
    limits: Limits,
    experts: Experts,
    keys: Integers,
    counts: Integers,
    outcomes_N: npt.NDArray[np.uint8],
) -> tuple[int, int, float]:
    """Look the experts of a request up in the cache.

    Returns how many missed, how many are still in transfer, and when these have arrived. With tiers, those may be computed on
    the host instead. Without a plan, none is in transfer.
    """
    layer, request = clock.layer, clock.request
    needed = clock.now
    late = misses = 0
    for at in range(start, start + size):
        expert = experts[layer * limits.num_experts + experts_N[at]]
        expert.chosen_by = request
        outcome = HIT
        if limits.rule == Rule.BELADY:
            note_next_use(expert, next_use_N[at], limits.rule)
        if expert.slot >= 0:
            keys[expert.slot] = IN_USE
            if plan is not None:
                if expert.where == COMING and expert.arrival > clock.now:
                    late += 1
                    needed = max(needed, expert.arrival)
                    outcome = LATE
                    if tiers is not None:
                        if len(outcomes_N):
                            outcomes_N[at] = outcome
                        continue
                # It is not evicted before its layer is done: it does not matter that it may still be in transfer.
                expert.where = PRESENT
                if expert.is_unused_prefetch:
                    expert.is_unused_prefetch = False
                    counts[clock.kind, layer, Count.USEFUL.value] += 1
        else:
            misses += 1
            if expert.evicted_in == clock.step:
                counts[clock.kind, layer, Count.COLLISION.value] += 1
            expert.where = MISSED
            outcome = DEMAND
        if len(outcomes_N):
            outcomes_N[at] = outcome
    counts[clock.kind, layer, Count.REQUESTED.value] += size
    counts[clock.kind, layer, Count.HIT.value] += size - late - misses
    counts[clock.kind, layer, Count.LATE.value] += late
    counts[clock.kind, layer, Count.MISS.value] += misses
    return misses, late, needed


@_inlined
def _note_uses(
    start: int,
    size: int,
    experts_N: npt.NDArray[np.int32],
    clock: Clock,
    limits: Limits,
    pool: Pool,
    experts: Experts,
    slots: Integers,
    keys: Integers,
) -> None:
    """Note that the experts of a request are used, the first of them most recently."""
    for place in range(size):
        expert = experts[clock.layer * limits.num_experts + experts_N[start + place]]
        order = (clock.request + 1) * ORDER - 2 * place
        if note_use(expert, clock.request, clock.step, order, limits.rule, limits.time_constant):
            held = slots[pool.first : pool.first + pool.held]
            demoted = demote_oldest(held, pool.held, pool.capacity, experts)
            if demoted >= 0 and experts[demoted].chosen_by != clock.request:
                note_key(experts[demoted], keys)


@numba.njit(cache=True, nogil=True)
def _count_dropped(queues: Queues, line: Line, clock: Clock, limits: Limits, experts: Experts, counts: Integers) -> None:
    """Count predictions that still wait at the end."""
    for place in range(line.waiting):
        queued = queues[line.start + (line.head + place) % line.size]
        if experts[queued.expert].where == WAITING and experts[queued.expert].waits_for == queued.request:
            counts[clock.kind, queued.expert // limits.num_experts, Count.DROPPED.value] += 1


@numba.njit(cache=True, nogil=True)
def uses_ahead(experts: npt.NDArray[np.int32], starts: Integers, layers: int, num_experts: int) -> tuple[Integers, Integers]:
    """The next request that chooses the same expert: for each entry `[N]`, and for each numbered expert from the start."""
    upcoming = np.full(layers * num_experts, NEVER, dtype=np.int64)
    found = np.empty(len(experts), dtype=np.int64)
    for request in range(len(starts) - 2, -1, -1):
        for place in range(starts[request], starts[request + 1]):
            x = (request % layers) * num_experts + experts[place]
            found[place] = upcoming[x]
        for place in range(starts[request], starts[request + 1]):
            upcoming[(request % layers) * num_experts + experts[place]] = request
    return found, upcoming
