"""Where experts are kept that are not on the device: in the checkpoint's files, or in host memory; as they are, or packed."""

from __future__ import annotations

import mmap
import os
import threading
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from profiler.errors import EngineError
from speculation.runtime.storage.checkpoint import StoredExpert, StoredTensor
from speculation.runtime.storage.integer_groups import IntegerGroups
from speculation.runtime.storage.layout import ExpertLayout, allocate, pin, unpin

# Reads that bypass the page cache begin and end at multiples of this, in the file and in memory.
BLOCK = 4096
# A read is divided among this many threads, in pieces of this size: a single one leaves a drive idle between its requests.
READERS, PIECE = 4, 1 << 20

Bytes = npt.NDArray[np.uint8]


class ExpertStore(Protocol):
    """All experts of a model. Experts are numbered `layer * E + expert`, counted over the MoE layers.

    Several threads may read at the same time. `close` must not be called while one does.
    """

    @property
    def bytes_read(self) -> int:
        """Bytes that were read from files so far."""
        ...

    def read(self, x: int, memory_B: torch.Tensor) -> None:
        """Copy an expert into host memory.

        Args:
            x: The expert.
            memory_B: uint8 `[bytes]` in host memory, laid out as `ExpertLayout` says.

        Raises:
            EngineError: It cannot be read, or is not what it was.
        """
        ...

    def held(self, x: int) -> torch.Tensor | None:
        """The expert's memory, uint8 `[bytes]`, if this store has it in host memory; else None."""
        ...

    def close(self) -> None:
        """Close files and stop threads."""
        ...


