"""Measure what a miss costs on this machine: the computation of an expert on the CPU, and its read from storage."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch.nn import functional

from profiler.errors import SpecmoeError, counted
from speculation.offload.costs import HOST_LATENCY, Costs
from speculation.offload.devices import DUMMY_BYTES

# Every measurement is a median of at most so many repetitions.
REPEATS, WARM_UP = 20, 3
# The file that is read: large enough for several experts, small enough for a temporary directory.
FILE_BYTES = 1 << 30
# Direct reads need offsets, lengths and buffers that are multiples of the drive's block; no drive's is larger than a page.
_PAGE = mmap.PAGESIZE


@dataclass(frozen=True)
class StorageMeasurement:
    """seconds: median of reading one expert. is_direct: the reads bypassed the operating system's page cache."""

    seconds: float
    is_direct: bool


def measured_on_host(costs: Costs, width: int, folder: Path | None = None, *, storage: bool) -> Costs:
    """Add measured times of computing an expert on this CPU and, if requested, of reading one from storage.

    Args:
        costs: Costs with the size of an expert.
        width: D, the hidden size.
        folder: Where to write the file that is read, and deleted again. Default: the temporary directory.
        storage: Whether to measure storage.

    Raises:
        SpecmoeError: The file cannot be written.
    """
    size = int(costs.expert_bytes)
    seconds = host_seconds(size, width)
    lines = [
        f"measured on this machine: an expert on the CPU, {counted(torch.get_num_threads(), 'thread')}, "
        f"{size / 1e9 / max(seconds, 1e-9):.1f} GB/s (one token, bfloat16); {HOST_LATENCY * 1e6:.0f} µs per layer for "
        "activations and synchronization (assumed)"
    ]
    read = None
    if storage:
        where = Path(tempfile.gettempdir()) if folder is None else folder
        found = read_seconds(size, where)
        read = found.seconds
        how = "direct reads" if found.is_direct else "BUFFERED reads, perhaps from memory: direct ones are not possible there"
        lines.append(f"measured on this machine: an expert from {where}, {size / 1e9 / max(read, 1e-9):.2f} GB/s ({how})")
    return replace(
        costs,
        host_expert_seconds=seconds,
        host_token_seconds=0.0,
        host_latency=HOST_LATENCY,
        storage_seconds=read,
        assumptions=(*costs.assumptions, *lines),
    )


def host_seconds(expert_bytes: int, width: int) -> float:
    """Seconds in which this CPU multiplies a vector by one expert's weights, in bfloat16 with all threads of PyTorch.

    The experts take turns, and are together far larger than a CPU's caches.
    """
    rows = max(1, round(expert_bytes / 2 / width))
    count = max(2, min(256, DUMMY_BYTES // (2 * rows * width)))
    # Ones, not zeros: untouched zeros of several experts would be one page of memory.
    experts = [torch.ones(rows, width, dtype=torch.bfloat16) for _ in range(count)]
    state = torch.ones(1, width, dtype=torch.bfloat16)
    # With two threads `linear` was measured to be faster than `mv`.
    return _median_seconds(lambda turn: functional.linear(state, experts[turn % len(experts)]), REPEATS + WARM_UP)


def read_seconds(expert_bytes: int, folder: Path) -> StorageMeasurement:
    """Seconds in which a block of an expert's size is read from a file in `folder`, whose blocks are each read once.

    Raises:
        SpecmoeError: The file cannot be written.
    """
    length = -(-max(1, expert_bytes) // _PAGE) * _PAGE
    blocks = max(2, min(REPEATS + WARM_UP, FILE_BYTES // length))
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="specmoe-read-") as file:
            for _ in range(blocks):
                # Random: some drives and file systems compress.
                file.write(os.urandom(length))
            file.flush()
            os.fsync(file.fileno())
            return _timed_reads(Path(file.name), length, blocks)
    except OSError as error:
        raise SpecmoeError(
            f"{folder}: cannot measure storage with a file of {blocks * length / 1e9:.1f} GB: {error}"
        ) from error


def _timed_reads(path: Path, length: int, blocks: int) -> StorageMeasurement:
    # Anonymous memory starts at a page.
    with mmap.mmap(-1, length) as buffer:
        try:
            return StorageMeasurement(_time_blocks(path, getattr(os, "O_DIRECT", 0), buffer, blocks), hasattr(os, "O_DIRECT"))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # The file system has no direct reads.
            return StorageMeasurement(_time_blocks(path, 0, buffer, blocks), False)


def _time_blocks(path: Path, flags: int, buffer: mmap.mmap, blocks: int) -> float:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

        def read(turn: int) -> None:
            done = os.preadv(descriptor, [buffer], turn * len(buffer))
            if done != len(buffer):
                raise OSError(errno.EIO, f"read {done} of {len(buffer)} bytes")

        return _median_seconds(read, blocks)
    finally:
        os.close(descriptor)


def _median_seconds(run: Callable[[int], object], turns: int) -> float:
    """The median time of the calls `run(0)` to `run(turns - 1)`, without up to `WARM_UP` first ones."""
    seconds = []
    for turn in range(turns):
        began = time.perf_counter()
        run(turn)
        seconds.append(time.perf_counter() - began)
    return median(seconds[min(WARM_UP, turns - 1) :])
