"""The compiled inside of the simulation: caches of experts, one copy engine, one compute engine, in order of time.

Experts are numbered `layer * E + expert`. All times are in seconds. Nothing is allocated per event.
"""

from __future__ import annotations

from enum import IntEnum

import numba
import numpy as np
import numpy.typing as npt


class Rule(IntEnum):
    """Which expert a full cache gives up: the one with the smallest ..."""

    LRU = 0  # last use
    FIFO = 1  # time of loading
    LFU = 2  # number of uses so far, in the cache or not; among equals, last use
    LFRU = 3  # that number over the time since the last one
    POPULARITY = 4  # frequency in the training problems
    BELADY = 5  # time until the next use, from behind


class Count(IntEnum):
    """What is counted, of each layer apart."""

    REQUESTED = 0  # experts asked for by a layer
    HIT = 1  # ... and in the cache then
    LATE = 2  # ... and being copied, because of a prediction
    MISS = 3  # ... and neither
    LOADS = 4  # copies, because of requests and of predictions
    PREFETCHED = 5  # copies because of predictions
    USEFUL = 6  # of these, used before they were given up
    WASTED = 7  # of these, given up without a use, or never used
    COLLISION = 8  # experts that missed, and had been given up earlier in the same step
    STREAMED = 9  # requested experts that found no room, and were not kept
    DROPPED = 10  # predictions not acted on: the queue was full, no room, or their layer came first


ABSENT, PRESENT, COMING, WAITING, MISSED = 0, 1, 2, 3, 4
NEVER = 1 << 60
_COUNTS = len(Count)
# In the order of uses: two places for each expert of a request, and between requests one for what is predicted.
_ORDER = 1 << 13


# Functions take arrays one by one: of a tuple numba counts references to each array at every call, ten times the work itself.
@numba.njit(cache=True, nogil=True)
def _victim(
    slots: npt.NDArray[np.int64],
    held: int,
    rule: int,
    now: int,
    soon: int,
    time: float,
    is_guess: bool,
    state: npt.NDArray[np.uint8],
    arrival: npt.NDArray[np.float64],
    pinned: npt.NDArray[np.int64],
    guard: npt.NDArray[np.int64],
    key: npt.NDArray[np.int64],
    last: npt.NDArray[np.int64],
) -> int:
    """The slot whose expert is given up; -1 if all are in use, on their way, or (for a prediction) predicted from `soon` on."""
    best, found = -1, -1
    for slot in range(held):
        x = slots[slot]
        if pinned[x] == now or (state[x] == COMING and arrival[x] > time):
            continue
        if is_guess and guard[x] >= soon:
            continue
        if found >= 0:
            if not is_guess and (guard[x] >= soon) != (guard[found] >= soon):
                # What is predicted goes last.
                if guard[found] < soon:
                    continue
            elif rule == Rule.LFRU:
                worth = key[x] * np.float64(max(1, (now + 1) * _ORDER - last[found]))
                other = key[found] * np.float64(max(1, (now + 1) * _ORDER - last[x]))
                if worth > other or (worth == other and last[x] >= last[found]):
                    continue
            elif key[x] > key[found] or (key[x] == key[found] and last[x] >= last[found]):
                continue
        best, found = slot, x
    return best


@numba.njit(cache=True, nogil=True)
def _rated(rule: int, before: int, last: int, popularity: int, upcoming: int) -> int:
    """What the rule compares, of an expert that was used or is expected at `last`; as before where it counts otherwise."""
    if rule == Rule.LRU:
        return last
    if rule == Rule.POPULARITY:
        return popularity
    if rule == Rule.BELADY:
        return -upcoming
    return before


