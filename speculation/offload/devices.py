"""Devices that a replay runs on: a GPU, or this machine's CPU with two threads.

A device holds experts in slots. Transfers from host memory overlap with computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch

from profiler.errors import SpecmoeError

# Distinct experts in host memory, and other weights on the device: far more than any CPU cache holds, less than a whole model.
DUMMY_BYTES = 2 << 30
# A CUDA event or a future: marks the end of a transfer or a computation.
Event = Any


class Device(Protocol):
    """Runs transfers and computation asynchronously. Transfers keep their order, and so do computations.

    Methods that start something return the event of its end.
    """

    name: str

    def copy(self, slot: int, expert: int, after: Event | None) -> Event:
        """Transfer an expert from host memory into a slot, once the computation `after` is done."""
        ...

    def compute_experts(self, slots: Sequence[int], after: Sequence[Event]) -> Event:
        """Compute the experts in these slots, once the transfers `after` are done."""
        ...

    def compute_rest(self, layer: int) -> Event:
        """Compute everything of a layer but its experts."""
        ...

    def wait(self, event: Event) -> None:
        """Block until the event, as one must for a router's output."""
        ...

    def is_done(self, event: Event) -> bool:
        """Whether the event has happened."""
        ...

    def close(self) -> None:
        """Finish all work and stop the threads."""
        ...


class _DummyWeights:
    """Experts in host memory; slots and a layer's other weights on the device. All are bfloat16 matrices `[rows, D]`."""

    def __init__(self, device: str, slots: int, expert_bytes: int, rest_bytes: int, layers: int, width: int) -> None:
        is_cuda = device == "cuda"
        rows, rest_rows = (max(1, round(size / 2 / width)) for size in (expert_bytes, rest_bytes))
        distinct = max(2, min(256, DUMMY_BYTES // (2 * rows * width)))
        self.host = [torch.randn(rows, width, dtype=torch.float32).bfloat16() for _ in range(distinct)]
        if is_cuda:
            self.host = [tensor.pin_memory() for tensor in self.host]
        self.slots = torch.zeros(max(1, slots), rows, width, dtype=torch.bfloat16, device=device)
        rest_layers = max(1, min(layers, DUMMY_BYTES // (2 * rest_rows * width)))
        self.rest = torch.zeros(rest_layers, rest_rows, width, dtype=torch.bfloat16, device=device)
        self.state = torch.ones(width, dtype=torch.bfloat16, device=device)


class Cuda:
    """A GPU: pinned host memory, one stream for transfers and one for computation."""

    def __init__(self, slots: int, expert_bytes: int, rest_bytes: int, layers: int, width: int) -> None:
        if not torch.cuda.is_available():
            raise SpecmoeError("PyTorch finds no CUDA GPU on this machine: replay on the CPU instead")
        self.name = torch.cuda.get_device_name(0)
        self._weights = _DummyWeights("cuda", slots, expert_bytes, rest_bytes, layers, width)
        # mypy: torch's streams have no type annotations.
        self._transfers, self._compute = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call] # not annotated

    def copy(self, slot: int, expert: int, after: Event | None) -> Event:
        weights = self._weights
        if after is not None:
            self._transfers.wait_event(after)
        with torch.cuda.stream(self._transfers):
            weights.slots[slot].copy_(weights.host[expert % len(weights.host)], non_blocking=True)
        return self._transfers.record_event()

    def compute_experts(self, slots: Sequence[int], after: Sequence[Event]) -> Event:
        for event in after:
            self._compute.wait_event(event)
        with torch.cuda.stream(self._compute):
            for slot in slots:
                torch.mv(self._weights.slots[slot], self._weights.state)
        return self._compute.record_event()

    def compute_rest(self, layer: int) -> Event:
        with torch.cuda.stream(self._compute):
            torch.mv(self._weights.rest[layer % len(self._weights.rest)], self._weights.state)
        return self._compute.record_event()

    def wait(self, event: Event) -> None:
        event.synchronize()

    def is_done(self, event: Event) -> bool:
        return bool(event.query())

    def close(self) -> None:
        torch.cuda.synchronize()


class Cpu:
    """This machine's CPU: one thread copies within host memory, another computes."""

    name = "CPU"

    def __init__(self, slots: int, expert_bytes: int, rest_bytes: int, layers: int, width: int) -> None:
        self._weights = _DummyWeights("cpu", slots, expert_bytes, rest_bytes, layers, width)
        self._transfers, self._compute = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def copy(self, slot: int, expert: int, after: Event | None) -> Event:
        def run() -> None:
            if after is not None:
                after.result()
            weights = self._weights
            weights.slots[slot].copy_(weights.host[expert % len(weights.host)])

        return self._transfers.submit(run)

    def compute_experts(self, slots: Sequence[int], after: Sequence[Event]) -> Event:
        def run() -> None:
            for event in after:
                event.result()
            for slot in slots:
                torch.mv(self._weights.slots[slot], self._weights.state)

        return self._compute.submit(run)

    def compute_rest(self, layer: int) -> Event:
        matrix = self._weights.rest[layer % len(self._weights.rest)]
        future: Future[Any] = self._compute.submit(torch.mv, matrix, self._weights.state)
        return future

    def wait(self, event: Event) -> None:
        event.result()

    def is_done(self, event: Event) -> bool:
        return bool(event.done())

    def close(self) -> None:
        self._transfers.shutdown()
        self._compute.shutdown()
