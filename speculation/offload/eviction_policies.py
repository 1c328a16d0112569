"""Eviction policies, written once: the simulation, the replay and every other cache of experts call these functions.

A policy gives each cached expert a *worth* and evicts the expert with the smallest one; among equals, the one that was used
longest ago. All functions are compiled and change the experts' records in place.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from speculation.offload.numba_recompiling import recompile_after
from speculation.offload.state import COMING, ORDER, PRESENT, Expert, Experts, Integers, Rule

recompile_after(__file__, "speculation.offload.state")

# Added to the worth of experts that are evicted last: larger than any place in the order of uses, and added without rounding.
_ABOVE_ALL = float(1 << 50)
# Segmented LRU keeps at most this share of a cache for experts that were used again after they were loaded. The original paper
# finds shares from .5 to .8 about equally good.
_PROTECTED_SHARE = 0.5


@numba.njit(cache=True, nogil=True)
def start_expert(expert: Expert, order: int, popularity: int, rule: int) -> None:
    """Set up an expert before the first request.

    Args:
        expert: The expert's record, changed.
        order: Its place in the order of uses, as if it had been used then; negative.
        popularity: Its rank in the training problems, the most popular highest.
        rule: The policy.
    """
    expert.last_use = order
    if rule == Rule.POPULARITY:
        expert.key = popularity
    elif rule == Rule.BELADY:
        expert.key = -expert.next_use
    elif rule == Rule.EWMA:
        # The logarithm of no use at all.
        expert.key = -np.inf
    elif rule == Rule.LFU or rule == Rule.LFU_AGED or rule == Rule.LFRU or rule == Rule.LEARNED:
        expert.key = 0.0
    else:
        expert.key = order


@numba.njit(cache=True, nogil=True)
def begin_step(step: int, rule: int, time_constant: float, experts: Experts) -> bool:
    """Begin a step.

    Args:
        step: The step, from 0.
        rule: The policy.
        time_constant: Steps after which `Rule.LFU_AGED` halves all counts, rounded down.
        experts: All records, changed.

    Returns:
        Whether keys have changed.
    """
    if rule != Rule.LFU_AGED or not step or step % max(1, int(time_constant)):
        return False
    for x in range(len(experts)):
        experts[x].key *= 0.5
    return True


@numba.njit(cache=True, nogil=True)
def set_scores(scores_X: npt.NDArray[np.float32], first: int, num_experts: int, experts: Experts) -> None:
    """Set the worth of a layer's experts, for `Rule.LEARNED`.

    Args:
        scores_X: The scores of all experts `[L * E]`.
        first: Number of the layer's first expert.
        num_experts: E, the experts of the layer.
        experts: All records, changed.
    """
    for x in range(first, first + num_experts):
        experts[x].key = scores_X[x]


@numba.njit(cache=True, nogil=True)
def note_next_use(expert: Expert, next_use: int, rule: int) -> None:
    """Note which request uses an expert next. Only Belady's policy knows this."""
    expert.next_use = next_use
    if rule == Rule.BELADY:
        expert.key = -next_use


@numba.njit(cache=True, nogil=True)
def note_load(expert: Expert, request: int, order: int, rule: int) -> None:
    """Note that an expert was loaded into the cache.

    Args:
        expert: The expert's record, changed.
        request: The request that demand-loaded it, or -1 for a prefetch.
        order: The place of the load in the order of uses.
        rule: The policy.
    """
    expert.loaded_in = request
    if request < 0:
        # A prefetched expert counts as loaded and used when it is due, so that it is not evicted before it can be used.
        expert.last_use = order
        if rule == Rule.LRU:
            expert.key = order
    if rule == Rule.FIFO or rule == Rule.LEAST_STALE or rule == Rule.SLRU:
        expert.key = order


