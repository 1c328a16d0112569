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
    LATE = 2  # ... and being copied, or waiting for it, because of a prediction
    MISS = 3  # ... and neither
    LOADS = 4  # copies, because of requests and of predictions
    PREFETCHED = 5  # copies because of predictions
    USEFUL = 6  # of these, used before they were given up
    WASTED = 7  # of these, given up without a use, or never used
    COLLISION = 8  # experts that missed, and had been given up earlier in the same step
    STREAMED = 9  # requested experts that found no room, and were not kept
    DROPPED = 10  # predictions not acted on: the queue was full, no room, or their layer came first


ABSENT, PRESENT, COMING, WAITING = 0, 1, 2, 3
NEVER = 1 << 60
_COUNTS = len(Count)
# In the order of uses: two places for each expert of a request, and between requests one for what is predicted.
_ORDER = 1 << 13


@numba.njit(cache=True, nogil=True)
def _victim(
    slots: npt.NDArray[np.int64],
    held: int,
    rule: int,
    now: int,
    time: float,
    state: npt.NDArray[np.uint8],
    arrival: npt.NDArray[np.float64],
    pinned: npt.NDArray[np.int64],
    guard: npt.NDArray[np.int64],
    key: npt.NDArray[np.int64],
    last: npt.NDArray[np.int64],
    is_guess: bool,
) -> int:
    """The slot whose expert is given up; -1 if all are needed, on their way, or (for a prediction) predicted."""
    best, found = -1, -1
    for slot in range(held):
        x = slots[slot]
        if state[x] != PRESENT and not (state[x] == COMING and arrival[x] <= time):
            continue
        if pinned[x] == now or (is_guess and guard[x] >= now):
            continue
        if found < 0:
            best, found = slot, x
            continue
        if not is_guess and (guard[x] > now) != (guard[found] > now):
            # What is predicted for later goes last.
            if guard[found] > now:
                best, found = slot, x
            continue
        if rule == Rule.LFRU:
            worth = key[x] * np.float64(max(1, (now + 1) * _ORDER - last[found]))
            other = key[found] * np.float64(max(1, (now + 1) * _ORDER - last[x]))
            if worth < other or (worth == other and last[x] < last[found]):
                best, found = slot, x
        elif key[x] < key[found] or (key[x] == key[found] and last[x] < last[found]):
            best, found = slot, x
    return best


