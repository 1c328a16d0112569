"""Hits of a least-recently-used cache of every size, from one pass over the requests.

Mattson, Gecsei, Slutz and Traiger, "Evaluation techniques for storage hierarchies", IBM Systems Journal 9(2), 1970. A cache of
c slots always holds a subset of what a cache of c + 1 slots holds, so one list, the *stack*, describes all of them: its first c
experts are those that c slots hold. An expert found at position p is a hit for every cache of more than p slots.

The rules are those of `simulate`: a request is a set of experts, the first of which counts as used most recently; no expert is
evicted for another of its request; caches start with the most popular experts. Requests larger than the cache stream, and
inclusion holds for them too: c slots keep the experts of the request that they held, then load the others in order until they
are full, and one more slot keeps or loads one expert more. What c slots hold is then not always what was used last, so the
stack is updated for each size in turn (`_positions_in_stack`) instead of moving experts to its front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from speculation.offload.simulation.simulate import Workload
from speculation.offload.state import Integers

# Sizes that tables show, as shares of all experts.
SHARES = (0.1, 0.25, 0.5, 0.75)
# Places in the order of uses, per expert. When all are taken, the order is compacted.
_PLACES = 4


@dataclass(frozen=True)
class HitCurves:
    """Hits by cache size. C counts sizes: column c is a cache of c slots, from 0 up to room for every expert.

    Attributes:
        is_global: Whether one cache serves all layers; else each layer has one of c slots.
        hits_LC: Experts of each layer that were in the cache when generated tokens requested them, `[L, C]`. With a cache for
            each layer, a row is the curve of that layer's cache.
        requested_L: Experts that generated tokens requested, `[L]`.
        prefill_hits_LC: Hits of prompts, `[L, C]`.
        prefill_requested_L: Requests of prompts, `[L]`.
    """

    is_global: bool
    hits_LC: Integers
    requested_L: Integers
    prefill_hits_LC: Integers
    prefill_requested_L: Integers

    @property
    def hits_C(self) -> Integers:
        """Hits of all layers, `[C]`."""
        return np.asarray(self.hits_LC.sum(0))

    @property
    def hit_rate_C(self) -> npt.NDArray[np.float64]:
        """Hits of all layers as a share of what was requested, `[C]`."""
        return self.hits_C / max(1, int(self.requested_L.sum()))


def lru_curves(workload: Workload, *, is_global: bool = False) -> HitCurves:
    """Count the hits of `Rule.LRU` at every cache size, as `simulate` would without prefetching.

    Takes memory for L * (E + 1) counts with a cache for each layer, and for L * (L * E + 1) with one cache for all layers.

    Args:
        workload: The requests, and the popularity of the experts that caches start with.
        is_global: One cache for all layers instead of one for each layer.

    Example:
        >>> from speculation.offload.requests import Requests
        >>> experts = np.array([0, 2, 0, 1], dtype=np.int32)
        >>> requests = Requests.decoded(experts, np.arange(5), layers=1, num_experts=3, top_k=1)
        >>> lru_curves(Workload(requests, np.array([[0.5, 0.3, 0.2]]))).hits_LC.tolist()
        [[0, 1, 2, 4]]
    """
    requests = workload.requests
    layers, num_experts = requests.layers, requests.num_experts
    pools = 1 if is_global else layers
    order = np.argsort(-workload.popularity.reshape(pools, -1), axis=1, kind="stable")
    order += num_experts * np.arange(pools)[:, None]
    largest = int(np.diff(requests.starts_R).max(initial=0))
    played = requests.experts_N, requests.starts_R, requests.is_decode_S, layers, num_experts
    # One cache for all layers is so large that the stack is only kept for sizes at which requests stream.
    depth = min(largest, order.shape[1]) if is_global else num_experts
    hits_KLC = _hits(_positions_in_stack(*played, order, depth))
    if is_global:
        by_last_use = _hits(_positions_by_last_use(*played, order[0]))
        by_last_use[:, :, : depth + 1] = hits_KLC
        hits_KLC = by_last_use
    lengths = np.diff(requests.starts_R).reshape(-1, layers)
    requested_KL = np.stack([lengths[requests.is_decode_S == kind].sum(0) for kind in (False, True)])
    return HitCurves(is_global, hits_KLC[1], requested_KL[1], hits_KLC[0], requested_KL[0])


def knee(sizes: npt.ArrayLike, hits: npt.ArrayLike) -> int:
    """Find the size at which a curve is farthest above its chord, the straight line between its ends.

    Up to there a slot gains more than the average slot does, and after it less (if the curve is concave). Among equals, the
    smallest size.

    Args:
        sizes: Cache sizes, ascending.
        hits: Hits, or hit rates, at these sizes.

    Example:
        >>> knee([0, 1, 2, 3, 4], [0, 50, 80, 90, 100])
        2
    """
    sizes_C, hits_C = np.asarray(sizes, dtype=np.float64), np.asarray(hits, dtype=np.float64)
    # Products instead of quotients: equal distances stay equal.
    above_C = (hits_C - hits_C[0]) * (sizes_C[-1] - sizes_C[0]) - (sizes_C - sizes_C[0]) * (hits_C[-1] - hits_C[0])
    return int(sizes_C[np.argmax(above_C)])


def sampled_sizes(largest: int, count: int = 14) -> list[int]:
    """Choose cache sizes from 0 to `largest`: all of them if there are few, else `count` in about equal ratios, and `SHARES`.

    Example:
        >>> sampled_sizes(32)
        [0, 1, 2, 3, 4, 5, 6, 8, 11, 14, 16, 19, 24, 25, 32]
    """
    if largest < count:
        return list(range(largest + 1))
    ratios = np.geomspace(1, largest, count).round().astype(int).tolist()
    return sorted({0, *ratios, *(int(share * largest) for share in SHARES)})


def _hits(positions_KLP: Integers) -> Integers:
    """Hits `[2, L, P]` of caches of 0 to P - 1 slots, from how often experts were found at each position of the stack."""
    hits = np.zeros_like(positions_KLP)
    np.cumsum(positions_KLP[:, :, :-1], axis=2, out=hits[:, :, 1:])
    return hits


@numba.njit(cache=True, nogil=True)
def _positions_in_stack(
    experts_N: npt.NDArray[np.int32],
    starts_R: Integers,
    is_decode_S: npt.NDArray[np.bool_],
    layers: int,
    num_experts: int,
    order: Integers,
    depth: int,
) -> Integers:
    """How often the experts of each layer were found at each position of the stack; of prompts and generated tokens.

    Args:
        experts_N, starts_R, is_decode_S: See `Requests`.
        order: The experts of each cache, the most popular first, `[pools, size]`.
        depth: Positions of the stack to keep: caches of up to so many slots.

    Returns:
        `[2, L, depth + 1]`. The last column counts those that were found nowhere.
    """
    pools = len(order)
    stacks = order[:, :depth].copy()
    last_use = np.zeros(layers * num_experts, dtype=np.int64)
    for pool in range(pools):
        for rank in range(order.shape[1]):
            last_use[order[pool, rank]] = -1 - rank
    chosen_by = np.full(layers * num_experts, -1, dtype=np.int64)
    placed_by = np.full(layers * num_experts, -1, dtype=np.int64)
    evicted = np.zeros(depth + 1, dtype=np.int64)
    counts = np.zeros((2, layers, depth + 1), dtype=np.int64)
    uses = 0
    for request in range(len(starts_R) - 1):
        layer = request % layers
        kind = 1 if is_decode_S[request // layers] else 0
        chosen = experts_N[starts_R[request] : starts_R[request + 1]]
        size = len(chosen)
        for place in range(size):
            chosen_by[layer * num_experts + chosen[place]] = request
        stack = stacks[0 if pools == 1 else layer]
        # Experts that some cache evicts, and the next larger one need not: evicted[head:tail], the last used first.
        head = tail = found = place = 0
        for position in range(depth):
            if position >= size and found == size:
                # All larger caches hold what they held.
                break
            x = stack[position]
            if chosen_by[x] == request:
                found += 1
                counts[kind, layer, position] += 1
            else:
                at = tail
                while at > head and last_use[evicted[at - 1]] < last_use[x]:
                    evicted[at] = evicted[at - 1]
                    at -= 1
                evicted[at] = x
                tail += 1
            # The one expert that a cache of position + 1 slots holds after this request, and one of `position` slots does not.
            if position >= size:
                stack[position] = evicted[head]
                head += 1
                continue
            if chosen_by[x] != request or placed_by[x] == request:
                while placed_by[layer * num_experts + chosen[place]] == request:
                    place += 1
                x = layer * num_experts + chosen[place]
            placed_by[x] = request
            stack[position] = x
        counts[kind, layer, depth] += size - found
        for place in range(size):
            last_use[layer * num_experts + chosen[place]] = uses + size - place
        uses += size
    return counts


@numba.njit(cache=True, nogil=True)
def _positions_by_last_use(
    experts_N: npt.NDArray[np.int32],
    starts_R: Integers,
    is_decode_S: npt.NDArray[np.bool_],
    layers: int,
    num_experts: int,
    order: Integers,
) -> Integers:
    """Like `_positions_in_stack`, but for sizes at which no request streams, where the stack is the order of last uses.

    An expert's position is the number of experts that were used after it. A Fenwick tree over the order of uses counts them.
    """
    count = len(order)
    places = _PLACES * count
    tree = np.zeros(places + 1, dtype=np.int32)
    user = np.full(places + 1, -1, dtype=np.int64)
    used_at = np.zeros(count, dtype=np.int64)
    counts = np.zeros((2, layers, count + 1), dtype=np.int64)
    for rank in range(count):
        user[count - rank] = order[rank]
    now = _compact(tree, user, used_at)
    for request in range(len(starts_R) - 1):
        layer = request % layers
        kind = 1 if is_decode_S[request // layers] else 0
        chosen = experts_N[starts_R[request] : starts_R[request + 1]]
        if now + len(chosen) > places:
            now = _compact(tree, user, used_at)
        for place in range(len(chosen)):
            at = used_at[layer * num_experts + chosen[place]]
            before = 0
            while at > 0:
                before += tree[at]
                at &= at - 1
            counts[kind, layer, count - before] += 1
        for place in range(len(chosen) - 1, -1, -1):
            x = layer * num_experts + chosen[place]
            now += 1
            user[used_at[x]] = -1
            _add(tree, used_at[x], -1)
            user[now] = x
            _add(tree, now, 1)
            used_at[x] = now
    return counts


@numba.njit(cache=True, nogil=True)
def _compact(tree: npt.NDArray[Any], user: Integers, used_at: Integers) -> int:
    """Move the uses to the first places, in their order, and build the tree again; return the last place in use."""
    now = 0
    for place in range(1, len(user)):
        x = user[place]
        if x >= 0:
            now += 1
            user[place] = -1
            user[now] = x
            used_at[x] = now
    tree[:] = 0
    for place in range(1, len(tree)):
        tree[place] += 1 if place <= now else 0
        above = place + (place & -place)
        if above < len(tree):
            tree[above] += tree[place]
    return now


@numba.njit(cache=True, nogil=True)
def _add(tree: npt.NDArray[Any], at: int, value: int) -> None:
    while at < len(tree):
        tree[at] += value
        at += at & -at
