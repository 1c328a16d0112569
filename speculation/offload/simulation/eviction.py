"""What the simulation does with an evicted expert, and when a policy knows what to evict. Compiled."""

from __future__ import annotations

import numba

from speculation.offload.recompiling import recompile_after
from speculation.offload.simulation.records import Clock, Count, Limits
from speculation.offload.state import ABSENT, Experts, Integers

recompile_after(__file__, "speculation.offload.state", "speculation.offload.simulation.records")


@numba.njit(cache=True, nogil=True)
def evict(x: int, clock: Clock, limits: Limits, experts: Experts, counts: Integers) -> None:
    """Take an expert out of its cache."""
    expert = experts[x]
    expert.where = ABSENT
    expert.evicted_in = clock.step
    if expert.is_unused_prefetch:
        expert.is_unused_prefetch = False
        counts[clock.kind, x // limits.num_experts, Count.WASTED.value] += 1
