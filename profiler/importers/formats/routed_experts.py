"""Import vLLM's `routed_experts`: integer arrays `[T, L, K]` as `.npy`, `.npz` (one sequence per array), or a folder of them.

There are no weights. L is the number of decoder layers: dense ones are all 0 or all -1. Positions from a prefix cache are -1.
The last generated token has no row. Whether the prompt is included depends on the release; the array does not show it.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.errors import TraceError, first_line
from profiler.importers.reading import NOT_AN_ARRAY, files_in, sources_of
from profiler.importers.rows import EMPTY, MAX_LAYER, MAX_PIECE_BYTES
from profiler.importers.target import Target
from profiler.trace.schema import MAX_TOP_K

NAME = "routed-experts"
ABOUT = "vLLM's routed_experts arrays [T, L, K]: .npy, .npz, or a folder of them; no weights"
KINDS = ("file", "folder")

PATTERNS = ("*.npy", "*.npz")
# Arrays are processed in slices of about this many ids.
SLICE_IDS = 1 << 20
ZIP_MAGIC = b"PK\x03\x04"


def detect(source: Path) -> bool:
    return (source.suffix in {".npy", ".npz"} and source.is_file()) or (source.is_dir() and bool(files_in(source, *PATTERNS)))


def read(source: Path, target: Target) -> None:
    layers, dense = _moe_layers(source)
    if not layers:
        raise TraceError(f"{source}: every layer is 0 or -1 throughout, as dense layers are")
    target.gaps.append("layers are numbered as in the array; it is unknown whether the prompt is included")
    if dense:
        target.gaps.append(f"layers that are 0 or -1 throughout were taken as dense: {','.join(map(str, dense))}")
    for name, array_TLK in _arrays(source):
        problem_id = target.problem("routed-experts", name)
        for start in range(0, len(array_TLK), _tokens_per_slice(array_TLK)):
            piece_TLK = np.asarray(array_TLK[start : start + _tokens_per_slice(array_TLK)][:, layers])
            positions_T = np.arange(start, start + len(piece_TLK))
            # A position from the prefix cache has no expert at any layer.
            present_T = ~(piece_TLK == EMPTY).all((1, 2))
            where = f"{source}, {name}, tokens {start}..{start + len(piece_TLK) - 1}"
            if present_T.any():
                target.add_arrays(problem_id, positions_T[present_T], layers, piece_TLK[present_T], None, where)


def _moe_layers(source: Path) -> tuple[list[int], list[int]]:
    """The layers with experts, and the dense layers: those that are 0 or -1 throughout."""
    layers: set[int] = set()
    shapes = set()
    for name, array_TLK in _arrays(source):
        shapes.add(array_TLK.shape[1:])
        if len(shapes) > 1:
            raise TraceError(f"{source}, {name}: {array_TLK.shape[1:]} layers and experts, which differs from the other arrays")
        for start in range(0, len(array_TLK), _tokens_per_slice(array_TLK)):
            piece_TLK = np.asarray(array_TLK[start : start + _tokens_per_slice(array_TLK)])
            dense_TLK = (piece_TLK == 0) | (piece_TLK == EMPTY)
            layers |= set(np.flatnonzero(~dense_TLK.all((0, 2))).tolist())
    count = shapes.pop()[0] if shapes else 0
    return sorted(layers), sorted(set(range(count)) - layers)


def _tokens_per_slice(array_TLK: npt.NDArray[Any]) -> int:
    """How many tokens make a slice of about `SLICE_IDS` ids."""
    _, layers, top_k = array_TLK.shape
    return int(max(1, SLICE_IDS // (layers * top_k)))


def _arrays(source: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Every array with its name, memory-mapped where possible. Raises `TraceError` on other shapes and types."""
    files = sources_of(source, *PATTERNS)
    for path in files:
        if _is_zip(path):
            for name, array in _zipped(path):
                yield name if len(files) == 1 else f"{path.stem}/{name}", array
        else:
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except NOT_AN_ARRAY as error:
                raise TraceError(f"{path} is not an array: {first_line(error)}") from error
            yield path.stem, _checked(array, f"{path}")


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(ZIP_MAGIC)) == ZIP_MAGIC


def _zipped(path: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                array = _unzipped(archive, entry, f"{path}, {entry.filename}")
                yield entry.filename.removesuffix(".npy"), array
    except (*NOT_AN_ARRAY, zipfile.BadZipFile, zlib.error) as error:
        raise TraceError(f"{path} is not an archive of arrays: {first_line(error)}") from error


def _unzipped(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, where: str) -> npt.NDArray[Any]:
    """Read an array of an archive. The size that its header declares is checked before memory is allocated for it."""
    if entry.file_size > MAX_PIECE_BYTES:
        raise TraceError(f"{where}: larger than {MAX_PIECE_BYTES >> 20} MiB; save it as .npy")
    form: Any = np.lib.format
    read_header = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}
    with archive.open(entry) as file:
        version = form.read_magic(file)
        if version not in read_header:
            raise TraceError(f"{where}: .npy version {version}, expected 1.0 or 2.0")
        shape, fortran, kind = read_header[version](file)
        if kind.kind not in "iu" or len(shape) != 3 or min(shape) < 0:
            raise TraceError(f"{where}: {kind} of shape {shape}, expected whole numbers [T, L, K]")
        size = kind.itemsize * shape[0] * shape[1] * shape[2]
        if size > entry.file_size:
            raise TraceError(f"{where}: shape {shape} does not fit into its {entry.file_size:,} bytes")
        data = np.frombuffer(file.read(size), dtype=kind)
    return _checked(data.reshape(shape, order="F" if fortran else "C"), where)


def _checked(array: npt.NDArray[Any], where: str) -> npt.NDArray[Any]:
    if array.ndim == 3 and (array.shape[1] > MAX_LAYER or array.shape[2] > MAX_TOP_K):
        raise TraceError(f"{where}: {array.shape[1]} layers and {array.shape[2]} experts per token: more than a trace can hold")
    if array.ndim != 3 or array.dtype.kind not in "iu" or 0 in array.shape[1:]:
        raise TraceError(f"{where}: {array.dtype} of shape {array.shape}, expected whole numbers [T, L, K]")
    return array
