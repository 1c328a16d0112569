"""What the simulation counts, the numbers that stay, and the records that the compiled loop changes besides those of experts.

All times are in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from speculation.offload.state import Integers, record_type

Seconds = npt.NDArray[np.float64]


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
    """A ring of queued transfers, a record of `LINE`: the part of the array of all three that is its room, the place of its
    first entry in it, and how many entries there are."""

    start: int
    size: int
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


class Pool:
    """One cache, a record of `POOL`: its first slot, how many slots it has, and how many of them hold an expert."""

    first: int
    capacity: int
    held: int


class StepInputs(NamedTuple):
    """What is given of each step.

    is_decode: whether it decodes. asking: predictions that it makes after each layer. draft_seconds: time before its first
    layer. layer_seconds: for each of its layers, time of everything but the experts. expert_floor: the least time that a
    layer's experts take on the device. host_floor: the least time that all of them would take on the host.
    """

    is_decode: npt.NDArray[np.bool_]
    asking: Integers
    draft_seconds: Seconds
    layer_seconds: Seconds
    expert_floor: Seconds
    host_floor: Seconds


class StepResults(NamedTuple):
    """What is found.

    hits, ends, stalls: of each step, experts that were in the cache, when it ends, and how long computation waited. outcomes:
    of each entry of `Requests.experts_N`, whether it was `HIT`, `LATE` or in `DEMAND` (`analysis.documents.token_results`);
    not recorded without room for it.
    """

    hits: Integers
    ends: Seconds
    stalls: Seconds
    outcomes: npt.NDArray[np.uint8]


class Limits(NamedTuple):
    """Numbers that stay.

    copy_seconds: transfer time of one expert; infinite if nothing can be transferred. expert_seconds: computation of one
    expert on the device. predict_seconds: one prediction; predictions are made one after the other. policy_seconds: time to
    choose the experts to evict, per request. score_seconds: time to compute the reuse scores of one layer for one sequence
    (`Rule.LEARNED`). time_constant: in steps (`Rule.EWMA`, `Rule.LFU_AGED`). computes_on_arrival: see `Costs`.
    """

    rule: int
    layers: int
    num_experts: int
    is_global: bool
    copy_seconds: float
    expert_seconds: float
    predict_seconds: float
    policy_seconds: float
    score_seconds: float
    time_constant: float
    computes_on_arrival: bool


class Tiers(NamedTuple):
    """More numbers that stay, if misses are not all copied from host memory.

    miss: a `Miss`. host_seconds: computation of one expert on the host. host_latency: what the host takes besides, once per
    layer. ram: experts in host memory; `ALL` if none is on storage only. storage_seconds: read of one expert.
    """

    miss: int
    host_seconds: float
    host_latency: float
    ram: int
    storage_seconds: float


QUEUED_PREFETCH, CLOCK, LINE, POOL = (record_type(described) for described in (QueuedPrefetch, Clock, Line, Pool))
Lines = Sequence[Line]
Pools = Sequence[Pool]
# Three rings of `QUEUED_PREFETCH` records, of equal size: predictions that wait for the interconnect, fills that do, and
# predictions that wait for storage.
Queues = Sequence[QueuedPrefetch]
PREDICTED, FILLS, READS = 0, 1, 2

ALL = -1
# Requests are numbered in 32 bits.
MAX_REQUESTS = 1 << 31