class DiskStore:
    """Experts in the safetensors files of a checkpoint, which are read again for every transfer.

    A file that is changed, replaced, removed or cut off while it is open is an error, and so is an expert whose content is not
    what it was when it was first read.

    Args:
        layouts: The layout of each layer's experts.
        experts: Where the checkpoint has each expert, by number.
        direct: Whether reads bypass the operating system's page cache. Where the file system does not support that, they do
            not.

    Attributes:
        bytes_read: Bytes that were read from files so far.

    Raises:
        EngineError: A file cannot be opened.
    """

    def __init__(self, layouts: Sequence[ExpertLayout], experts: Sequence[StoredExpert], *, direct: bool) -> None:
        self._layouts, self._experts = layouts, experts
        self._per_layer = len(experts) // len(layouts)
        self._files: dict[Path, _File] = {}
        try:
            for path in dict.fromkeys(_paths(experts)):
                self._files[path] = _File(path, direct=direct)
        except BaseException:
            for file in self._files.values():
                file.close()
            raise
        self.direct = direct and all(file.direct for file in self._files.values())
        self._checksums: dict[int, tuple[int, ...]] = {}
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="specmoe-read")
        self._scratch = _Scratch()
        self._counting = threading.Lock()
        self.bytes_read = 0

    def read(self, x: int, memory_B: torch.Tensor) -> None:
        layout, memory = self._layouts[x // self._per_layer], memory_B.numpy()
        pieces: list[tuple[StoredTensor, Bytes]] = []
        converted = []
        for stored in self._experts[x]:
            place = layout.offsets[stored.weight.name]
            if stored.is_plain:
                targets = memory[place : place + stored.weight.bytes]
                for tensor in stored.tensors:
                    pieces.append((tensor, targets[: tensor.bytes]))
                    targets = targets[tensor.bytes :]
            else:
                raw = [np.empty(tensor.bytes, dtype=np.uint8) for tensor in stored.tensors]
                pieces += zip(stored.tensors, raw, strict=True)
                converted.append((stored, raw, place))
        self._check(x, pieces, self._read_all(pieces))
        for stored, raw, place in converted:
            tensors = [
                torch.from_numpy(part).view(tensor.dtype).view(tensor.shape)
                for tensor, part in zip(stored.tensors, raw, strict=True)
            ]
            weight = stored.convert(tensors).contiguous()
            memory[place : place + stored.weight.bytes] = weight.view(-1).view(torch.uint8).numpy()

    def held(self, x: int) -> torch.Tensor | None:
        return None

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _read_all(self, pieces: Sequence[tuple[StoredTensor, Bytes]]) -> tuple[int, ...]:
        """Read tensors into memory, in pieces by several threads; return the pieces' checksums."""
        work = [
            (self._files[tensor.file], tensor.start + start, target[start : start + PIECE])
            for tensor, target in pieces
            for start in range(0, len(target), PIECE)
        ]
        with self._counting:
            self.bytes_read += sum(len(target) for _, target in pieces)
        return tuple(self._pool.map(self._read_piece, work))

    def _read_piece(self, piece: tuple[_File, int, Bytes]) -> int:
        file, start, target = piece
        file.read(start, target, self._scratch)
        return zlib.crc32(target.data)

    def _check(self, x: int, pieces: Sequence[tuple[StoredTensor, Bytes]], checksums: tuple[int, ...]) -> None:
        """Compare an expert with its first read, and its files with what they were."""
        for path in dict.fromkeys(tensor.file for tensor, _ in pieces):
            self._files[path].check()
        if self._checksums.setdefault(x, checksums) != checksums:
            file = pieces[0][0].file
            raise EngineError(
                f"{file}: expert {x % self._per_layer} of MoE layer {x // self._per_layer} is not what was read before: the "
                "file or the drive is damaged; check it, and download the checkpoint again"
            )


class PackingStore:
    """The experts of a checkpoint in a packed form. They are packed again at each read, one at a time: other reads wait.

    Args:
        disk: The checkpoint.
        packings: The form of each layer's experts.
        num_experts: E, the experts of a layer.
    """

    def __init__(self, disk: ExpertStore, packings: Sequence[IntegerGroups], num_experts: int) -> None:
        self._disk, self._packings, self._num_experts = disk, packings, num_experts
        self._plain = {each: allocate(each, 1, torch.device("cpu"))[0] for each in {packing.plain for packing in packings}}
        # Reads share the memory of the plain expert.
        self._reading = threading.Lock()

    @property
    def bytes_read(self) -> int:
        """Bytes that were read from files so far."""
        return self._disk.bytes_read

    def read(self, x: int, memory_B: torch.Tensor) -> None:
        layer, expert = divmod(x, self._num_experts)
        packing = self._packings[layer]
        plain_B = self._plain[packing.plain]
        with self._reading:
            self._disk.read(x, plain_B)
            try:
                packing.pack(packing.plain.views(plain_B), packing.layout.views(memory_B))
            except ValueError as error:
                raise EngineError(
                    f"expert {expert} of MoE layer {layer} cannot be rounded to {packing.bits} bits: {error}"
                ) from error

    def held(self, x: int) -> torch.Tensor | None:
        return None

    def close(self) -> None:
        self._disk.close()


class HostStore:
    """Experts in host memory, read from a checkpoint once.

    Args:
        source: The checkpoint.
        layouts: The layout of each layer's experts.
        num_experts: E, the experts of a layer.
        pinned: Whether the memory is page-locked, as fast transfers to a GPU need.

    Attributes:
        bytes_read: Bytes that were read from files.
    """

    def __init__(self, source: ExpertStore, layouts: Sequence[ExpertLayout], num_experts: int, *, pinned: bool) -> None:
        self._num_experts = num_experts
        self._memory: list[torch.Tensor] = []
        self._pinned: list[torch.Tensor] = []
        try:
            _check_memory(sum(layout.bytes for layout in layouts) * num_experts)
            for layout in layouts:
                self._memory.append(allocate(layout, num_experts, torch.device("cpu")))
                if pinned:
                    pin(self._memory[-1])
                    self._pinned.append(self._memory[-1])
            for x in range(len(layouts) * num_experts):
                source.read(x, self.held(x))
        except BaseException:
            self.close()
            raise
        finally:
            source.close()
        self.bytes_read = source.bytes_read

    def read(self, x: int, memory_B: torch.Tensor) -> None:
        memory_B.copy_(self.held(x))

    def held(self, x: int) -> torch.Tensor:
        return self._memory[x // self._num_experts][x % self._num_experts]

    def close(self) -> None:
        for memory in self._pinned:
            unpin(memory)
        self._pinned.clear()
        self._memory.clear()


def _check_memory(size: int) -> None:
    """Raise `EngineError` if all experts do not fit into the memory that is available."""
    import psutil

    available = psutil.virtual_memory().available
    if size > available:
        raise EngineError(
            f"the experts take {size / 1e9:.1f} GB, and {available / 1e9:.1f} GB of memory are available: keep them on disk "
            "(store disk)"
        )


def faster_direct(layouts: Sequence[ExpertLayout], experts: Sequence[StoredExpert], seconds: float = 0.5) -> bool:
    """Whether reads that bypass the page cache are faster here, measured on experts that are spread over the model.

    The page cache wins where it holds the checkpoint. Each kind of read gets half of the time, and its own experts.
    """
    speeds = []
    chosen = np.linspace(0, len(experts) - 1, num=min(len(experts), 64)).astype(int).tolist()
    for direct in (True, False):
        store = DiskStore(layouts, experts, direct=direct)
        try:
            if direct and not store.direct:
                return False
            memory = {layout: allocate(layout, 1, torch.device("cpu"))[0] for layout in layouts}
            began, read = time.perf_counter(), 0
            for x in chosen[direct::2] or chosen:
                layout = layouts[x // (len(experts) // len(layouts))]
                store.read(x, memory[layout])
                read += layout.bytes
                if time.perf_counter() - began > seconds / 2:
                    break
            speeds.append(read / (time.perf_counter() - began))
        finally:
            store.close()
    return speeds[0] > speeds[1]


class _Scratch:
    """Aligned memory for reads that bypass the page cache, one for each thread that reads."""

    def __init__(self) -> None:
        self._own = threading.local()

    def get(self) -> tuple[mmap.mmap, Bytes]:
        """This thread's, and the same as an array: a piece, and a block before and after it."""
        if not hasattr(self._own, "memory"):
            memory = mmap.mmap(-1, PIECE + 2 * BLOCK)
            self._own.memory, self._own.array = memory, np.frombuffer(memory, dtype=np.uint8)
        return self._own.memory, self._own.array


class _File:
    """An open file that must not change."""

    def __init__(self, path: Path, *, direct: bool) -> None:
        self.path = path
        self.direct = False
        try:
            if direct and hasattr(os, "O_DIRECT"):
                try:
                    self._handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
                    self.direct = True
                except OSError:
                    # Some file systems have no such reads.
                    self._handle = os.open(path, os.O_RDONLY)
            else:
                self._handle = os.open(path, os.O_RDONLY)
            self._opened = os.fstat(self._handle)
        except OSError as error:
            raise EngineError(f"{path} cannot be opened: {error.strerror}") from error

    def read(self, start: int, target: Bytes, scratch: _Scratch) -> None:
        """Fill `target` with the file's content from byte `start` on."""
        try:
            if not self.direct:
                self._fill(start, target)
                return
            first = start // BLOCK * BLOCK
            size = -(-(start + len(target) - first) // BLOCK) * BLOCK
            memory, array = scratch.get()
            found = 0
            with memoryview(memory) as view:
                while found < start - first + len(target):
                    # A read can end early, at a multiple of the block unless the file ends.
                    more = os.preadv(self._handle, [view[found:size]], first + found)
                    if not more or ((found + more) % BLOCK and found + more < start - first + len(target)):
                        raise self._cut_off(first + found + more)
                    found += more
            target[:] = array[start - first : start - first + len(target)]
        except OSError as error:
            raise EngineError(f"{self.path} cannot be read: {error.strerror}") from error

    def _fill(self, start: int, target: Bytes) -> None:
        done = 0
        while done < len(target):
            found = os.preadv(self._handle, [target[done:].data], start + done)
            if not found:
                raise self._cut_off(start + done)
            done += found

    def _cut_off(self, end: int) -> EngineError:
        return EngineError(f"{self.path} ends after {end:,} bytes, where an expert was expected: it was cut off while in use")

    def check(self) -> None:
        """Raise `EngineError` if the file is not what it was when it was opened."""
        now, opened = os.fstat(self._handle), self._opened
        is_removed = now.st_nlink < opened.st_nlink
        if (now.st_size, now.st_mtime_ns) != (opened.st_size, opened.st_mtime_ns) or is_removed:
            what = "removed" if is_removed else "changed"
            raise EngineError(f"{self.path} was {what} while its experts were in use: restore it and start again")

    def close(self) -> None:
        os.close(self._handle)


def _paths(experts: Sequence[StoredExpert]) -> list[Path]:
    return [tensor.file for expert in experts for stored in expert for tensor in stored.tensors]
