"""A device with experts in slots, copied from host memory beside the products: a GPU, or this processor with two threads."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch

from profiler.errors import SpecmoeError

# Distinct experts and layers in host memory: more than any cache near the processor holds, less than a whole model.
HOST_BYTES = 2 << 30
Ticket = Any


class Device(Protocol):
    """Copies and products go on by themselves, each kind in its order; a ticket says when one is over."""

    name: str

    def copy(self, slot: int, expert: int, after: Ticket | None) -> Ticket:
        """Begin to copy an expert into a slot, when the product `after` is over."""
        ...

    def experts(self, slots: Sequence[int], tickets: Sequence[Ticket]) -> Ticket:
        """Begin the products of these slots' experts, when the copies are over."""
        ...

    def rest(self, layer: int) -> Ticket:
        """Begin the products of what is not experts."""
        ...

    def wait(self, ticket: Ticket) -> None:
        """Return when it is over, as for a router's answer."""
        ...

    def is_over(self, ticket: Ticket) -> bool:
        """Whether it is."""
        ...

    def close(self) -> None:
        """Give back threads."""
        ...


class _Memory:
    """Experts in host memory, slots and other weights on the device, all bfloat16 matrices `[N, D]`."""

    def __init__(self, device: str, slots: int, expert_bytes: int, rest_bytes: int, layers: int, width: int) -> None:
        is_cuda = device == "cuda"
        rows, rest_rows = (max(1, round(size / 2 / width)) for size in (expert_bytes, rest_bytes))
        distinct = max(2, min(256, HOST_BYTES // (2 * rows * width)))
        self.host = [torch.randn(rows, width, dtype=torch.float32).bfloat16() for _ in range(distinct)]
        if is_cuda:
            self.host = [tensor.pin_memory() for tensor in self.host]
        self.slots = torch.zeros(max(1, slots), rows, width, dtype=torch.bfloat16, device=device)
        some = max(1, min(layers, HOST_BYTES // (2 * rest_rows * width)))
        self.rest = torch.zeros(some, rest_rows, width, dtype=torch.bfloat16, device=device)
        self.state = torch.ones(width, dtype=torch.bfloat16, device=device)


class Cuda:
    """A GPU: pinned host memory, a stream for copies, one for products."""

    def __init__(self, slots: int, expert_bytes: int, rest_bytes: int, layers: int, width: int) -> None:
        if not torch.cuda.is_available():
            raise SpecmoeError("no GPU here: use --on cpu")
        self.name = torch.cuda.get_device_name(0)
        self._memory = _Memory("cuda", slots, expert_bytes, rest_bytes, layers, width)
        # mypy: torch gives streams no types.
        self._copies, self._products = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def copy(self, slot: int, expert: int, after: Ticket | None) -> Ticket:
        memory = self._memory
        if after is not None:
            self._copies.wait_event(after)
        with torch.cuda.stream(self._copies):
            memory.slots[slot].copy_(memory.host[expert % len(memory.host)], non_blocking=True)
        return self._copies.record_event()

    def experts(self, slots: Sequence[int], tickets: Sequence[Ticket]) -> Ticket:
        for ticket in tickets:
            self._products.wait_event(ticket)
        with torch.cuda.stream(self._products):
            for slot in slots:
                torch.mv(self._memory.slots[slot], self._memory.state)
        return self._products.record_event()

    def rest(self, layer: int) -> Ticket:
        with torch.cuda.stream(self._products):
            torch.mv(self._memory.rest[layer % len(self._memory.rest)], self._memory.state)
        return self._products.record_event()

    def wait(self, ticket: Ticket) -> None:
        ticket.synchronize()

    def is_over(self, ticket: Ticket) -> bool:
        return bool(ticket.query())

    def close(self) -> None:
        torch.cuda.synchronize()


class Processor:
    """This machine's processor: a thread copies within its memory, another computes."""

    name = "CPU"

    def __init__(self, slots: int, expert_bytes: int, rest_bytes: int, layers: int, width: int) -> None:
        self._memory = _Memory("cpu", slots, expert_bytes, rest_bytes, layers, width)
        self._copies, self._products = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def copy(self, slot: int, expert: int, after: Ticket | None) -> Ticket:
        def run() -> None:
            if after is not None:
                after.result()
            memory = self._memory
            memory.slots[slot].copy_(memory.host[expert % len(memory.host)])

        return self._copies.submit(run)

    def experts(self, slots: Sequence[int], tickets: Sequence[Ticket]) -> Ticket:
        def run() -> None:
            for ticket in tickets:
                ticket.result()
            for slot in slots:
                torch.mv(self._memory.slots[slot], self._memory.state)

        return self._products.submit(run)

    def rest(self, layer: int) -> Ticket:
        matrix = self._memory.rest[layer % len(self._memory.rest)]
        future: Future[Any] = self._products.submit(torch.mv, matrix, self._memory.state)
        return future

    def wait(self, ticket: Ticket) -> None:
        ticket.result()

    def is_over(self, ticket: Ticket) -> bool:
        return bool(ticket.done())

    def close(self) -> None:
        self._copies.shutdown()
        self._products.shutdown()
