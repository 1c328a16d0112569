"""What happens to chosen experts that the cache lacks: they are copied to the device, or computed on the host. Compiled."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from speculation.offload.eviction_policies import note_load
from speculation.offload.numba_recompiling import recompile_after
from speculation.offload.simulation.host_memory import OUT, Ram, admit, touch
from speculation.offload.simulation.occupancy import IN_USE, occupy, slot_to_vacate, vacate
from speculation.offload.simulation.records import ALL, Clock, Count, Limits, Miss, Pool, Tiers
from speculation.offload.state import ABSENT, COMING, MISSED, ORDER, PRESENT, Experts, Integers, Rule

recompile_after(
    __file__,
    "speculation.offload.eviction_policies",
    "speculation.offload.state",
    "speculation.offload.simulation.host_memory",
    "speculation.offload.simulation.occupancy",
    "speculation.offload.simulation.records",
)


@numba.njit(cache=True, nogil=True, forceinline=True)
def load_missing(
    start: int,
    size: int,
    experts_N: npt.NDArray[np.int32],
    clock: Clock,
    limits: Limits,
    pool: Pool,
    experts: Experts,
    slots: Integers,
    keys: Integers,
    counts: Integers,
) -> float:
    """Transfer the experts that the look-up missed, one after the other; return when the last one arrives.

    Args:
        start, size: The request's part of `experts_N`.
        experts_N, clock, limits, experts, slots, keys, counts: See `play`.
        pool: The cache of the layer.
    """
    needed, ready = clock.now, clock.now + limits.policy_seconds
    for place in range(size):
        x = clock.layer * limits.num_experts + experts_N[start + place]
        if experts[x].where == MISSED:
            needed = _load(x, place, ready, clock, limits, pool, experts, slots, keys, counts)
    return needed


@numba.njit(cache=True, nogil=True, forceinline=True)
def _load(
    x: int,
    place: int,
    ready: float,
    clock: Clock,
    limits: Limits,
    pool: Pool,
    experts: Experts,
    slots: Integers,
    keys: Integers,
    counts: Integers,
) -> float:
    """Demand-load an expert, from `ready` at the earliest; return when it arrives. place: its place in the request."""
    request = clock.request
    expert = experts[x]
    begin = max(ready, clock.transfers_end)
    clock.transfers_end = expert.arrival = begin + limits.copy_seconds
    counts[clock.kind, clock.layer, Count.LOADS.value] += 1
    slot = pool.first + pool.held
    if pool.held < pool.capacity:
        pool.held += 1
    else:
        slot = slot_to_vacate(pool, request, request + 1, begin, False, limits, experts, slots, keys)
        if slot < 0 and limits.rule == Rule.BELADY:
            slot = _slot_needed_last(pool, expert.next_use, experts, slots)
            if slot >= 0:
                counts[clock.kind, clock.layer, Count.STREAMED.value] += 1
        if slot >= 0:
            vacate(slots[slot], clock, limits, experts, counts)
    if slot >= 0:
        expert.where = PRESENT
        note_load(expert, request, (request + 1) * ORDER - 2 * place, limits.rule)
        occupy(slot, x, expert, slots, keys)
        keys[slot] = IN_USE
    else:
        expert.where = ABSENT
        counts[clock.kind, clock.layer, Count.STREAMED.value] += 1
    return clock.transfers_end


@numba.njit(cache=True, nogil=True, forceinline=True)
def compute_on_arrival(
    start: int, size: int, experts_N: npt.NDArray[np.int32], seconds: float, clock: Clock, limits: Limits, experts: Experts
) -> float:
    """Compute a request's experts one after the other: those that are there first, then each once it has arrived.

    Args:
        start, size: The request's part of `experts_N`.
        seconds: Computation of one of them.
        experts_N, clock, limits, experts: See `play`.

    Returns:
        When the last one is computed.
    """
    first, now, end = clock.layer * limits.num_experts, clock.now, clock.now
    earliest, arrives = -1, np.inf
    for place in range(size):
        arrival = experts[first + experts_N[start + place]].arrival
        if arrival <= now:
            end += seconds
        elif earliest < 0 or arrival < arrives:
            earliest, arrives = place, arrival
    # A prefetch in transfer arrives before everything that is loaded for the request; the rest in the request's order.
    if earliest >= 0:
        end = max(end, arrives) + seconds
        for place in range(size):
            arrival = experts[first + experts_N[start + place]].arrival
            if arrival > now and place != earliest:
                end = max(end, arrival) + seconds
    return end


@numba.njit(cache=True, nogil=True)
def _slot_needed_last(pool: Pool, next_use: int, experts: Experts, slots: Integers) -> int:
    """Of a request that is larger than the cache, the experts stay that are needed first: the slot of the last, if later."""
    found = -1
    for slot in range(pool.first, pool.first + pool.held):
        if experts[slots[slot]].next_use > next_use:
            found, next_use = slot, experts[slots[slot]].next_use
    return found


@numba.njit(cache=True, nogil=True)
def serve_misses(
    start: int,
    size: int,
    experts_N: npt.NDArray[np.int32],
    host_seconds: float,
    on_host: npt.NDArray[np.bool_],
    clock: Clock,
    limits: Limits,
    tiers: Tiers,
    pool: Pool,
    experts: Experts,
    slots: Integers,
    keys: Integers,
    counts: Integers,
    ram: Ram,
) -> tuple[float, int, float]:
    """Copy experts that are not on the device, or compute them on the host, one after the other.

    Those that are in transfer already come first: the host computes them if that ends before they have arrived and are
    computed. Those that must be read from storage come last, because that takes longest.

    Args:
        start, size: The request's part of `experts_N`.
        host_seconds: Computation of one of its experts on the host.
        on_host: Set for each of them: whether the host computes it and it was a miss.
        experts_N, clock, limits, tiers, experts, slots, keys, counts, ram: See `play`.
        pool: The cache of the layer.

    Returns:
        When the device has all that it computes, how many those are, and when the host is done.
    """
    now, first = clock.now, clock.layer * limits.num_experts
    needed = host_ends = now
    host_free = now + tiers.host_latency
    remaining = size
    has_storage = tiers.ram != ALL
    # The policy takes its time to choose what to evict; the host waits for nothing of it.
    chosen_at = now + limits.policy_seconds
    for place in range(size):
        on_host[place] = False
        expert = experts[first + experts_N[start + place]]
        if expert.where != COMING or expert.arrival <= now:
            continue
        host_end = host_free + host_seconds
        if tiers.miss != Miss.COPY and host_end <= expert.arrival + limits.expert_seconds:
            host_free = host_ends = host_end
            remaining -= 1
            counts[clock.kind, clock.layer, Count.HOST.value] += 1
            continue
        needed = max(needed, expert.arrival)
        expert.where = PRESENT
        if expert.is_unused_prefetch:
            expert.is_unused_prefetch = False
            counts[clock.kind, clock.layer, Count.USEFUL.value] += 1
    for waits_for_reads in range(1 + has_storage):
        for place in range(size):
            x = first + experts_N[start + place]
            if experts[x].where != MISSED:
                continue
            ready = now
            if has_storage:
                if not waits_for_reads and (ram[x].before == OUT or ram[x].ready > now):
                    continue
                ready = _fetch(x, clock, tiers, counts, ram)
            host_end = max(host_free, ready) + host_seconds
            there = max(ready, chosen_at)
            computed = max(there, clock.transfers_end) + limits.copy_seconds + limits.expert_seconds
            if tiers.miss == Miss.HOST or (tiers.miss == Miss.CHEAPEST and host_end <= computed):
                host_free = host_ends = host_end
                remaining -= 1
                counts[clock.kind, clock.layer, Count.HOST.value] += 1
                experts[x].where = ABSENT
                on_host[place] = True
            else:
                needed = max(needed, _load(x, place, there, clock, limits, pool, experts, slots, keys, counts))
    return needed, remaining, host_ends


@numba.njit(cache=True, nogil=True)
def _fetch(x: int, clock: Clock, tiers: Tiers, counts: Integers, ram: Ram) -> float:
    """Return when an expert is in host memory, after reading it from storage if it must be."""
    if ram[x].before != OUT:
        touch(x, ram)
        return max(clock.now, ram[x].ready)
    counts[clock.kind, clock.layer, Count.RAM_MISS.value] += 1
    counts[clock.kind, clock.layer, Count.READS.value] += 1
    clock.reads_end = max(clock.reads_end, clock.now) + tiers.storage_seconds
    ram[x].ready = clock.reads_end
    if tiers.ram:
        admit(x, clock.reads_end, ram)
    return clock.reads_end
