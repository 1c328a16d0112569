"""Transfers that no layer waits for yet: predicted experts, and experts that the host computed. Compiled.

Predictions and fills wait in two rings for the interconnect, and predicted experts that are on storage only in a third one for
their read. A demand load does not wait for what is queued, but for the transfer in progress.
"""

from __future__ import annotations

import numba

from speculation.offload.policies import choose_victim, note_load, worth
from speculation.offload.recompiling import recompile_after
from speculation.offload.simulation.eviction import evict
from speculation.offload.simulation.host_memory import OUT, Ram, admit, touch
from speculation.offload.simulation.records import FILLS, PREDICTED, READS, Clock, Count, Limits, Lines, QueuedPrefetch, Queues
from speculation.offload.state import ABSENT, COMING, FILLING, ORDER, WAITING, Experts, Integers, Rule

recompile_after(
    __file__,
    "speculation.offload.policies",
    "speculation.offload.state",
    "speculation.offload.simulation.eviction",
    "speculation.offload.simulation.host_memory",
    "speculation.offload.simulation.records",
)

# Calls with arrays that LLVM does not inline cost as much as their work.
_inlined = numba.njit(cache=True, nogil=True, inline="always")


@numba.njit(cache=True, nogil=True)
def enqueue_prediction(
    which: int, x: int, request: int, score: float, queues: Queues, lines: Lines, clock: Clock, experts: Experts
) -> bool:
    """Queue an expert that is predicted for a request with a probability (score); return False if there is no room.

    which: `READS` if it is on storage only, else `PREDICTED`.
    """
    expert = experts[x]
    expert.predicted_for = max(expert.predicted_for, request)
    if expert.where != ABSENT and expert.where != FILLING:
        return True
    if not _append(which, x, request, clock.predictor_ends, score, queues, lines):
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
    if expert.where == ABSENT and _append(FILLS, x, expires, since, 1.0, queues, lines):
        expert.where = FILLING
        expert.waits_for = expires


@_inlined
def _append(which: int, x: int, request: int, time: float, score: float, queues: Queues, lines: Lines) -> bool:
    line = lines[which]
    size = queues.shape[1]
    if line.waiting == size:
        return False
    entry = queues[which, (line.head + line.waiting) % size]
    entry.expert, entry.request, entry.time, entry.score = x, request, time, score
    line.waiting += 1
    return True


@_inlined
def _remove_first(which: int, queues: Queues, lines: Lines) -> None:
    line = lines[which]
    line.head = (line.head + 1) % queues.shape[1]
    line.waiting -= 1


@numba.njit(cache=True, nogil=True)
def begin_transfers(
    queues: Queues,
    lines: Lines,
    clock: Clock,
    since: float,
    is_served: bool,
    has_storage: bool,
    limits: Limits,
    experts: Experts,
    capacities: Integers,
    slots: Integers,
    held: Integers,
    counts: Integers,
    ram: Ram,
) -> None:
    """Begin the queued transfers that the interconnect can begin from `since` to now: predictions first, then fills.

    is_served: the request's experts are in the cache and in use, so an expert that finds no room waits for them. Else it is
    dropped. has_storage: host memory does not hold all experts.
    """
    request = clock.request
    soon = request + 1 if is_served else request
    predicted, fills = lines[PREDICTED], lines[FILLS]
    while (predicted.waiting or fills.waiting) and clock.transfers_end <= clock.now:
        which, begin = PREDICTED, 0.0
        if predicted.waiting:
            begin = _begin_of(queues[PREDICTED, predicted.head], since, clock, limits)
        if fills.waiting:
            other = _begin_of(queues[FILLS, fills.head], since, clock, limits)
            if not predicted.waiting or other < begin:
                which, begin = FILLS, other
        entry = queues[which, lines[which].head]
        x, target, score = entry.expert, entry.request, entry.score
        expert = experts[x]
        # It was loaded on demand since, and perhaps waits again farther behind.
        is_stale = expert.where != (FILLING if which == FILLS else WAITING) or expert.waits_for != target
        if not is_stale and begin > clock.now:
            break
        at_layer = x // limits.num_experts
        pool = 0 if limits.is_global else at_layer
        slot = held[pool]
        is_full = slot >= capacities[pool]
        if not is_stale and target >= soon and is_full:
            slot = choose_victim(slots[pool], slot, limits.rule, limits.layers, request, soon, begin, True, experts)
            if slot < 0 and is_served:
                break
            if slot >= 0 and which == FILLS:
                if not _is_worth_more(x, slots[pool, slot], soon, request, limits, experts):
                    slot = -1
            elif slot >= 0 and limits.rule == Rule.LEARNED and experts[slots[pool, slot]].key > score:
                # One score decides what to keep and what to fetch: what is worth more than the prediction stays.
                slot = -1
        _remove_first(which, queues, lines)
        if is_stale:
            continue
        is_out = has_storage and ram[x].before == OUT
        if is_out and which == PREDICTED and target >= soon and _append(READS, x, target, entry.time, score, queues, lines):
            # Host memory has evicted it while it waited.
            continue
        if target < soon or slot < 0 or is_out:
            expert.where = ABSENT
            if which == PREDICTED:
                counts[clock.kind, at_layer, Count.DROPPED.value] += 1
            continue
        if is_full:
            evict(slots[pool, slot], clock, limits, experts, counts)
        else:
            held[pool] += 1
        if has_storage:
            touch(x, ram)
        slots[pool, slot] = x
        clock.transfers_end = begin + limits.copy_seconds
        expert.arrival = clock.transfers_end
        expert.where = COMING
        counts[clock.kind, at_layer, Count.LOADS.value] += 1
        if which == FILLS:
            # It counts as used when it was, not when it is copied.
            note_load(expert, request, soon * ORDER + 1, limits.rule)
            expert.loaded_in = -1
            counts[clock.kind, at_layer, Count.FILLED.value] += 1
        else:
            expert.is_unused_prefetch = True
            note_load(expert, -1, target * ORDER + 1, limits.rule)
            counts[clock.kind, at_layer, Count.PREFETCHED.value] += 1


@_inlined
def _begin_of(entry: QueuedPrefetch, since: float, clock: Clock, limits: Limits) -> float:
    """When the transfer of an expert can begin."""
    known: float = entry.time
    return max(clock.transfers_end, known, since)


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
    queues: Queues,
    lines: Lines,
    clock: Clock,
    is_served: bool,
    storage_seconds: float,
    limits: Limits,
    experts: Experts,
    counts: Integers,
    ram: Ram,
) -> None:
    """End and begin the reads of predicted experts that storage can until now; what was read waits for the interconnect."""
    soon = clock.request + 1 if is_served else clock.request
    while lines[READS].waiting:
        entry = queues[READS, lines[READS].head]
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
            clock.reads_end = clock.read_ends = begin + storage_seconds
            clock.is_reading = True
            admit(x, clock.reads_end, ram)
            counts[clock.kind, x // limits.num_experts, Count.READS.value] += 1
            continue
        _remove_first(READS, queues, lines)
        if not is_stale and (target < soon or not _append(PREDICTED, x, target, there, entry.score, queues, lines)):
            expert.where = ABSENT
            counts[clock.kind, x // limits.num_experts, Count.DROPPED.value] += 1
