"""Transfers that no layer waits for yet: predicted experts, and experts that the host computed. Compiled.

Predictions and fills wait in two rings for the interconnect, and predicted experts that are on storage only in a third one for
their read. A demand load does not wait for what is queued, but for the transfer in progress.
"""

from __future__ import annotations

import numba

from speculation.offload.eviction_policies import note_load, worth
from speculation.offload.numba_recompiling import recompile_after
from speculation.offload.simulation.host_memory import OUT, Ram, admit, touch
from speculation.offload.simulation.occupancy import IN_USE, occupy, slot_to_vacate, vacate
from speculation.offload.simulation.records import (
    ALL,
    FILLS,
    PREDICTED,
    READS,
    Clock,
    Count,
    Limits,
    Line,
    Lines,
    Pools,
    QueuedPrefetch,
    Queues,
    Tiers,
)
from speculation.offload.state import ABSENT, COMING, FILLING, ORDER, WAITING, Expert, Experts, Integers, Rule

recompile_after(
    __file__,
    "speculation.offload.eviction_policies",
    "speculation.offload.state",
    "speculation.offload.simulation.host_memory",
    "speculation.offload.simulation.occupancy",
    "speculation.offload.simulation.records",
)


@numba.njit(cache=True, nogil=True, forceinline=True)
def enqueue_prediction(x: int, request: int, score: float, expert: Expert, queues: Queues, line: Line, clock: Clock) -> bool:
    """Queue an expert that is predicted for a request with a probability (score); return False if there is no room.

    line: that of `READS` if the expert is on storage only, else that of `PREDICTED`.
    """
    expert.predicted_for = max(expert.predicted_for, request)
    if expert.where != ABSENT and expert.where != FILLING:
        return True
    if not _append(x, request, clock.predictor_ends, score, queues, line):
        return False
    expert.where = WAITING
    expert.waits_for = request
    return True


@numba.njit(cache=True, nogil=True)
def enqueue_fill(x: int, since: float, queues: Queues, lines: Lines, clock: Clock, limits: Limits, experts: Experts) -> None:
    """Queue a copy of an expert that the host computes, if there is room. It expires when its layer comes again.

    since: when host memory has it.
    """
    expert = experts[x]
    expires = clock.request + limits.layers
    if expert.where == ABSENT and _append(x, expires, since, 1.0, queues, lines[FILLS]):
        expert.where = FILLING
        expert.waits_for = expires


@numba.njit(cache=True, nogil=True, forceinline=True)
def _append(x: int, request: int, time: float, score: float, queues: Queues, line: Line) -> bool:
    if line.waiting == line.size:
        return False
    place = line.head + line.waiting
    entry = queues[line.start + (place if place < line.size else place - line.size)]
    entry.expert, entry.request, entry.time, entry.score = x, request, time, score
    line.waiting += 1
    return True


@numba.njit(cache=True, nogil=True, forceinline=True)
def _remove_first(line: Line) -> None:
    line.head = line.head + 1 if line.head + 1 < line.size else 0
    line.waiting -= 1


