"""What happens to chosen experts that the cache lacks: they are copied to the device, or computed on the host. Compiled."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from speculation.offload.policies import choose_victim, note_load
from speculation.offload.recompiling import recompile_after
from speculation.offload.simulation.eviction import evict
from speculation.offload.simulation.host_memory import OUT, Ram, admit, touch
from speculation.offload.simulation.records import ALL, Clock, Count, Limits, Miss, Tiers
from speculation.offload.state import ABSENT, COMING, MISSED, ORDER, PRESENT, Experts, Integers, Rule

recompile_after(
    __file__,
    "speculation.offload.policies",
    "speculation.offload.state",
    "speculation.offload.simulation.eviction",
    "speculation.offload.simulation.host_memory",
    "speculation.offload.simulation.records",
)

# Calls with this many arrays are not inlined by LLVM and cost a sixth of the time: these are inlined by numba.
_inlined = numba.njit(cache=True, nogil=True, inline="always")


@_inlined
def load_missing(
    chosen: npt.NDArray[np.int32],
    clock: Clock,
    limits: Limits,
    experts: Experts,
    capacities: Integers,
    slots: Integers,
    held: Integers,
    counts: Integers,
) -> float:
    """Transfer the experts that the look-up missed, one after the other; return when the last one arrives."""
    needed = clock.now
    ready = clock.now + limits.policy_seconds
    for place in range(len(chosen)):
        x = clock.layer * limits.num_experts + chosen[place]
        if experts[x].where == MISSED:
            needed = load(x, place, ready, clock, limits, experts, capacities, slots, held, counts)
    return needed


@_inlined
def load(
    x: int,
    place: int,
    ready: float,
    clock: Clock,
    limits: Limits,
    experts: Experts,
    capacities: Integers,
    slots: Integers,
    held: Integers,
    counts: Integers,
) -> float:
    """Transfer an expert on demand, from `ready` at the earliest; return when it arrives. place: its place in the request."""
    layer, request = clock.layer, clock.request
    pool = 0 if limits.is_global else layer
    expert = experts[x]
    # By then, what is in transfer now has arrived and can be evicted.
    begin = max(ready, clock.transfers_end)
    clock.transfers_end = begin + limits.copy_seconds
    counts[clock.kind, layer, Count.LOADS.value] += 1
    slot = held[pool]
    if slot < capacities[pool]:
        held[pool] += 1
    else:
        slot = choose_victim(slots[pool], slot, limits.rule, limits.layers, request, request + 1, begin, False, experts)
        if slot >= 0:
            evict(slots[pool, slot], clock, limits, experts, counts)
        elif limits.rule == Rule.BELADY:
            # Of a request that is larger than the cache, the experts stay that are needed first.
            for other in range(held[pool]):
                farthest = experts[slots[pool, slot]].next_use if slot >= 0 else expert.next_use
                if experts[slots[pool, other]].next_use > farthest:
                    slot = other
            if slot >= 0:
                evict(slots[pool, slot], clock, limits, experts, counts)
                counts[clock.kind, layer, Count.STREAMED.value] += 1
    if slot >= 0:
        slots[pool, slot] = x
        expert.where = PRESENT
        note_load(expert, request, (request + 1) * ORDER - 2 * place, limits.rule)
    else:
        expert.where = ABSENT
        counts[clock.kind, layer, Count.STREAMED.value] += 1
    return clock.transfers_end


@numba.njit(cache=True, nogil=True)
def serve(
    chosen: npt.NDArray[np.int32],
    host_seconds: float,
    on_host: npt.NDArray[np.bool_],
    clock: Clock,
    limits: Limits,
    tiers: Tiers,
    experts: Experts,
    capacities: Integers,
    slots: Integers,
    held: Integers,
    counts: Integers,
    ram: Ram,
) -> tuple[float, int, float]:
    """Copy experts that are not on the device, or compute them on the host, one after the other.

    Those that are in transfer already come first: the host computes them if that ends before they have arrived and are
    computed. Those that must be read from storage come last, because that takes longest.

    Args:
        chosen: Experts of the request.
        host_seconds: Computation of one of them on the host.
        on_host: Set for each entry of `chosen`: whether the host computes it and it was a miss.
        clock, limits, tiers, experts, capacities, slots, held, counts, ram: see `play`.

    Returns:
        When the device has all that it computes, how many those are, and when the host is done.
    """
    now, first = clock.now, clock.layer * limits.num_experts
    needed = host_ends = now
    host_free = now + tiers.host_latency
    remaining = len(chosen)
    has_storage = tiers.ram != ALL
    # The policy takes its time to choose what to evict; the host waits for nothing of it.
    chosen_at = now + limits.policy_seconds
    for place in range(len(chosen)):
        on_host[place] = False
        expert = experts[first + chosen[place]]
        if expert.where != COMING or expert.arrival <= now:
            continue
        host_end = host_free + host_seconds
        if tiers.miss != Miss.COPY and host_end <= expert.arrival + tiers.expert_seconds:
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
        for place in range(len(chosen)):
            x = first + chosen[place]
            if experts[x].where != MISSED:
                continue
            ready = now
            if has_storage:
                if not waits_for_reads and (ram[x].before == OUT or ram[x].ready > now):
                    continue
                ready = _fetch(x, clock, tiers, counts, ram)
            host_end = max(host_free, ready) + host_seconds
            there = max(ready, chosen_at)
            computed = max(there, clock.transfers_end) + limits.copy_seconds + tiers.expert_seconds
            if tiers.miss == Miss.HOST or (tiers.miss == Miss.CHEAPEST and host_end <= computed):
                host_free = host_ends = host_end
                remaining -= 1
                counts[clock.kind, clock.layer, Count.HOST.value] += 1
                experts[x].where = ABSENT
                on_host[place] = True
            else:
                needed = max(needed, load(x, place, there, clock, limits, experts, capacities, slots, held, counts))
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
