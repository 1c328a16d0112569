"""The thread that transfers experts: what goes first, what is dropped, and what is never evicted."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from profiler.errors import EngineError
from speculation.offload.cache import ExpertCache
from speculation.offload.state import Rule
from speculation.runtime.slots import Slots
from speculation.runtime.storage.layout import ExpertLayout, Weight
from speculation.runtime.transfers import QUEUE, Transfers

LAYOUT = ExpertLayout((Weight("down_proj", (2, 3), torch.float32), Weight("down_proj_bias", (3,), torch.float32)))
LAYERS, EXPERTS, CAPACITY = 3, 6, 2


class Gate:
    """A store whose reads wait until they are allowed, one at a time. An expert's content is its number."""

    bytes_read = 0

    def __init__(self) -> None:
        self.order: list[int] = []
        self.allowed = threading.Semaphore(0)
        self.reading = threading.Semaphore(0)
        self.fault: Exception | None = None

    def read(self, x: int, memory_B: torch.Tensor) -> None:
        self.order.append(x)
        self.reading.release()
        assert self.allowed.acquire(timeout=10)
        if self.fault is not None:
            raise self.fault
        memory_B.fill_(x)

    def held(self, x: int) -> torch.Tensor | None:
        return None

    def close(self) -> None:
        pass


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def transfers(gate: Gate) -> Iterator[Transfers]:
    """Caches of two experts per layer, which hold experts 0 and 1 of each; layer 0 has been routed."""
    cpu = torch.device("cpu")
    popularity = np.tile(np.arange(EXPERTS, 0, -1), LAYERS)
    cache = ExpertCache(Rule.LRU, [CAPACITY] * LAYERS, EXPERTS, popularity, 24.0)
    found = Transfers(cache, gate, Slots([LAYOUT] * LAYERS, [CAPACITY] * LAYERS, cpu), [LAYOUT] * LAYERS)
    cache.begin_step()
    cache.look_up(0, [0, 1])
    cache.note_use(0, [0, 1])
    yield found
    gate.allowed.release(1000)
    found.close()


def test_a_demand_load_goes_before_waiting_prefetches_but_not_before_the_one_in_progress(
    gate: Gate, transfers: Transfers
) -> None:
    with transfers.lock:
        transfers.prefetch(2, 5, request=2, score=0.9)
        transfers.prefetch(1, 4, request=1, score=0.8)
        transfers.prefetch(1, 3, request=1, score=0.7)
    assert gate.reading.acquire(timeout=10)
    with transfers.lock:
        transfers.cache.look_up(1, [2])
        placed = transfers.cache.load(1, 2, 0)
        assert placed is not None
        demanded = transfers.demand(1, 2, placed.slot)
    gate.allowed.release(10)
    transfers.wait(demanded)
    transfers.settle()
    # The nearest request was in progress; then the demand load; then what is left for a later layer. Expert 3 came too late.
    assert gate.order == [EXPERTS + 4, EXPERTS + 2, 2 * EXPERTS + 5]
    assert transfers.counts.prefetched == 2
    assert transfers.counts.dropped == 1
    assert transfers.counts.bytes == 3 * LAYOUT.bytes
    assert transfers.counts.transfers == 3


def test_an_expert_in_transfer_is_not_evicted(gate: Gate, transfers: Transfers) -> None:
    with transfers.lock:
        transfers.prefetch(1, 4, request=1, score=0.9)
    assert gate.reading.acquire(timeout=10)
    with transfers.lock:
        cache = transfers.cache
        cache.release()
        assert cache.slot_of_X[EXPERTS + 4] >= 0
        assert transfers.coming(EXPERTS + 4) is not None
        evicted = []
        cache.look_up(1, [2])
        for place, expert in enumerate([2, 3]):
            placed = cache.load(1, expert, place)
            evicted.append(None if placed is None else placed.evicted)
        # Of the two slots, one is in transfer, and the other then holds what the layer needs now.
        assert cache.slot_of_X[EXPERTS + 4] >= 0
        assert evicted[0] in (EXPERTS + 0, EXPERTS + 1)
        assert evicted[1] is None
    gate.allowed.release(1)
    transfers.settle()
    with transfers.lock:
        assert transfers.coming(EXPERTS + 4) is None


def test_predictions_beyond_the_queue_are_dropped(gate: Gate, transfers: Transfers) -> None:
    with transfers.lock:
        transfers.prefetch(1, 5, request=1, score=0.9)
    assert gate.reading.acquire(timeout=10)
    with transfers.lock:
        for number in range(QUEUE + 3):
            # Experts of later layers, as a model with more of them would have.
            transfers._waiting.clear()
            transfers.prefetch(2, 2 + number % 4, request=2, score=0.5)
        assert transfers.counts.dropped == 3
        # What the cache has, and what is in the past, is not queued.
        transfers.prefetch(2, 0, request=2, score=0.5)
        assert transfers.counts.dropped == 3
        transfers.prefetch(0, 5, request=0, score=0.5)
        assert transfers.counts.dropped == 4


def test_what_a_read_raises_reaches_whoever_waits(gate: Gate, transfers: Transfers) -> None:
    with transfers.lock:
        transfers.cache.look_up(1, [2])
        placed = transfers.cache.load(1, 2, 0)
        assert placed is not None
        transfer = transfers.demand(1, 2, placed.slot)
    gate.fault = EngineError("the drive is gone")
    gate.allowed.release(1)
    for _ in range(2):
        with pytest.raises(EngineError, match="the drive is gone"):
            transfers.wait(transfer)


def test_an_expert_lies_in_memory_as_its_layout_says() -> None:
    memory_B = torch.zeros(LAYOUT.bytes, dtype=torch.uint8)
    views = LAYOUT.views(memory_B)
    assert LAYOUT.bytes == 128
    assert LAYOUT.offsets == {"down_proj": 0, "down_proj_bias": 64}
    views["down_proj"].fill_(1.0)
    views["down_proj_bias"].fill_(2.0)
    assert memory_B.view(torch.float32)[:6].tolist() == [1.0] * 6
    assert memory_B.view(torch.float32)[16:19].tolist() == [2.0] * 3
    assert views["down_proj"].shape == (2, 3)
