"""What the simulation counts, the numbers that stay, and the records that the compiled loop changes besides those of experts.

All times are in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from speculation.offload.state import record_type


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


QUEUED_PREFETCH, CLOCK, LINE = record_type(QueuedPrefetch), record_type(Clock), record_type(Line)
Lines = Sequence[Line]
# Three rings of `QUEUED_PREFETCH` records, of equal size, in an array of two dimensions: predictions that wait for the
# interconnect, fills that do, and predictions that wait for storage.
Queues = npt.NDArray[Any]
PREDICTED, FILLS, READS = 0, 1, 2
Seconds = npt.NDArray[np.float64]

ALL = -1
# Requests are numbered in 32 bits.
MAX_REQUESTS = 1 << 31
