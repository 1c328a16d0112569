"""The compiled core of the simulation: caches of experts, one transfer engine and one compute engine, in order of time.

Experts are numbered `layer * E + expert`. All times are in seconds. Nothing is allocated per event.

The state of each expert is one record (`Expert`), so that a decision reads one or two cache lines. Passing a tuple of arrays
instead costs ten times the work itself: numba counts references to each array at every call.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import numpy.typing as npt

from speculation.offload.policies import begin_step, demote_oldest, note_next_use, note_use, set_scores, start_expert
from speculation.offload.recompiling import recompile_after
from speculation.offload.simulation.background import begin_reads, begin_transfers, enqueue_fill, enqueue_prediction
from speculation.offload.simulation.host_memory import OUT, Ram
from speculation.offload.simulation.misses import load_missing, serve
from speculation.offload.simulation.records import (
    ALL,
    FILLS,
    PREDICTED,
    READS,
    Clock,
    Count,
    Limits,
    Lines,
    Miss,
    Queues,
    Seconds,
    Tiers,
)
from speculation.offload.state import COMING, MISSED, NEVER, ORDER, PRESENT, WAITING, Experts, Integers, Rule

recompile_after(
    __file__,
    "speculation.offload.policies",
    "speculation.offload.state",
    "speculation.offload.simulation.background",
    "speculation.offload.simulation.eviction",
    "speculation.offload.simulation.host_memory",
    "speculation.offload.simulation.misses",
    "speculation.offload.simulation.records",
)

_COUNTS = len(Count)
# Calls with this many arrays are not inlined by LLVM and cost a sixth of the time: these are inlined by numba.
_inlined = numba.njit(cache=True, nogil=True, inline="always")


@numba.njit(cache=True, nogil=True)
def play(
    experts_N: npt.NDArray[np.int32],
    starts_R: Integers,
    asking_S: Integers,
    is_decode_S: npt.NDArray[np.bool_],
    next_use_N: Integers,
    plan_starts_Q: Integers,
    plan_layers_N: npt.NDArray[np.int32],
    plan_experts_N: npt.NDArray[np.int32],
    plan_scores_N: npt.NDArray[np.float32],
    draft_seconds_S: Seconds,
    layer_seconds_S: Seconds,
    expert_floor_S: Seconds,
    host_floor_S: Seconds,
    predict_seconds: float,
    limits: Limits,
    tiers: Tiers,
    popularity: Integers,
    capacities: Integers,
    scores_SX: npt.NDArray[np.float32],
    experts: Experts,
    ram: Ram,
    queues: Queues,
    lines: Lines,
    clocks: Sequence[Clock],
) -> tuple[Integers, Integers, Seconds, Seconds]:
    """Play all requests.

    Returns the counts `[2, L, len(Count)]` of prompts and generated tokens, and of each step `[S]` the hits, the end and the
    stall.

    Args:
        experts_N, starts_R, is_decode_S: see `Requests`.
        asking_S: predictions that each step makes after each layer.
        next_use_N: for each entry of `experts_N`, the next request that chooses the same expert; `NEVER` if none does.
        plan_starts_Q, plan_layers_N, plan_experts_N, plan_scores_N: see `PrefetchPlan`.
        draft_seconds_S: time before a step's first layer.
        layer_seconds_S: for each layer of a step, time of everything but the experts.
        expert_floor_S: the least time that a layer's experts take on the device.
        host_floor_S: the least time that all of them would take on the host.
        predict_seconds: one prediction; predictions are made one after the other.
        limits, tiers: numbers that stay.
        popularity: ranks of all experts `[L * E]`, the most popular highest.
        capacities: how many experts each cache holds, `[L]`, or `[1]` if there is one for all layers.
        scores_SX: for `Rule.LEARNED`, the reuse score of every expert in each step `[S, L * E]`; else `[1, 0]`.
        experts: all experts' records `[L * E]`, from `expert_records`; changed.
        ram: host memory, from `ram_records`; of no experts if it holds all. Changed.
        queues, lines: room for queued transfers, and what of it is in use (three `LINE` records of zeros); changed.
        clocks: one `CLOCK` record of zeros; changed.
    """
    layers, num_experts = limits.layers, limits.num_experts
    steps = len(layer_seconds_S)
    ends, stalls, hits = np.zeros(steps), np.zeros(steps), np.zeros(steps, dtype=np.int64)
    pools = len(capacities)
    counts = np.zeros((2, layers, _COUNTS), dtype=np.int64)
    # The experts that each cache holds, in no order.
    held = np.zeros(pools, dtype=np.int64)
    slots = np.zeros((pools, min(capacities.max(), layers * num_experts // pools)), dtype=np.int64)
    _fill(popularity, capacities, experts, slots, held, limits.rule)
    clock = clocks[0]
    can_copy = np.isfinite(limits.copy_seconds)
    has_storage = tiers.ram != ALL
    # Else every miss is copied from host memory.
    has_choice = has_storage or tiers.miss != Miss.COPY
    on_host = np.zeros(num_experts, dtype=np.bool_)
    # The latest step whose reuse scores are known, and the one whose scores are being computed.
    scored_step = scoring_step = -1

    for step in range(steps):
        stall = 0.0
        clock.now += draft_seconds_S[step]
        clock.step = step
        clock.kind = 1 if is_decode_S[step] else 0
        begin_step(step, limits.rule, limits.time_constant, experts)
        # A thread of its own scores all experts, from when the step's tokens are known. While it is busy, steps are left out.
        if limits.rule == Rule.LEARNED and clock.scored <= clock.now:
            scored_step, scoring_step = scoring_step, step
            clock.scored = clock.now + layers * limits.score_seconds * asking_S[step]
        for point in range(layers + 1):
            # Point 0 is before the first layer; point l + 1 is layer l.
            layer = point - 1
            clock.layer, clock.request = layer, step * layers + layer
            routed = clock.now
            if layer >= 0:
                clock.now += layer_seconds_S[step]
                routed = clock.now
                if lines[READS].waiting:
                    begin_reads(queues, lines, clock, False, tiers.storage_seconds, limits, experts, counts, ram)
                if lines[PREDICTED].waiting or lines[FILLS].waiting:
                    begin_transfers(
                        queues,
                        lines,
                        clock,
                        clock.computed,
                        False,
                        has_storage,
                        limits,
                        experts,
                        capacities,
                        slots,
                        held,
                        counts,
                        ram,
                    )
                if limits.rule == Rule.LEARNED:
                    if clock.scored <= clock.now:
                        scored_step = scoring_step
                    if scored_step >= 0:
                        # Experts of later layers keep their scores, which include their use by this step.
                        set_scores(scores_SX[scored_step], layer * num_experts, num_experts, experts)
                chosen = experts_N[starts_R[clock.request] : starts_R[clock.request + 1]]
                next_use = next_use_N[starts_R[clock.request] : starts_R[clock.request + 1]]
                misses, found, needed = _look_up(chosen, next_use, has_choice, clock, limits, experts, counts)
                hits[step] += found
                on_device, host_ends = len(chosen), 0.0
                if has_choice and found < len(chosen):
                    host_seconds = max(tiers.host_seconds, host_floor_S[step] / len(chosen))
                    needed, on_device, host_ends = serve(
                        chosen, host_seconds, on_host, clock, limits, tiers, experts, capacities, slots, held, counts, ram
                    )
                elif misses:
                    needed = max(needed, load_missing(chosen, clock, limits, experts, capacities, slots, held, counts))
                pool = 0 if limits.is_global else layer
                for place in range(len(chosen)):
                    x = layer * num_experts + chosen[place]
                    order = (clock.request + 1) * ORDER - 2 * place
                    if note_use(experts[x], clock.request, step, order, limits.rule, limits.time_constant):
                        demote_oldest(slots[pool], held[pool], capacities[pool], experts)
            # Predictions are known with the routing; their transfers come after those that the routing itself needs.
            first, end = plan_starts_Q[step * (layers + 1) + point], plan_starts_Q[step * (layers + 1) + point + 1]
            if can_copy and first < end:
                clock.predictor_ends = max(clock.predictor_ends, routed) + predict_seconds * asking_S[step]
                for entry in range(first, end):
                    at_layer = plan_layers_N[entry] % layers
                    expert = at_layer * num_experts + plan_experts_N[entry]
                    target = step * layers + plan_layers_N[entry]
                    which = READS if has_storage and ram[expert].before == OUT else PREDICTED
                    # What is prefetched from storage is first in host memory, which may have no room.
                    has_slots = capacities[0 if limits.is_global else at_layer] > 0
                    if (
                        not has_slots
                        or (which == READS and not tiers.ram)
                        or not enqueue_prediction(which, expert, target, plan_scores_N[entry], queues, lines, clock, experts)
                    ):
                        counts[clock.kind, at_layer, Count.DROPPED.value] += 1
            if layer >= 0:
                if on_device < len(chosen) and can_copy and capacities[pool]:
                    for place in range(len(chosen)):
                        if on_host[place]:
                            x = layer * num_experts + chosen[place]
                            since = max(clock.now, ram[x].ready) if has_storage else clock.now
                            enqueue_fill(x, since, queues, lines, clock, limits, experts)
                computation = max(on_device * tiers.expert_seconds, expert_floor_S[step] * on_device / len(chosen))
                ready = clock.now
                clock.now = max(needed + computation, host_ends)
                stall += clock.now - ready - computation
                clock.computed = clock.now
                # None of these experts is evicted while they are computed.
                if lines[READS].waiting:
                    begin_reads(queues, lines, clock, True, tiers.storage_seconds, limits, experts, counts, ram)
                if lines[PREDICTED].waiting or lines[FILLS].waiting:
                    begin_transfers(
                        queues, lines, clock, 0.0, True, has_storage, limits, experts, capacities, slots, held, counts, ram
                    )
        ends[step] = clock.now
        stalls[step] = stall
    for which in (PREDICTED, READS):
        for place in range(lines[which].waiting):
            queued = queues[which, (lines[which].head + place) % queues.shape[1]]
            if experts[queued.expert].where == WAITING and experts[queued.expert].waits_for == queued.request:
                counts[clock.kind, queued.expert // num_experts, Count.DROPPED.value] += 1
    for x in range(len(experts)):
        if experts[x].is_unused_prefetch:
            counts[clock.kind, x // num_experts, Count.WASTED.value] += 1
    return counts, hits, ends, stalls


@numba.njit(cache=True, nogil=True)
def _fill(popularity: Integers, capacities: Integers, experts: Experts, slots: Integers, held: Integers, rule: int) -> None:
    """Begin with the most popular experts of each pool, the least popular as if used longest ago."""
    size = len(experts) // len(held)
    for pool in range(len(held)):
        order = np.argsort(-popularity[pool * size : (pool + 1) * size], kind="mergesort")
        for rank in range(size):
            x = pool * size + order[rank]
            is_held = rank < min(capacities[pool], slots.shape[1])
            # Experts that are not cached have no use before the first one.
            start_expert(experts[x], -1 - rank if is_held else 0, popularity[x], rule)
            if is_held:
                experts[x].where = PRESENT
                slots[pool, rank] = x
                held[pool] += 1


@_inlined
def _look_up(
    chosen: npt.NDArray[np.int32],
    next_use: Integers,
    has_choice: bool,
    clock: Clock,
    limits: Limits,
    experts: Experts,
    counts: Integers,
) -> tuple[int, int, float]:
    """Look the experts of a request up in the cache; return how many missed, how many hit, and when the others have arrived.

    has_choice: those that are still in transfer may be computed on the host instead.
    """
    layer, request = clock.layer, clock.request
    needed = clock.now
    late = misses = 0
    for place in range(len(chosen)):
        expert = experts[layer * limits.num_experts + chosen[place]]
        expert.chosen_by = request
        note_next_use(expert, next_use[place], limits.rule)
        if expert.where == PRESENT or expert.where == COMING:
            if expert.where == COMING and expert.arrival > clock.now:
                late += 1
                needed = max(needed, expert.arrival)
                if has_choice:
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
    counts[clock.kind, layer, Count.REQUESTED.value] += len(chosen)
    counts[clock.kind, layer, Count.HIT.value] += len(chosen) - late - misses
    counts[clock.kind, layer, Count.LATE.value] += late
    counts[clock.kind, layer, Count.MISS.value] += misses
    return misses, len(chosen) - late - misses, needed


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