@numba.njit(cache=True, nogil=True)
def note_use(expert: Expert, request: int, step: int, order: int, rule: int, time_constant: float) -> bool:
    """Note that a request used an expert, cached or not.

    Args:
        expert: The expert's record, changed.
        request: The request.
        step: Its step, which is the time in `Rule.EWMA`.
        order: The place of the use in the order of uses.
        rule: The policy.
        time_constant: In steps, for `Rule.EWMA`.

    Returns:
        Whether the expert is now protected (`Rule.SLRU`), so that `demote_oldest` must be called for its cache.
    """
    expert.last_use = order
    if rule == Rule.LRU:
        expert.key = order
    elif rule == Rule.LFU or rule == Rule.LFU_AGED or rule == Rule.LFRU:
        expert.key += 1
    elif rule == Rule.EWMA:
        # The logarithm of the sum of exp(time) over all uses. It orders experts as the decayed sum does, because all sums decay
        # alike, and it changes only with a use.
        time = step / time_constant
        expert.key = time + np.log(1.0 + np.exp(expert.key - time))
    elif rule == Rule.SLRU and expert.where == PRESENT:
        if expert.loaded_in != request:
            expert.key = _ABOVE_ALL + order
            return True
        expert.key = order
    return False


@numba.njit(cache=True, nogil=True)
def demote_oldest(slots: Integers, held: int, capacity: int, experts: Experts) -> int:
    """If too many experts of a cache are protected (`Rule.SLRU`), make the one used longest ago the newest of the others.

    Args:
        slots: Numbers of the experts in this cache, of which there are `held`.
        held: How many experts the cache holds.
        capacity: How many it can hold.
        experts: All records, changed.

    Returns:
        The number of that expert; -1 if there is none.
    """
    protected, oldest, newest = 0, -1, -np.inf
    for slot in range(held):
        key = experts[slots[slot]].key
        if key > _ABOVE_ALL / 2:
            protected += 1
            if oldest < 0 or key < experts[oldest].key:
                oldest = slots[slot]
        else:
            newest = max(newest, key)
    if protected <= int(capacity * _PROTECTED_SHARE):
        return -1
    experts[oldest].key = max(newest, experts[oldest].key - _ABOVE_ALL)
    return oldest


@numba.njit(cache=True, nogil=True)
def compares_keys(rule: int) -> bool:
    """Whether an expert's worth is its key, in every request."""
    return rule != Rule.LFRU and rule != Rule.LEAST_STALE


@numba.njit(cache=True, nogil=True, inline="always")
def worth(expert: Expert, request: int, rule: int, layers: int) -> float:
    """What the policy compares during `request`: the expert with the smallest worth is evicted."""
    if rule == Rule.LFRU:
        return expert.key / max(1, (request + 1) * ORDER - expert.last_use)
    if rule == Rule.LEAST_STALE and expert.chosen_by >= request - request % layers:
        return expert.key + _ABOVE_ALL
    return expert.key


@numba.njit(cache=True, nogil=True)
def choose_victim(
    slots: Integers,
    held: int,
    rule: int,
    layers: int,
    request: int,
    soon: int,
    time: float,
    is_prefetch: bool,
    experts: Experts,
) -> int:
    """Choose the slot whose expert is evicted.

    An expert that the current request uses, or that is still in transfer, is never evicted. One that is predicted for request
    `soon` or later is never evicted for a prefetch, and is the last to be evicted for a demand load.

    Args:
        slots: Numbers of the experts in this cache, of which there are `held`.
        held: How many experts the cache holds.
        rule: The policy.
        layers: L, the MoE layers.
        request: The current request.
        soon: Experts that are predicted for this request or a later one are spared.
        time: When the transfer into the slot begins, in seconds.
        is_prefetch: Whether the slot is for a prefetch.
        experts: All records.

    Returns:
        An index of `slots`; -1 if no expert can be evicted.
    """
    is_derived = not compares_keys(rule)
    found, found_last, found_worth, found_is_predicted = -1, 0, 0.0, False
    for slot in range(held):
        expert = experts[slots[slot]]
        if expert.chosen_by == request or (expert.where == COMING and expert.arrival > time):
            continue
        is_predicted = expert.predicted_for >= soon
        if is_predicted and is_prefetch:
            continue
        its = worth(expert, request, rule, layers) if is_derived else expert.key
        if found >= 0:
            if is_predicted != found_is_predicted:
                if is_predicted:
                    continue
            elif its > found_worth or (its == found_worth and expert.last_use >= found_last):
                continue
        found, found_last, found_worth, found_is_predicted = slot, expert.last_use, its, is_predicted
    return found
