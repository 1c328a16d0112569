"""Which expert a full cache evicts: the compiled rules.

Experts are numbered `layer * E + expert`.
"""

from __future__ import annotations

import numba
import numpy as np

from speculation.offload.state import (
    ABSENT,
    COMING,
    ORDER,
    PRESENT,
    Clock,
    Count,
    Expert,
    Experts,
    Integers,
    Limits,
    Rule,
)


@numba.njit(cache=True, nogil=True)
def fill_caches(popularity: Integers, experts: Experts, slots: Integers, held: Integers, rule: int) -> None:
    """Begin with the most popular experts of each pool, the least popular as if used longest ago."""
    size = len(experts) // len(held)
    if rule == Rule.POPULARITY:
        for x in range(len(experts)):
            experts[x].key = popularity[x]
    for pool in range(len(held)):
        order = np.argsort(-popularity[pool * size : (pool + 1) * size], kind="mergesort")
        for rank in range(slots.shape[1]):
            x = pool * size + order[rank]
            expert = experts[x]
            expert.where = PRESENT
            expert.last_use = -1 - rank
            if rule == Rule.FIFO:
                expert.key = expert.last_use
            update_key(expert, rule)
            slots[pool, rank] = x
        held[pool] = slots.shape[1]


@numba.njit(cache=True, nogil=True)
def victim_of(
    slots: Integers, held: int, rule: int, now: int, soon: int, time: float, is_prefetch: bool, experts: Experts
) -> int:
    """Choose the slot to evict for a transfer that begins at `time`, during request `now`; -1 if there is none.

    An expert that the current request uses, or that is in transfer, is never evicted. One that is predicted for request `soon`
    or later is never evicted for a prefetch, and is the last to be evicted for a demand load.
    """
    best, found = -1, -1
    for slot in range(held):
        x = slots[slot]
        expert = experts[x]
        if expert.chosen_by == now or (expert.where == COMING and expert.arrival > time):
            continue
        if is_prefetch and expert.predicted_for >= soon:
            continue
        if found >= 0:
            other = experts[found]
            if not is_prefetch and (expert.predicted_for >= soon) != (other.predicted_for >= soon):
                if other.predicted_for < soon:
                    continue
            elif rule == Rule.LFRU:
                its = expert.key * np.float64(max(1, (now + 1) * ORDER - other.last_use))
                best_so_far = other.key * np.float64(max(1, (now + 1) * ORDER - expert.last_use))
                if its > best_so_far or (its == best_so_far and expert.last_use >= other.last_use):
                    continue
            elif expert.key > other.key or (expert.key == other.key and expert.last_use >= other.last_use):
                continue
        best, found = slot, x
    return best


@numba.njit(cache=True, nogil=True)
def evict(x: int, clock: Clock, limits: Limits, experts: Experts, counts: Integers) -> None:
    expert = experts[x]
    expert.where = ABSENT
    expert.evicted_in = clock.step
    if expert.is_unused_prefetch:
        expert.is_unused_prefetch = False
        counts[clock.kind, x // limits.num_experts, Count.WASTED.value] += 1


@numba.njit(cache=True, nogil=True)
def update_key(expert: Expert, rule: int) -> None:
    """Set what the rule compares, for the rules that derive it from the record; the others count or keep it."""
    if rule == Rule.LRU:
        expert.key = expert.last_use
    elif rule == Rule.BELADY:
        expert.key = -expert.next_use


@numba.njit(cache=True, nogil=True)
def outranks(x: int, other: int, rule: int, now: int, experts: Experts) -> bool:
    """Whether the rule would evict the other expert rather than x, which is loaded now."""
    if rule == Rule.FIFO:
        return True
    mine, its = experts[x], experts[other]
    if rule == Rule.LFRU:
        worth = mine.key * np.float64(max(1, (now + 1) * ORDER - its.last_use))
        its_worth = its.key * np.float64(max(1, (now + 1) * ORDER - mine.last_use))
        return bool(worth > its_worth or (worth == its_worth and mine.last_use > its.last_use))
    return mine.key > its.key or (mine.key == its.key and mine.last_use > its.last_use)