@numba.njit(cache=True, nogil=True)
def _begin_copies(
    queue: npt.NDArray[np.int64],
    issued: npt.NDArray[np.float64],
    head: int,
    waiting: int,
    link_free: float,
    since: float,
    time: float,
    request: int,
    is_over: bool,
    step: int,
    kind: int,
    rule: int,
    capacity: int,
    num_experts: int,
    copy_seconds: float,
    state: npt.NDArray[np.uint8],
    arrival: npt.NDArray[np.float64],
    pinned: npt.NDArray[np.int64],
    guard: npt.NDArray[np.int64],
    key: npt.NDArray[np.int64],
    last: npt.NDArray[np.int64],
    is_fetched: npt.NDArray[np.bool_],
    given_up: npt.NDArray[np.int64],
    upcoming: npt.NDArray[np.int64],
    wanted: npt.NDArray[np.int64],
    popularity: npt.NDArray[np.int64],
    slots: npt.NDArray[np.int64],
    held: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
) -> tuple[int, int, float]:
    """Begin the predicted copies that the link can begin from `since` to `time`.

    is_over: the request was served, and its experts are in use: what finds no room waits for them. Else it is dropped.
    """
    soon = request + 1 if is_over else request
    pools = len(held)
    while waiting and link_free <= time:
        x, target = queue[head]
        begin = max(link_free, issued[head], since)
        # Copied on demand since, and perhaps waiting again behind.
        is_stale = state[x] != WAITING or wanted[x] != target
        if not is_stale and begin > time:
            break
        at_layer = x // num_experts
        pool = 0 if pools == 1 else at_layer
        slot = held[pool]
        if not is_stale and target >= soon and slot >= capacity:
            slot = _victim(slots[pool], slot, rule, request, soon, begin, True, state, arrival, pinned, guard, key, last)
            if slot < 0 and is_over:
                break
        head = (head + 1) % len(queue)
        waiting -= 1
        if is_stale:
            continue
        state[x] = ABSENT
        if target < soon or slot < 0:
            counts[kind, at_layer, Count.DROPPED.value] += 1
            continue
        if slot < held[pool]:
            out = slots[pool, slot]
            state[out] = ABSENT
            given_up[out] = step
            if is_fetched[out]:
                is_fetched[out] = False
                counts[kind, out // num_experts, Count.WASTED.value] += 1
        else:
            held[pool] += 1
        slots[pool, slot] = x
        link_free = begin + copy_seconds
        arrival[x] = link_free
        state[x] = COMING
        is_fetched[x] = True
        last[x] = target * _ORDER + 1
        if rule == Rule.FIFO:
            key[x] = last[x]
        key[x] = _rated(rule, key[x], last[x], popularity[x], upcoming[x])
        counts[kind, at_layer, Count.LOADS.value] += 1
        counts[kind, at_layer, Count.PREFETCHED.value] += 1
    return head, waiting, link_free


@numba.njit(cache=True, nogil=True)
def play(
    experts: npt.NDArray[np.int32],
    starts: npt.NDArray[np.int64],
    asking: npt.NDArray[np.int64],
    is_decode: npt.NDArray[np.bool_],
    next_use: npt.NDArray[np.int64],
    first_use: npt.NDArray[np.int64],
    layers: int,
    num_experts: int,
    plan_starts: npt.NDArray[np.int64],
    plan_layers: npt.NDArray[np.int32],
    plan_experts: npt.NDArray[np.int32],
    popularity: npt.NDArray[np.int64],
    rule: int,
    capacity: int,
    is_global: bool,
    queue_limit: int,
    copy_seconds: float,
    layer_seconds: npt.NDArray[np.float64],
    per_expert: float,
    expert_floor: npt.NDArray[np.float64],
    predict_seconds: float,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Play all requests. Returns counts `[2, L, len(Count)]` of prompts and of generated tokens, the end of each step in
    seconds, and its stalls.

    experts, starts, is_decode: `Requests`. asking: predictions that each step makes at each point. next_use: of each entry of
    `experts`, the request that needs the same expert next; first_use: of each numbered expert; NEVER if none does. plan_*: a
    `PrefetchPlan`. popularity `[L * E]`: caches begin with the most popular experts, `capacity` per layer, or in all
    (is_global).
    layer_seconds, expert_floor `[S]`: what is not experts, of each layer of a step, and the least that its experts take.
    per_expert: for each expert. copy_seconds: of an expert, not finite if nothing is ever copied. predict_seconds: of one
    prediction; they are made one after the other.
    """
    total = layers * num_experts
    steps = len(layer_seconds)
    ends, stalls = np.zeros(steps), np.zeros(steps)
    pools = 1 if is_global else layers
    size = total // pools
    # Of each expert: where it is, and when its copy is over; the last request that chose it; the farthest that it is predicted
    # for; what `Rule`s compare, and the order of uses; whether it was copied ahead and not used since; the last step in which
    # it was given up; the next request that needs it; the request for which it waits to be copied.
    state = np.zeros(total, dtype=np.uint8)
    arrival = np.zeros(total)
    pinned = np.full(total, -1, dtype=np.int64)
    guard = np.full(total, -1, dtype=np.int64)
    key = np.zeros(total, dtype=np.int64)
    last = np.zeros(total, dtype=np.int64)
    is_fetched = np.zeros(total, dtype=np.bool_)
    given_up = np.full(total, -1, dtype=np.int64)
    upcoming = first_use.copy()
    wanted = np.zeros(total, dtype=np.int64)
    # What each pool holds, in no order.
    held = np.zeros(pools, dtype=np.int64)
    slots = np.zeros((pools, min(capacity, size)), dtype=np.int64)
    counts = np.zeros((2, layers, _COUNTS), dtype=np.int64)

    # The most popular experts of each pool, the least of them as if used longest ago.
    for pool in range(pools):
        order = np.argsort(-popularity[pool * size : (pool + 1) * size], kind="mergesort")
        for rank in range(min(capacity, size)):
            x = pool * size + order[rank]
            state[x] = PRESENT
            last[x] = -1 - rank
            if rule == Rule.FIFO:
                key[x] = last[x]
            key[x] = _rated(rule, key[x], last[x], popularity[x], upcoming[x])
            slots[pool, held[pool]] = x
            held[pool] += 1

    queue = np.empty((queue_limit, 2), dtype=np.int64)
    issued = np.empty(queue_limit)
    head, waiting = 0, 0
    # When the last products ended; when the link and the predictor are free.
    time, worked, link_free, predictor_free = 0.0, 0.0, 0.0, 0.0
    can_copy = np.isfinite(copy_seconds)

    for step in range(steps):
        stall = 0.0
        kind = 1 if is_decode[step] else 0
        for point in range(layers + 1):
            # Point 0 is before the first layer; point l + 1 is layer l.
            layer = point - 1
            request = step * layers + layer
            begin_place, end_place = 0, 0
            if layer >= 0:
                time += layer_seconds[step]
                begin_place, end_place = starts[request], starts[request + 1]
                if waiting:
                    head, waiting, link_free = _begin_copies(
                        queue, issued, head, waiting, link_free, worked, time, request, False, step, kind, rule, capacity,
                        num_experts, copy_seconds, state, arrival, pinned, guard, key, last, is_fetched, given_up, upcoming,
                        wanted, popularity, slots, held, counts,
                    )  # fmt: skip
            routed, needed = time, time
            pool = 0 if is_global else layer
            for place in range(begin_place, end_place):
                x = layer * num_experts + experts[place]
                pinned[x] = request
                counts[kind, layer, Count.REQUESTED.value] += 1
                if rule == Rule.BELADY:
                    upcoming[x] = next_use[place]
                    key[x] = _rated(rule, key[x], last[x], popularity[x], upcoming[x])
                if state[x] == PRESENT or state[x] == COMING:
                    if state[x] == COMING and arrival[x] > time:
                        counts[kind, layer, Count.LATE.value] += 1
                        needed = max(needed, arrival[x])
                    else:
                        counts[kind, layer, Count.HIT.value] += 1
                    # Pinned until its layer is done: it does not matter that it may still be on its way.
                    state[x] = PRESENT
                    if is_fetched[x]:
                        is_fetched[x] = False
                        counts[kind, layer, Count.USEFUL.value] += 1
                else:
                    counts[kind, layer, Count.MISS.value] += 1
                    if given_up[x] == step:
                        counts[kind, layer, Count.COLLISION.value] += 1
                    state[x] = MISSED
            for place in range(begin_place, end_place):
                x = layer * num_experts + experts[place]
                if state[x] != MISSED:
                    continue
                # By then, what is on its way is there, and may be given up.
                begin = max(time, link_free)
                link_free = begin + copy_seconds
                needed = max(needed, link_free)
                counts[kind, layer, Count.LOADS.value] += 1
                slot = held[pool]
                if slot < capacity:
                    held[pool] += 1
                else:
                    slot = _victim(
                        slots[pool], slot, rule, request, request + 1, begin, False, state, arrival, pinned, guard, key, last
                    )
                    if slot >= 0:
                        out = slots[pool, slot]
                        state[out] = ABSENT
                        given_up[out] = step
                        if is_fetched[out]:
                            is_fetched[out] = False
                            counts[kind, out // num_experts, Count.WASTED.value] += 1
                    elif rule == Rule.BELADY:
                        # Of a request that is larger than the cache, those stay that are needed first.
                        for other in range(held[pool]):
                            farthest = upcoming[slots[pool, slot]] if slot >= 0 else upcoming[x]
                            if upcoming[slots[pool, other]] > farthest:
                                slot = other
                        if slot >= 0:
                            state[slots[pool, slot]] = ABSENT
                            counts[kind, layer, Count.STREAMED.value] += 1
                if slot >= 0:
                    slots[pool, slot] = x
                    state[x] = PRESENT
                    if rule == Rule.FIFO:
                        key[x] = (request + 1) * _ORDER - 2 * (place - begin_place)
                else:
                    state[x] = ABSENT
                    counts[kind, layer, Count.STREAMED.value] += 1
            for place in range(begin_place, end_place):
                x = layer * num_experts + experts[place]
                upcoming[x] = next_use[place]
                last[x] = (request + 1) * _ORDER - 2 * (place - begin_place)
                if rule == Rule.LFU or rule == Rule.LFRU:
                    key[x] += 1
                key[x] = _rated(rule, key[x], last[x], popularity[x], upcoming[x])
            # What is predicted here: known with the routing, acted on behind what the routing itself needed.
            first, end = plan_starts[step * (layers + 1) + point], plan_starts[step * (layers + 1) + point + 1]
            if can_copy and first < end:
                predictor_free = max(predictor_free, routed) + predict_seconds * asking[step]
                for entry in range(first, end):
                    at_layer = plan_layers[entry] % layers
                    x = at_layer * num_experts + plan_experts[entry]
                    target = step * layers + plan_layers[entry]
                    guard[x] = max(guard[x], target)
                    if state[x] != ABSENT:
                        continue
                    if waiting == queue_limit:
                        counts[kind, at_layer, Count.DROPPED.value] += 1
                        continue
                    place = (head + waiting) % queue_limit
                    queue[place, 0], queue[place, 1], issued[place] = x, target, predictor_free
                    state[x] = WAITING
                    wanted[x] = target
                    waiting += 1
            if layer >= 0:
                stall += needed - time
                time = needed + max((end_place - begin_place) * per_expert, expert_floor[step])
                worked = time
                # While these experts are in use, none of them is given up.
                if waiting:
                    head, waiting, link_free = _begin_copies(
                        queue, issued, head, waiting, link_free, 0.0, time, request, True, step, kind, rule, capacity,
                        num_experts, copy_seconds, state, arrival, pinned, guard, key, last, is_fetched, given_up, upcoming,
                        wanted, popularity, slots, held, counts,
                    )  # fmt: skip
        ends[step] = time
        stalls[step] = stall
    kind = 1 if is_decode[-1:].all() else 0
    for place in range(waiting):
        x, target = queue[(head + place) % queue_limit]
        if state[x] == WAITING and wanted[x] == target:
            counts[kind, x // num_experts, Count.DROPPED.value] += 1
    for x in range(total):
        if is_fetched[x]:
            counts[kind, x // num_experts, Count.WASTED.value] += 1
    return counts, ends, stalls


@numba.njit(cache=True, nogil=True)
def uses_ahead(
    experts: npt.NDArray[np.int32], starts: npt.NDArray[np.int64], layers: int, num_experts: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The request that needs the same expert next, of each entry `[N]`, and of each numbered expert from the start."""
    upcoming = np.full(layers * num_experts, NEVER, dtype=np.int64)
    found = np.empty(len(experts), dtype=np.int64)
    for request in range(len(starts) - 2, -1, -1):
        for place in range(starts[request], starts[request + 1]):
            x = (request % layers) * num_experts + experts[place]
            found[place] = upcoming[x]
        for place in range(starts[request], starts[request + 1]):
            upcoming[(request % layers) * num_experts + experts[place]] = request
    return found, upcoming