@numba.njit(cache=True, nogil=True)
def play(
    experts: npt.NDArray[np.int32],
    starts: npt.NDArray[np.int64],
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
    """Play all requests. Returns counts `[L, len(Count)]`, the end of each step in seconds, and its stalls.

    experts, starts: `Requests`. next_use: of each entry of `experts`, the request that needs the same expert next; first_use:
    of each numbered expert; NEVER if none does. plan_*: a `Plan`. popularity `[L * E]`: caches begin with the most popular
    experts, `capacity` per layer, or in all (is_global). layer_seconds, expert_floor `[S]`: what is not experts, of each layer
    of a step, and the least that its experts take. per_expert: for each expert. copy_seconds: of an expert, not finite if
    nothing is ever copied. predict_seconds: from the routing of a layer to its predictions.
    """
    total = layers * num_experts
    steps = len(layer_seconds)
    counts = np.zeros((layers, _COUNTS), dtype=np.int64)
    ends, stalls = np.zeros(steps), np.zeros(steps)
    state = np.zeros(total, dtype=np.uint8)
    arrival = np.zeros(total)
    pinned = np.full(total, -1, dtype=np.int64)
    guard = np.full(total, -1, dtype=np.int64)
    key = np.zeros(total, dtype=np.int64)
    last = np.zeros(total, dtype=np.int64)
    is_fetched = np.zeros(total, dtype=np.bool_)
    given_up = np.full(total, -1, dtype=np.int64)
    upcoming = first_use.copy()
    pools = 1 if is_global else layers
    size = total // pools
    # What each pool holds, in no order.
    held = np.zeros(pools, dtype=np.int64)
    slots = np.zeros((pools, min(capacity, size)), dtype=np.int64)

    # The most popular experts of each pool, the least of them as if used longest ago.
    for pool in range(pools):
        order = np.argsort(-popularity[pool * size : (pool + 1) * size], kind="mergesort")
        for rank in range(min(capacity, size)):
            x = pool * size + order[rank]
            state[x] = PRESENT
            last[x] = -1 - rank
            if rule == Rule.LRU or rule == Rule.FIFO:
                key[x] = last[x]
            elif rule == Rule.POPULARITY:
                key[x] = popularity[x]
            elif rule == Rule.BELADY:
                key[x] = -upcoming[x]
            slots[pool, held[pool]] = x
            held[pool] += 1

    queue = np.empty(queue_limit, dtype=np.int64)
    queue_target = np.empty(queue_limit, dtype=np.int64)
    queue_time = np.empty(queue_limit)
    head, waiting = 0, 0
    time, link_free = 0.0, 0.0
    can_copy = np.isfinite(copy_seconds)

    for step in range(steps):
        stall = 0.0
        for point in range(layers + 1):
            # Point 0 is before the first layer; point l + 1 is layer l.
            layer = point - 1
            request = step * layers + layer
            routed = time
            if layer >= 0:
                time += layer_seconds[step]
                routed = time
            # What the copy engine has begun by now.
            while waiting and link_free <= time:
                x, target = queue[head], queue_target[head]
                issued = queue_time[head]
                if state[x] == WAITING and issued > time:
                    break
                head = (head + 1) % queue_limit
                waiting -= 1
                if state[x] != WAITING:
                    continue
                at_layer = x // num_experts
                state[x] = ABSENT
                if target < request:
                    counts[at_layer, Count.DROPPED.value] += 1
                    continue
                pool = 0 if is_global else at_layer
                slot = held[pool]
                if slot >= capacity:
                    slot = _victim(slots[pool], slot, rule, request, time, state, arrival, pinned, guard, key, last, True)
                    if slot < 0:
                        counts[at_layer, Count.DROPPED.value] += 1
                        continue
                    out = slots[pool, slot]
                    state[out] = ABSENT
                    given_up[out] = step
                    if is_fetched[out]:
                        is_fetched[out] = False
                        counts[out // num_experts, Count.WASTED.value] += 1
                else:
                    held[pool] += 1
                slots[pool, slot] = x
                begin = max(link_free, issued)
                arrival[x] = begin + copy_seconds
                link_free = arrival[x]
                state[x] = COMING
                is_fetched[x] = True
                counts[at_layer, Count.LOADS.value] += 1
                counts[at_layer, Count.PREFETCHED.value] += 1
                last[x] = target * _ORDER + 1
                if rule == Rule.LRU or rule == Rule.FIFO:
                    key[x] = last[x]
                elif rule == Rule.POPULARITY:
                    key[x] = popularity[x]
                elif rule == Rule.BELADY:
                    key[x] = -upcoming[x]
            if layer >= 0:
                needed = time
                pool = 0 if is_global else layer
                for place in range(starts[request], starts[request + 1]):
                    pinned[layer * num_experts + experts[place]] = request
                for place in range(starts[request], starts[request + 1]):
                    x = layer * num_experts + experts[place]
                    counts[layer, Count.REQUESTED.value] += 1
                    if state[x] == PRESENT or state[x] == COMING:
                        if state[x] == COMING and arrival[x] > time:
                            counts[layer, Count.LATE.value] += 1
                            needed = max(needed, arrival[x])
                        else:
                            counts[layer, Count.HIT.value] += 1
                        state[x] = PRESENT
                        if is_fetched[x]:
                            is_fetched[x] = False
                            counts[layer, Count.USEFUL.value] += 1
                    else:
                        if state[x] == WAITING:
                            counts[layer, Count.LATE.value] += 1
                        else:
                            counts[layer, Count.MISS.value] += 1
                        if given_up[x] == step:
                            counts[layer, Count.COLLISION.value] += 1
                        state[x] = ABSENT
                        # By then, what is on its way is there, and may be given up.
                        begin = max(time, link_free)
                        link_free = begin + copy_seconds
                        needed = max(needed, link_free)
                        counts[layer, Count.LOADS.value] += 1
                        slot = held[pool]
                        if slot < capacity:
                            held[pool] += 1
                        else:
                            slot = _victim(
                                slots[pool], slot, rule, request, begin, state, arrival, pinned, guard, key, last, False
                            )
                            if slot >= 0:
                                out = slots[pool, slot]
                                state[out] = ABSENT
                                given_up[out] = step
                                if is_fetched[out]:
                                    is_fetched[out] = False
                                    counts[out // num_experts, Count.WASTED.value] += 1
                        if slot >= 0:
                            slots[pool, slot] = x
                            state[x] = PRESENT
                            # Until it is there, and its layer is done, it is pinned.
                            arrival[x] = link_free
                            if rule == Rule.FIFO:
                                key[x] = (request + 1) * _ORDER - 2 * (place - starts[request])
                        else:
                            counts[layer, Count.STREAMED.value] += 1
                for place in range(starts[request], starts[request + 1]):
                    x = layer * num_experts + experts[place]
                    upcoming[x] = next_use[place]
                    last[x] = (request + 1) * _ORDER - 2 * (place - starts[request])
                    if rule == Rule.LRU:
                        key[x] = last[x]
                    elif rule == Rule.LFU or rule == Rule.LFRU:
                        key[x] += 1
                    elif rule == Rule.POPULARITY:
                        key[x] = popularity[x]
                    elif rule == Rule.BELADY:
                        key[x] = -upcoming[x]
                stall += needed - time
                chosen = starts[request + 1] - starts[request]
                time = needed + max(chosen * per_expert, expert_floor[step])
            # What is predicted here: known with the routing, acted on behind what the routing itself needed.
            if can_copy:
                for entry in range(plan_starts[step * (layers + 1) + point], plan_starts[step * (layers + 1) + point + 1]):
                    at_layer = plan_layers[entry] % layers
                    x = at_layer * num_experts + plan_experts[entry]
                    target = step * layers + plan_layers[entry]
                    guard[x] = max(guard[x], target)
                    if state[x] != ABSENT:
                        continue
                    if waiting == queue_limit:
                        counts[at_layer, Count.DROPPED.value] += 1
                        continue
                    place = (head + waiting) % queue_limit
                    queue[place], queue_target[place], queue_time[place] = x, target, routed + predict_seconds
                    state[x] = WAITING
                    waiting += 1
        ends[step] = time
        stalls[step] = stall
    for place in range(waiting):
        x = queue[(head + place) % queue_limit]
        if state[x] == WAITING:
            counts[x // num_experts, Count.DROPPED.value] += 1
    for x in range(total):
        if is_fetched[x]:
            counts[x // num_experts, Count.WASTED.value] += 1
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
