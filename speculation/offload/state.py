"""Eviction policies by name, and the record that a cache keeps of each expert.

Experts are numbered `layer * E + expert`. All times are in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt


class Rule(IntEnum):
    """Which expert a full cache evicts: the one with the smallest ..."""

    LRU = 0  # last use
    FIFO = 1  # time of loading
    LFU = 2  # number of uses so far, cached or not
    LFRU = 3  # number of uses so far over the time since the last one
    POPULARITY = 4  # frequency in the training problems
    BELADY = 5  # negated time until the next use: needs the future
    EWMA = 6  # sum over its uses, each weighted by exp(-age / time constant): LRFU of Lee et al. (IEEE Trans. Computers, 2001)
    LFU_AGED = 7  # number of uses, all of which are halved whenever a time constant has passed
    SLRU = 8  # last use; experts used again after their load are evicted last: segmented LRU (Karedla et al., 1994)
    LEAST_STALE = 9  # time of loading; experts used in the current step are evicted last (Hoang et al., arXiv 2602.03921)
    LEARNED = 10  # predicted discounted use, from a predictor of the task `reuse`

    @property
    def label(self) -> str:
        """The name in commands and documents."""
        return self.name.lower().replace("_", "-")


class Expert:
    """What a cache knows of one expert: a record of `EXPERT`.

    key: what the `Rule` compares, in units of its own. last_use: its place in the order of uses, which decides between equal
    keys. next_use: the next request that chooses it. chosen_by: the last request whose router chose it. predicted_for: the
    farthest request for which it is predicted. loaded_in: the request that demand-loaded it, -1 for a prefetch. arrival:
    when its transfer ends. waits_for: the request for which its transfer is queued. evicted_in: the last step that evicted it.
    slot: its place among the slots of all simulated caches, -1 if it is not cached. where: `ABSENT`, `PRESENT`, `COMING`,
    `WAITING`, `FILLING` or `MISSED`. is_unused_prefetch: it was prefetched and has not been used since.
    """

    key: float
    last_use: int
    next_use: int
    arrival: float
    chosen_by: int
    predicted_for: int
    loaded_in: int
    waits_for: int
    evicted_in: int
    slot: int
    where: int
    is_unused_prefetch: bool


def record_type(described: type, **smaller: type) -> np.dtype[np.void]:
    """The type of a record with the annotated fields of a class; `smaller` names types for some of them."""
    types = {"int": np.int64, "float": np.float64, "bool": np.bool_}
    fields = [(name, smaller.get(name, types[kind])) for name, kind in described.__annotations__.items()]
    return np.dtype(fields, align=True)


# 64 bytes, one cache line.
EXPERT = record_type(
    Expert,
    chosen_by=np.int32,
    predicted_for=np.int32,
    loaded_in=np.int32,
    waits_for=np.int32,
    evicted_in=np.int32,
    slot=np.int32,
    where=np.int8,
)
Experts = Sequence[Expert]
Integers = npt.NDArray[np.int64]

ABSENT, PRESENT, COMING, WAITING, MISSED, FILLING = 0, 1, 2, 3, 4, 5
NEVER = 1 << 60
# Tokens over which `ewma` forgets. Values from 12 to 48 differ little (docs/results/offload.md).
TIME_CONSTANT = 24.0
# The order of uses has so many places for a request: two for each of its experts, and one for experts prefetched for it.
ORDER = 1 << 13


def expert_records(first_use: Integers) -> npt.NDArray[np.void]:
    """Records of experts before the first request, none of them cached. first_use `[L * E]`: the request that needs each."""
    experts = np.zeros(len(first_use), dtype=EXPERT)
    experts["next_use"] = first_use
    for name in ("chosen_by", "predicted_for", "evicted_in", "loaded_in", "slot"):
        experts[name] = -1
    return experts
