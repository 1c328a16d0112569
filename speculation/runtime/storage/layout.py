"""How one expert lies in memory: its weights one after the other, as it is copied; plain, or in a packed form."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Protocol

import torch

from profiler.errors import EngineError

# Each weight begins at a multiple of so many bytes, so that kernels get the alignment that they get from an allocator.
ALIGNMENT = 64

# The weights of one expert, by name.
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Weight:
    """One weight of an expert, such as its `down_proj`.

    Attributes:
        name: The name of the parameter in the experts module, whose first dimension is the expert.
        shape: The shape of one expert's part of it.
        dtype: Its type on the device.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix of one expert, rather than a bias: only these are packed."""
        return len(self.shape) == 2


class Packing(Protocol):
    """A form of an expert with fewer bytes, in which it is kept, transferred and cached. It is unpacked to be computed.

    Implementations are frozen dataclasses, because layouts are compared.
    """

    @property
    def plain(self) -> ExpertLayout:
        """The expert as it is computed."""
        ...

    @property
    def layout(self) -> ExpertLayout:
        """The packed expert. Its `packing` is this one."""
        ...

    @property
    def scratch_bytes(self) -> int:
        """The most memory that `unpack` takes in between, besides both arguments."""
        ...

    def unpack(self, packed: Weights, into: Weights) -> None:
        """Unpack an expert.

        Args:
            packed: Its weights, laid out as `layout` says.
            into: Memory for its weights on the same device, laid out as `plain` says.
        """
        ...


@dataclass(frozen=True)
class ExpertLayout:
    """The weights of one expert of a layer, and where each of them lies in its memory.

    Attributes:
        weights: The weights in order.
        packing: How they are unpacked to be computed; None if they are computed as they are.
    """

    weights: tuple[Weight, ...]
    packing: Packing | None = None

    @cached_property
    def offsets(self) -> dict[str, int]:
        """The first byte of each weight, by name."""
        found, end = {}, 0
        for weight in self.weights:
            found[weight.name] = end
            end = _aligned(end + weight.bytes)
        return found

    @cached_property
    def bytes(self) -> int:
        """The size of one expert's memory: its weights, each rounded up to `ALIGNMENT`."""
        return sum(_aligned(weight.bytes) for weight in self.weights)

    def views(self, memory_B: torch.Tensor) -> Weights:
        """The weights in an expert's memory, by name.

        Args:
            memory_B: uint8 `[bytes]`.
        """
        return {
            weight.name: memory_B[start : start + weight.bytes].view(weight.dtype).view(weight.shape)
            for weight, start in zip(self.weights, self.offsets.values(), strict=True)
        }


@torch.inference_mode(False)
def allocate(layout: ExpertLayout, count: int, device: torch.device) -> torch.Tensor:
    """Memory of `count` experts, uint8 `[count, bytes]`, aligned, with undefined content."""
    if device.type == "cuda":
        # Its allocator aligns to 256 bytes and more.
        return torch.empty((count, layout.bytes), dtype=torch.uint8, device=device)
    flat_B = torch.empty(count * layout.bytes + ALIGNMENT, dtype=torch.uint8)
    start = -flat_B.data_ptr() % ALIGNMENT
    return flat_B[start : start + count * layout.bytes].view(count, layout.bytes)


def pin(memory: torch.Tensor) -> None:
    """Page-lock host memory, so that a GPU copies from it directly and while the program continues.

    PyTorch's own allocator of pinned memory rounds sizes up to powers of two, which can be twice of what a layer needs.

    Raises:
        EngineError: The operating system does not lock that much.
    """
    status = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))  # type: ignore[no-untyped-call] # not annotated
    if status:
        raise EngineError(
            f"{memory.nbytes / 1e9:.1f} GB of host memory cannot be pinned (CUDA error {status}): raise the limit of locked "
            "memory (ulimit -l), or keep the experts on disk"
        )


def unpin(memory: torch.Tensor) -> None:
    """Undo `pin`."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call] # not annotated


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