@numba.njit(cache=True, nogil=True, forceinline=True)
def begin_transfers(
    since: float,
    soon: int,
    queues: Queues,
    lines: Lines,
    clock: Clock,
    limits: Limits,
    tiers: Tiers | None,
    experts: Experts,
    slots: Integers,
    keys: Integers,
    pools: Pools,
    counts: Integers,
    ram: Ram,
) -> None:
    """Begin the queued transfers that the interconnect can begin from `since` to now: predictions first, then fills.

    soon: the first request that has not looked its experts up yet. If that is the next one, the current one's experts are in
    the cache and in use, so an expert that finds no room waits for them. Else it is dropped.
    """
    request = clock.request
    is_served = soon > request
    predicted, fills = lines[PREDICTED], lines[FILLS]
    while clock.transfers_end <= clock.now and (predicted.waiting or fills.waiting):
        is_fill, begin = False, 0.0
        if predicted.waiting:
            begin = _begin_of(queues[predicted.start + predicted.head], since, clock)
        if tiers is not None and fills.waiting:
            other = _begin_of(queues[fills.start + fills.head], since, clock)
            if not predicted.waiting or other < begin:
                is_fill, begin = True, other
        line = fills if is_fill else predicted
        entry = queues[line.start + line.head]
        x, target, score = entry.expert, entry.request, entry.score
        expert = experts[x]
        # It was demand-loaded since, and perhaps waits again farther behind.
        is_stale = expert.where != (FILLING if is_fill else WAITING) or expert.waits_for != target
        if not is_stale and begin > clock.now:
            break
        at_layer = x // limits.num_experts
        pool = pools[0 if limits.is_global else at_layer]
        slot = pool.first + pool.held
        is_full = pool.held >= pool.capacity
        if not is_stale and target >= soon and is_full:
            slot = slot_to_vacate(pool, request, soon, begin, True, limits, experts, slots, keys)
            if slot < 0 and is_served:
                break
            if slot >= 0 and is_fill:
                if not _is_worth_more(x, slots[slot], soon, request, limits, experts):
                    slot = -1
            elif slot >= 0 and limits.rule == Rule.LEARNED and experts[slots[slot]].key > score:
                # One score decides what to keep and what to fetch: what is worth more than the prediction stays.
                slot = -1
        _remove_first(line)
        if is_stale:
            continue
        is_out = False
        if tiers is not None:
            is_out = tiers.ram != ALL and ram[x].before == OUT
            if is_out and not is_fill and target >= soon and _append(x, target, entry.time, score, queues, lines[READS]):
                # Host memory has evicted it while it waited.
                continue
        if target < soon or slot < 0 or is_out:
            expert.where = ABSENT
            if not is_fill:
                counts[clock.kind, at_layer, Count.DROPPED.value] += 1
            continue
        if is_full:
            vacate(slots[slot], clock, limits, experts, counts)
        else:
            pool.held += 1
        if tiers is not None and tiers.ram != ALL:
            touch(x, ram)
        clock.transfers_end = begin + limits.copy_seconds
        expert.arrival = clock.transfers_end
        expert.where = COMING
        counts[clock.kind, at_layer, Count.LOADS.value] += 1
        if is_fill:
            # It counts as used when it was, not when it is copied.
            note_load(expert, request, soon * ORDER + 1, limits.rule)
            expert.loaded_in = -1
            counts[clock.kind, at_layer, Count.FILLED.value] += 1
        else:
            expert.is_unused_prefetch = True
            note_load(expert, -1, target * ORDER + 1, limits.rule)
            counts[clock.kind, at_layer, Count.PREFETCHED.value] += 1
        occupy(slot, x, expert, slots, keys)
        if expert.chosen_by == request:
            keys[slot] = IN_USE


@numba.njit(cache=True, nogil=True, forceinline=True)
def _begin_of(entry: QueuedPrefetch, since: float, clock: Clock) -> float:
    """When the transfer of an expert can begin."""
    return max(clock.transfers_end, entry.time, since)


@numba.njit(cache=True, nogil=True)
def _is_worth_more(x: int, other: int, soon: int, request: int, limits: Limits, experts: Experts) -> bool:
    """Whether the policy would evict the other expert rather than x, if x was loaded now."""
    expert, its = experts[x], worth(experts[other], request, limits.rule, limits.layers)
    if limits.rule == Rule.FIFO or limits.rule == Rule.LEAST_STALE or limits.rule == Rule.SLRU:
        # These rank by the load. The key of an expert that is not cached does not matter.
        expert.key = soon * ORDER + 1
        return bool(worth(expert, request, limits.rule, limits.layers) >= its)
    mine = worth(expert, request, limits.rule, limits.layers)
    return bool(mine > its or (mine == its and expert.last_use > experts[other].last_use))


@numba.njit(cache=True, nogil=True)
def begin_reads(
    soon: int,
    queues: Queues,
    lines: Lines,
    clock: Clock,
    limits: Limits,
    tiers: Tiers,
    experts: Experts,
    counts: Integers,
    ram: Ram,
) -> None:
    """End and begin the reads of predicted experts that storage can until now; what was read waits for the interconnect.

    soon: the first request that has not looked its experts up yet.
    """
    line = lines[READS]
    while line.waiting:
        entry = queues[line.start + line.head]
        x, target = entry.expert, entry.request
        expert = experts[x]
        is_stale = expert.where != WAITING or expert.waits_for != target
        there = entry.time
        if clock.is_reading:
            if clock.read_ends > clock.now:
                break
            clock.is_reading = False
            there = clock.read_ends
        elif not is_stale and target >= soon and ram[x].before == OUT:
            begin = max(clock.reads_end, entry.time)
            if begin > clock.now:
                break
            clock.reads_end = clock.read_ends = begin + tiers.storage_seconds
            clock.is_reading = True
            admit(x, clock.reads_end, ram)
            counts[clock.kind, x // limits.num_experts, Count.READS.value] += 1
            continue
        _remove_first(line)
        if not is_stale and (target < soon or not _append(x, target, there, entry.score, queues, lines[PREDICTED])):
            expert.where = ABSENT
            counts[clock.kind, x // limits.num_experts, Count.DROPPED.value] += 1
