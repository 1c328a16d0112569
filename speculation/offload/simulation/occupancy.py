"""Which expert is in which slot of the simulated caches, and which one leaves. Compiled.

The slots of all caches are in two arrays: of the experts, and of their keys (`Expert.key`), as integers in the same order. Keys
that lie side by side are compared several at a time, and records are read only where keys are equal. What the current request
uses is not evicted: its slot has the key `IN_USE` until the request is done.
"""

from __future__ import annotations

import numba
import numpy as np

from speculation.offload.eviction_policies import choose_victim, compares_keys, start_expert
from speculation.offload.numba_recompiling import recompile_after
from speculation.offload.simulation.records import Clock, Count, Limits, Pool, Pools
from speculation.offload.state import ABSENT, PRESENT, Expert, Experts, Integers

recompile_after(
    __file__, "speculation.offload.eviction_policies", "speculation.offload.state", "speculation.offload.simulation.records"
)

IN_USE = (1 << 63) - 1
_ALL_BUT_SIGN = (1 << 63) - 1
# From so many slots on, two passes that LLVM vectorizes are faster than one that it does not.
_MANY = 48


@numba.njit(cache=True, nogil=True)
def fill(
    popularity: Integers,
    most_popular: Integers,
    rule: int,
    experts: Experts,
    slots: Integers,
    keys: Integers,
    pools: Pools,
) -> None:
    """Begin with the most popular experts of each cache, the least popular as if used longest ago.

    Args:
        popularity, most_popular, experts, slots, keys, pools: See `play`.
        rule: The policy.
    """
    for number in range(len(pools)):
        pool = pools[number]
        for rank in range(most_popular.shape[1]):
            x = most_popular[number, rank]
            is_held = rank < pool.capacity
            # Experts that are not cached have no use before the first one.
            start_expert(experts[x], -1 - rank if is_held else 0, popularity[x], rule)
            if is_held:
                experts[x].where = PRESENT
                occupy(pool.first + rank, x, experts[x], slots, keys)
        pool.held = pool.capacity


@numba.njit(cache=True, nogil=True, forceinline=True)
def occupy(slot: int, x: int, expert: Expert, slots: Integers, keys: Integers) -> None:
    """Put an expert that no request uses into a slot."""
    slots[slot] = x
    expert.slot = slot
    keys[slot] = _sortable(expert.key)


@numba.njit(cache=True, nogil=True, forceinline=True)
def note_key(expert: Expert, keys: Integers) -> None:
    """Note the key of an expert that no request uses, or no longer does, if it is cached."""
    if expert.slot >= 0:
        keys[expert.slot] = _sortable(expert.key)


@numba.njit(cache=True, nogil=True)
def note_keys(pool: Pool, experts: Experts, slots: Integers, keys: Integers) -> None:
    """Note the keys of all experts of a cache, between two requests."""
    for slot in range(pool.first, pool.first + pool.held):
        keys[slot] = _sortable(experts[slots[slot]].key)


@numba.njit(cache=True, nogil=True, forceinline=True)
def vacate(x: int, clock: Clock, limits: Limits, experts: Experts, counts: Integers) -> None:
    """Evict an expert from its slot."""
    expert = experts[x]
    expert.where = ABSENT
    expert.slot = -1
    expert.evicted_in = clock.step
    if expert.is_unused_prefetch:
        expert.is_unused_prefetch = False
        counts[clock.kind, x // limits.num_experts, Count.WASTED.value] += 1


@numba.njit(cache=True, nogil=True, forceinline=True)
def slot_to_vacate(
    pool: Pool,
    request: int,
    soon: int,
    time: float,
    is_prefetch: bool,
    limits: Limits,
    experts: Experts,
    slots: Integers,
    keys: Integers,
) -> int:
    """Choose the slot whose expert is evicted, as `choose_victim` does; -1 if none can be.

    Args:
        pool: The cache.
        request, soon, time, is_prefetch: See `choose_victim`.
        limits, experts, slots, keys: See `play`.
    """
    if compares_keys(limits.rule):
        slot: int = _least_slot(pool.first, pool.first + pool.held, experts, slots, keys)
        # A transfer begins after those before it, so that no expert is still in transfer by then.
        if slot < 0 or experts[slots[slot]].predicted_for < soon:
            return slot
    held = slots[pool.first : pool.first + pool.held]
    found: int = choose_victim(held, pool.held, limits.rule, limits.layers, request, soon, time, is_prefetch, experts)
    return pool.first + found if found >= 0 else -1


@numba.njit(cache=True, nogil=True, forceinline=True)
def _least_slot(first: int, end: int, experts: Experts, slots: Integers, keys: Integers) -> int:
    """The slot with the smallest key; among equals, that of the expert used longest ago. -1 if all are in use."""
    if first == end:
        return -1
    if end - first < _MANY:
        found, least, is_unique = first, keys[first], True
        for slot in range(first + 1, end):
            if keys[slot] < least:
                found, least = slot, keys[slot]
        for slot in range(found + 1, end):
            is_unique &= keys[slot] != least
    else:
        found, least, is_unique = _least_of_many(keys, np.uint64(first), np.uint64(end))
    if least == IN_USE:
        return -1
    if not is_unique:
        for slot in range(found + 1, end):
            if keys[slot] == least and experts[slots[slot]].last_use < experts[slots[found]].last_use:
                found = slot
    return found


@numba.njit(cache=True, nogil=True)
def _least_of_many(keys: Integers, first: int, end: int) -> tuple[int, int, bool]:
    """The slot with the smallest key, that key, and whether no other is equal, in two loops that LLVM vectorizes.

    first, end: unsigned, because numba checks whether signed ones count from the end.
    """
    least = IN_USE
    for slot in range(first, end):
        least = min(least, keys[slot])
    found, equal = end, 0
    for slot in range(first, end):
        is_least = keys[slot] == least
        equal += is_least
        found = min(found, slot if is_least else end)
    return int(np.int64(found)), least, equal == 1


@numba.njit(cache=True, nogil=True, forceinline=True)
def _sortable(key: float) -> int:
    """An integer that is less than another if the key is: those of floats in IEEE 754, the negative ones in reverse order."""
    bits = int(np.float64(key).view(np.int64))
    return bits if bits >= 0 else bits ^ _ALL_BUT_SIGN
