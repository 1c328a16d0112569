"""The state of a simulated cache: policies, counted events, and the records that the compiled loop changes.

Experts are numbered `layer * E + expert`. All times are in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

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


class Miss(IntEnum):
    """What happens to a chosen expert that the cache lacks."""

    COPY = 0  # it is copied to the device, and computed there
    HOST = 1  # the host computes it, and it is copied in the background
    CHEAPEST = 2  # the one or the other, whichever ends first


class Count(IntEnum):
    """Events that are counted, for each layer separately."""

    REQUESTED = 0  # experts that a layer's router chose
    HIT = 1  # ... that were in the cache
    LATE = 2  # ... whose prefetch was still in transfer
    MISS = 3  # ... that were neither: demand-loaded, or computed on the host
    LOADS = 4  # transfers to the device: demand loads, prefetches and fills
    PREFETCHED = 5  # prefetches
    USEFUL = 6  # prefetched experts that were used before they were evicted
    WASTED = 7  # prefetched experts that were evicted before a use, or never used
    COLLISION = 8  # misses of experts that had been evicted earlier in the same step
    STREAMED = 9  # chosen experts for which the cache had no room: loaded for one request, and not kept
    DROPPED = 10  # predictions that were not acted on: the queue or the cache was full, or their layer came first
    HOST = 11  # chosen experts that the host computed
    FILLED = 12  # fills: background copies of experts that the host computed
    RAM_MISS = 13  # misses that were not in host memory either
    READS = 14  # reads from storage


class Expert:
    """What the simulation knows of one expert: a record of `EXPERT`.

    key: what the `Rule` compares, in units of its own. last_use: its place in the order of uses, which decides between equal
    keys. next_use: the next request that chooses it. chosen_by: the last request whose router chose it. predicted_for: the
    farthest request for which it is predicted. loaded_in: the request that loaded it on demand, -1 for a prefetch. arrival:
    when its transfer ends. waits_for: the request for which its transfer is queued. evicted_in: the last step that evicted it.
    where: `ABSENT`, `PRESENT`, `COMING`, `WAITING`, `FILLING` or `MISSED`. is_unused_prefetch: it was prefetched and has not
    been used since.
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
    where: int
    is_unused_prefetch: bool


class QueuedPrefetch:
    """A queued transfer, a record of `QUEUED_PREFETCH`: the expert, the request it is for, since when it waits, and with what
    probability it is predicted."""

    expert: int
    request: int
    time: float
    score: float


class Line:
    """The part of a ring of queued transfers that is in use, a record of `LINE`: its first entry, and how many there are."""

    head: int
    waiting: int


class Clock:
    """Times, the only record of a `CLOCK` array.

    now: when the router of the current layer has chosen. computed: when the last layer's experts were computed. transfers_end,
    predictor_ends, reads_end: when the interconnect, the predictor and storage are free again. read_ends: when the background
    read in progress ends, if is_reading. scored: when the reuse scores that are being computed are known. step, layer,
    request: the current ones. kind: 1 for generated tokens, 0 for prompts.
    """

    now: float
    computed: float
    transfers_end: float
    predictor_ends: float
    reads_end: float
    read_ends: float
    scored: float
    step: int
    layer: int
    request: int
    kind: int
    is_reading: bool


class Limits(NamedTuple):
    """Numbers that stay.

    copy_seconds: transfer time of one expert; infinite if nothing can be transferred. policy_seconds: time to choose the
    experts to evict, per request. score_seconds: time to compute the reuse scores of one layer for one sequence
    (`Rule.LEARNED`). time_constant: in steps (`Rule.EWMA`, `Rule.LFU_AGED`).
    """

    rule: int
    layers: int
    num_experts: int
    is_global: bool
    copy_seconds: float
    policy_seconds: float
    score_seconds: float
    time_constant: float


class Tiers(NamedTuple):
    """More numbers that stay, of the host and of storage: apart, because every call copies what it gets.

    expert_seconds, host_seconds: computation of one expert on the device and on the host. host_latency: what the host takes
    besides, once per layer. miss: a `Miss`. ram: experts in host memory; `ALL` if none is on storage only. storage_seconds:
    read of one expert.
    """

    expert_seconds: float
    miss: int
    host_seconds: float
    host_latency: float
    ram: int
    storage_seconds: float


def record_type(described: type, **smaller: type) -> np.dtype[np.void]:
    """The type of a record with the annotated fields of a class; `smaller` names types for some of them."""
    types = {"int": np.int64, "float": np.float64, "bool": np.bool_}
    fields = [(name, smaller.get(name, types[kind])) for name, kind in described.__annotations__.items()]
    return np.dtype(fields, align=True)


# 56 bytes, less than one cache line.
EXPERT = record_type(
    Expert,
    chosen_by=np.int32,
    predicted_for=np.int32,
    loaded_in=np.int32,
    waits_for=np.int32,
    evicted_in=np.int32,
    where=np.int8,
)
QUEUED_PREFETCH, CLOCK, LINE = record_type(QueuedPrefetch), record_type(Clock), record_type(Line)
Experts = Sequence[Expert]
Lines = Sequence[Line]
# Three rings of `QUEUED_PREFETCH` records, of equal size, in an array of two dimensions: predictions that wait for the
# interconnect, fills that do, and predictions that wait for storage.
Queues = npt.NDArray[Any]
PREDICTED, FILLS, READS = 0, 1, 2
Integers = npt.NDArray[np.int64]
Seconds = npt.NDArray[np.float64]

ABSENT, PRESENT, COMING, WAITING, MISSED, FILLING = 0, 1, 2, 3, 4, 5
NEVER = 1 << 60
ALL = -1
# Requests are numbered in 32 bits.
MAX_REQUESTS = 1 << 31
# The order of uses has so many places for a request: two for each of its experts, and one for experts prefetched for it.
ORDER = 1 << 13


def expert_records(first_use: Integers) -> npt.NDArray[np.void]:
    """Records of experts before the first request, none of them cached. first_use `[L * E]`: the request that needs each."""
    experts = np.zeros(len(first_use), dtype=EXPERT)
    experts["next_use"] = first_use
    for name in ("chosen_by", "predicted_for", "evicted_in", "loaded_in"):
        experts[name] = -1
    return experts
