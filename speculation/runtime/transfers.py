"""Transfers of experts into slots, one at a time, by a thread: those that a layer waits for first, then prefetches."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch

from profiler.errors import EngineError
from speculation.offload.cache import ExpertCache
from speculation.runtime.slots import Slots
from speculation.runtime.storage.expert_stores import ExpertStore
from speculation.runtime.storage.layout import ExpertLayout, allocate, pin, unpin

# Prefetches that may wait; a prediction that finds no room is dropped.
QUEUE = 64


@dataclass
class Transfer:
    """One transfer. Wait for it with `Transfers.wait`.

    Attributes:
        layer, expert, slot: What is transferred, and to which slot or buffer of the layer.
        is_done: Whether the expert is there.
    """

    layer: int
    expert: int
    slot: int
    is_done: bool = False


@dataclass(order=True, frozen=True)
class Prefetch:
    """An expert that is predicted: the earliest request goes first, then the one that was predicted first.

    Attributes:
        request: The request for which it is predicted.
        number: Its place among all predictions.
        layer, expert: What is predicted.
        score: The probability with which it is predicted.
    """

    request: int
    number: int
    layer: int = field(compare=False)
    expert: int = field(compare=False)
    score: float = field(compare=False)


@dataclass
class TransferCounts:
    """What was transferred so far.

    Attributes:
        bytes: Bytes that were copied to the device.
        transfers: Experts that were.
        seconds: Time that the transfers took, one after the other.
        prefetched: Prefetches that were begun.
        useful: Those that were used before they were evicted.
        dropped: Predictions that were not acted on: the queue or the cache was full, or their layer came first.
    """

    bytes: int = 0
    transfers: int = 0
    seconds: float = 0.0
    prefetched: int = 0
    useful: int = 0
    dropped: int = 0


class Transfers:
    """The thread that transfers experts, and the cache that says where to. Everything that uses the cache holds `lock`.

    A demand load goes before every prefetch, but does not interrupt the transfer in progress. A prefetch gets its slot when
    its transfer begins, as in the simulation.

    Args:
        cache: The cache.
        store: Where experts come from.
        slots: Where they go.
        layouts: The layout of each layer's experts.

    Attributes:
        lock: Held while the cache or the queues are used.
        counts: What was transferred.
    """

    def __init__(self, cache: ExpertCache, store: ExpertStore, slots: Slots, layouts: list[ExpertLayout]) -> None:
        self.cache, self._store, self._slots, self._layouts = cache, store, slots, layouts
        self.lock = threading.Condition()
        self.counts = TransferCounts()
        self._demanded: deque[Transfer] = deque()
        self._prefetches: list[Prefetch] = []
        self._waiting: set[int] = set()
        self._numbers = itertools.count()
        self._coming: dict[int, Transfer] = {}
        self._unused: set[int] = set()
        self._error: BaseException | None = None
        self._is_closed = False
        device = slots.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        # What a file is read into on its way to a GPU.
        host = torch.device("cpu")
        self._staging = {layout: allocate(layout, 1, host)[0] for layout in layouts} if self._stream else {}
        for memory in self._staging.values():
            pin(memory)
        self._last_reads: dict[Any, Any] = {}
        if self._stream is not None:
            # The slots' memory may have been in use by kernels that have not ended.
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._thread = threading.Thread(target=self._run, name="specmoe-transfer", daemon=True)
        self._thread.start()

    def demand(self, layer: int, expert: int, slot: int) -> Transfer:
        """Queue the transfer of an expert that a layer waits for. The caller holds `lock`."""
        transfer = Transfer(layer, expert, slot)
        if slot >= 0:
            # The cache has it from now on: whoever finds it there waits for its transfer, whatever becomes of this request.
            self._coming[layer * self.cache.num_experts + expert] = transfer
        self._demanded.append(transfer)
        self.lock.notify_all()
        return transfer

    def prefetch(self, layer: int, expert: int, request: int, score: float) -> None:
        """Queue an expert that is predicted for a request, unless the cache has it. The caller holds `lock`."""
        layers_ahead = request - self.cache.request
        if layers_ahead <= 0:
            self.counts.dropped += 1
            return
        self.cache.predict(layer, expert, layers_ahead)
        x = layer * self.cache.num_experts + expert
        if self.cache.slot_of_X[x] >= 0 or x in self._waiting:
            return
        if len(self._prefetches) >= QUEUE:
            self.counts.dropped += 1
            return
        heapq.heappush(self._prefetches, Prefetch(request, next(self._numbers), layer, expert, score))
        self._waiting.add(x)
        self.lock.notify_all()

    def fill(self, layer: int, expert: int) -> None:
        """Queue an expert that is computed on the host now, so that the cache has it when its layer comes again.

        The caller holds `lock`.
        """
        x = layer * self.cache.num_experts + expert
        if x in self._waiting or len(self._prefetches) >= QUEUE:
            return
        request = self.cache.request + len(self.cache.capacities)
        heapq.heappush(self._prefetches, Prefetch(request, next(self._numbers), layer, expert, 1.0))
        self._waiting.add(x)
        self.lock.notify_all()

    def coming(self, x: int) -> Transfer | None:
        """The transfer of an expert that has a slot but is not there yet; None if it is there. The caller holds `lock`."""
        if x in self._unused:
            self._unused.discard(x)
            self.counts.useful += 1
        return self._coming.get(x)

    def evicted(self, x: int) -> None:
        """Note that an expert was evicted. The caller holds `lock`."""
        self._unused.discard(x)

    def wait(self, transfer: Transfer) -> None:
        """Wait until an expert can be computed.

        Raises:
            EngineError: It could not be read.
        """
        with self.lock:
            while not transfer.is_done:
                self.check()
                self.lock.wait()

    def note_computation(self, layer: int, slots: list[int]) -> None:
        """Note that the computation that was just started reads these slots: no transfer overwrites them before it ends."""
        if self._stream is not None:
            event = torch.cuda.current_stream(self._slots.device).record_event()
            self._last_reads.update({self._place(layer, slot): event for slot in slots})

    def settle(self) -> None:
        """Wait until no transfer is queued or in progress."""
        with self.lock:
            while self._demanded or self._prefetches or self._coming:
                self.check()
                self.lock.wait(0.01)

    def close(self) -> None:
        """Stop the thread. Queued transfers are dropped."""
        with self.lock:
            self._is_closed = True
            self.lock.notify_all()
        self._thread.join()
        for memory in self._staging.values():
            unpin(memory)
        self._staging.clear()

    @property
    def wasted(self) -> int:
        """Prefetches that were begun and not used, evicted or not."""
        return self.counts.prefetched - self.counts.useful

    def check(self) -> None:
        """Raise what ended the transfers, if anything did: what is in the slots cannot be relied on any more."""
        if self._error is not None:
            raise self._error

    def break_off(self, error: BaseException) -> None:
        """Note that the cache and the transfers do not fit together any more, because changing them was interrupted."""
        with self.lock:
            self._error = self._error or EngineError(
                f"an earlier call was interrupted while the cache was changed ({type(error).__name__}): load the model again"
            )
            self.lock.notify_all()

    def _place(self, layer: int, slot: int) -> Any:
        """What identifies the memory of a slot, or of a buffer, which layers of one kind share."""
        return slot if slot >= 0 else (self._layouts[layer], slot)

    def _run(self) -> None:
        try:
            while True:
                with self.lock:
                    while not (self._is_closed or self._demanded or self._prefetches):
                        self.lock.wait()
                    if self._is_closed:
                        return
                    transfer = self._demanded.popleft() if self._demanded else self._begin_prefetch()
                if transfer is None:
                    continue
                began = time.perf_counter()
                self._copy(transfer)
                # Without the time until the thread that computes gives way: the transfer is over.
                seconds = time.perf_counter() - began
                with self.lock:
                    self.counts.seconds += seconds
                    self.counts.transfers += 1
                    transfer.is_done = True
                    x = transfer.layer * self.cache.num_experts + transfer.expert
                    if self._coming.get(x) is transfer:
                        del self._coming[x]
                        self.cache.arrive(transfer.layer, transfer.expert)
                    self.lock.notify_all()
        except BaseException as error:  # whoever waits raises it
            with self.lock:
                self._error = error
                self.lock.notify_all()

    def _begin_prefetch(self) -> Transfer | None:
        """Give the next prefetch a slot; None if it is not needed any more or finds no room."""
        cache, wanted = self.cache, heapq.heappop(self._prefetches)
        x = wanted.layer * cache.num_experts + wanted.expert
        self._waiting.discard(x)
        if cache.slot_of_X[x] >= 0:
            return None
        layers_ahead = wanted.request - cache.request
        placed = (
            cache.load(wanted.layer, wanted.expert, 0, layers_ahead, wanted.score, coming=True) if layers_ahead > 0 else None
        )
        if placed is None:
            self.counts.dropped += 1
            return None
        if placed.evicted is not None:
            self.evicted(placed.evicted)
        self.counts.prefetched += 1
        self._unused.add(x)
        self._coming[x] = Transfer(wanted.layer, wanted.expert, placed.slot)
        return self._coming[x]

    def _copy(self, transfer: Transfer) -> None:
        """Transfer an expert, and wait until it is there."""
        memory_B = self._slots.memory(transfer.layer, transfer.slot)
        x = transfer.layer * self.cache.num_experts + transfer.expert
        self.counts.bytes += len(memory_B)
        if self._stream is None:
            self._store.read(x, memory_B)
            return
        held_B = self._store.held(x)
        if held_B is None:
            held_B = self._staging[self._layouts[transfer.layer]]
            self._store.read(x, held_B)
        last_read = self._last_reads.get(self._place(transfer.layer, transfer.slot))
        with torch.cuda.stream(self._stream):
            if last_read is not None:
                self._stream.wait_event(last_read)
            memory_B.copy_(held_B, non_blocking=True)
            event = self._stream.record_event()
        # One transfer at a time: so a demand load does not wait for prefetches that were issued before, and the staging memory
        # is free again.
        event.synchronize()
