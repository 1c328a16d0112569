"""Read files of `torch.save` from unknown writers: tensors and plain values only, never by unpickling anything else."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import zipfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.errors import UNREADABLE, TraceError, first_line
from profiler.importers.rows import MAX_PIECE_BYTES

# How much of a pickle is searched for a name.
SEARCHED_BYTES = 16 << 20
# A byte of a pickle can become an object of two hundred bytes. Arrays and tensors are few operations each, lists one per entry.
MAX_OPERATIONS = 1 << 25


def mentions(path: Path, name: str) -> bool:
    """Whether the pickle in a file of `torch.save` contains a name near its beginning; false for any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith("data.pkl")]
            if len(entries) != 1 or entries[0].compress_type != zipfile.ZIP_STORED:
                return False
            with archive.open(entries[0]) as file:
                return name.encode() in file.read(SEARCHED_BYTES)
    except (*UNREADABLE, zipfile.BadZipFile):
        return False


def load_plain(path: Path, *, arrays: bool = False) -> Any:
    """The content of a file that holds tensors and plain values only. Raises `TraceError` on any other file.

    arrays: also allow NumPy arrays of whole numbers, each of which becomes a `PickledArray`; no code of NumPy's is called.
    Compressed archives are refused, because they can be larger in memory than on disk.
    """
    import torch

    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_operations(path, archive)
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise TraceError(f"{path}: compressed entries, which torch.save does not write")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise TraceError(f"{path}: entries larger than the file")
        with torch.serialization.safe_globals(_ARRAY_NAMES if arrays else []):
            return torch.load(path, map_location="cpu", weights_only=True)
    except TraceError:
        raise
    except (*UNREADABLE, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise TraceError(f"{path} is not a torch.save file of tensors and plain values only: {first_line(error)}") from error
    except Exception as error:
        # The errors that torch raises on a broken pickle are not documented.
        raise TraceError(f"{path} cannot be read: {type(error).__name__}: {first_line(error)}") from error


def _check_operations(path: Path, archive: zipfile.ZipFile) -> None:
    for entry in archive.infolist():
        if entry.filename.endswith("data.pkl"):
            with io.BufferedReader(archive.open(entry), 1 << 20) as file:  # type: ignore[type-var] # typeshed calls it IO[bytes], not a raw stream
                operations = sum(1 for _ in islice(pickletools.genops(file), MAX_OPERATIONS + 1))
            if operations > MAX_OPERATIONS:
                raise TraceError(f"{path}: more than {MAX_OPERATIONS:,} values besides those of arrays")


class _PickledDtype:
    """What stands for `numpy.dtype` while a pickle is read: whole numbers of 1 to 8 bytes.

    NumPy's own class would also take flags, fields and subarrays from the pickle.
    """

    def __init__(self, name: object, *_: object) -> None:
        if not isinstance(name, str) or not re.fullmatch("[iu][1248]", name):
            raise ValueError(f"an array of {str(name)[:20]!r}, expected whole numbers")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise ValueError(f"an array in byte order {str(state[1])[:20]!r}")
        self.dtype = self.dtype.newbyteorder(state[1])


class PickledArray:
    """A NumPy array of whole numbers that a pickle holds: its `array`, which is read-only."""

    def __init__(self, *_: object) -> None:
        self.array: npt.NDArray[Any] = np.empty(0, np.int64)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, is_fortran, raw = state
        if not isinstance(kind, _PickledDtype) or not isinstance(raw, bytes) or not isinstance(shape, tuple):
            raise ValueError("an array that is not of whole numbers")
        if any(type(size) is not int or size < 0 for size in shape) or math.prod(shape) * kind.dtype.itemsize != len(raw):
            raise ValueError(f"an array of {len(raw):,} bytes whose shape is {str(shape)[:60]}")
        self.array = np.frombuffer(raw, dtype=kind.dtype).reshape(shape, order="F" if is_fortran else "C")


# The names in a pickle of an array, as NumPy 1 and 2 write them, and what is called instead.
_ARRAY_NAMES: list[Any] = [
    (_PickledDtype, "numpy.dtype"),
    (PickledArray, "numpy.ndarray"),
    (PickledArray, "numpy.core.multiarray._reconstruct"),
    (PickledArray, "numpy._core.multiarray._reconstruct"),
]


def tensor_array(value: object, dimensions: int, what: str, *, floating: bool = False) -> npt.NDArray[Any]:
    """A tensor of whole numbers, or with `floating` of others, as an array. Raises `TraceError`, naming `what`, on any other.

    An expanded tensor, which has more elements than its storage, is refused.
    """
    import torch

    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta or value.ndim != dimensions:
        raise TraceError(f"{what}: expected a tensor of {dimensions} dimensions")
    whole = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
    if value.dtype not in ((torch.float16, torch.bfloat16, torch.float32, torch.float64) if floating else whole):
        expected = "floating-point" if floating else "whole"
        raise TraceError(f"{what}: {value.dtype}, expected {expected} numbers")
    size = value.numel() * value.element_size()
    if size > min(value.untyped_storage().nbytes(), MAX_PIECE_BYTES):
        raise TraceError(f"{what}: more elements than its storage holds, or more than {MAX_PIECE_BYTES >> 20} MiB")
    # NumPy has no bfloat16.
    return np.asarray((value.float() if floating else value).numpy())
