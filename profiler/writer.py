"""Write a trace: stream rows to Parquet in any problem order, in bounded memory; metadata, tables and the manifest.

While requests run, tokens go to `capture/` in the order in which they come (`RoutingWriter`, `ValuesWriter`);
`profiler.sealing` sorts them into `routing/` (`BlockWriter`), and `write_manifest` comes last.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from profiler.errors import TraceError
from profiler.schema import (
    CAPTURE_FOLDER,
    GATES_FILE,
    HIDDEN_FOLDER,
    LOGITS_FOLDER,
    MANIFEST_FILE,
    METADATA_FILE,
    PROBLEMS_FILE,
    ROUTING_FOLDER,
    TOKENS_FILE,
    Manifest,
    ManifestEntry,
    Metadata,
    expert_dtype,
)

# A row group is the unit of reading: 262,144 rows of K = 2 are 4 MB in memory. Wide rows (logits, hidden) make smaller ones.
ROWS_PER_GROUP = 1 << 18
BYTES_PER_GROUP = 32 << 20
ROWS_PER_FILE = 1 << 24
# Up to here, comparing column by column is faster than sorting row by row.
NETWORK_TOP_K = 8
KEY_COLUMNS = ("problem_id", "layer", "token_id")
# Under this key, the schema of a capture file tells layers, element types and widths.
CAPTURE_FORM = b"specmoe.capture"
# float16: the first of infinity and of what is not a number.
INFINITY_BITS = 0x7C00

Problems = int | npt.NDArray[np.integer[Any]]
"""The problem of a block of tokens: one for all `[]`, or one per token `[T]`."""


class PartsWriter(ABC):
    """Stream blocks of rows to `folder/part-*.parquet`; a file appears under its name only when it is whole.

    folder: created if missing; must not hold parts yet. row_bytes: decides how many rows make a row group.
    """

    def __init__(self, folder: Path, schema: pa.Schema, row_bytes: int, **encoding: Any) -> None:
        self.folder = folder
        self.rows = 0
        self.schema = schema
        self._encoding = encoding
        self._rows_per_group = max(1, min(ROWS_PER_GROUP, BYTES_PER_GROUP // row_bytes))
        self._pending: list[list[npt.NDArray[Any]]] = []
        self._pending_rows = 0
        self._part = 0
        self._file: pq.ParquetWriter | None = None
        self._file_rows = 0
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob("part-*.parquet")):
            raise TraceError(f"{folder} already holds parts; choose another folder")

    def flush(self) -> None:
        """Write what is pending and give the file its name; later blocks go to the next file."""
        self._write_group()
        self._close_file()

    def close(self) -> None:
        """Write everything out."""
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is None:
            self.close()

    def _add(self, rows: int, columns: list[npt.NDArray[Any]]) -> None:
        self._pending.append(columns)
        self._pending_rows += rows
        self.rows += rows
        if self._pending_rows >= self._rows_per_group:
            self._write_group()

    @abstractmethod
    def _arrow(self, columns: list[npt.NDArray[Any]]) -> list[pa.Array]:
        """The schema's columns from joined blocks."""

    def _write_group(self) -> None:
        if not self._pending:
            return
        if self._file is None:
            self._file = pq.ParquetWriter(self._part_path.with_suffix(".tmp"), self.schema, **self._encoding)
        columns = [np.concatenate(pieces) for pieces in zip(*self._pending, strict=True)]
        self._file.write_table(
            pa.Table.from_arrays(self._arrow(columns), schema=self.schema), row_group_size=self._pending_rows
        )
        self._file_rows += self._pending_rows
        self._pending, self._pending_rows = [], 0
        if self._file_rows >= ROWS_PER_FILE:
            self._close_file()

    def _close_file(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self._part_path.with_suffix(".tmp").rename(self._part_path)
        self._file, self._file_rows = None, 0
        self._part += 1

    @property
    def _part_path(self) -> Path:
        return self.folder / f"part-{self._part:05d}.parquet"


class BlockWriter(PartsWriter):
    """Write the trace's own rows, one per (problem, token, layer), with zstd and dictionaries.

    layers: decoder layer index of each of the L recorded layers. schema: `routing_schema` or `values_schema`.
    """

    def __init__(self, folder: Path, layers: list[int], schema: pa.Schema) -> None:
        lists = [field.type.list_size for field in schema if field.name not in KEY_COLUMNS]
        # Every list entry of a trace has one or two bytes.
        super().__init__(folder, schema, 2 * sum(lists), compression="zstd", use_dictionary=True, write_statistics=True)
        self._layers_L = np.asarray(layers, dtype=np.int16)

    def add(self, problem_id: int, token_ids_T: npt.NDArray[np.int32], lists: dict[str, npt.NDArray[Any]]) -> None:
        """Append tokens of one problem; `lists` maps each list column to an array `[T, L, W]` of its own type."""
        problem_ids_T = np.full(len(token_ids_T), problem_id, dtype=np.int32)
        values = [lists[field.name] for field in self.schema if field.name not in KEY_COLUMNS]
        if len(token_ids_T):
            self._add(len(token_ids_T) * len(self._layers_L), [problem_ids_T, token_ids_T, *values])

    def _arrow(self, columns: list[npt.NDArray[Any]]) -> list[pa.Array]:
        problem_ids_T, token_ids_T, *values = columns
        layers = len(self._layers_L)
        kinds = [field.type for field in self.schema if field.name not in KEY_COLUMNS]
        return [
            pa.array(np.repeat(problem_ids_T, layers)),
            pa.array(np.tile(self._layers_L, len(token_ids_T))),
            pa.array(np.repeat(token_ids_T, layers)),
            *(
                pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), type=kind)
                for array, kind in zip(values, kinds, strict=True)
            ),
        ]


class CaptureWriter(PartsWriter):
    """Write tokens as they come, to be sealed later: one row per token, its `[L, W]` values packed as bytes.

    As cheap as can be, since the engine waits for it: no compression, no order. types: element type and W of each column.
    The layers and types are in the file's schema, so that it explains itself.
    """

    def __init__(self, folder: Path, layers: list[int], types: dict[str, tuple[np.dtype[Any], int]]) -> None:
        packed = [(name, pa.binary(len(layers) * width * dtype.itemsize)) for name, (dtype, width) in types.items()]
        form = {"layers": layers, "types": {name: [dtype.str, width] for name, (dtype, width) in types.items()}}
        schema = pa.schema(
            [("problem_id", pa.int32()), ("token_id", pa.int32()), *packed], metadata={CAPTURE_FORM: json.dumps(form)}
        )
        row_bytes = 8 + sum(kind.byte_width for _, kind in packed)
        super().__init__(folder, schema, row_bytes, compression="none", use_dictionary=False, write_statistics=False)
        self._layers = layers
        self._types = types

    def add_tokens(
        self, problems: Problems, token_ids_T: npt.NDArray[np.integer[Any]], values: dict[str, npt.NDArray[Any]]
    ) -> None:
        """Append tokens of one problem or of several; `values` maps each column to `[T, L, W]`.

        Raises `TraceError` on another shape, or if a problem or token id is negative.
        """
        for name, (_, width) in self._types.items():
            expected = (len(token_ids_T), len(self._layers), width)
            if values[name].shape != expected:
                raise TraceError(f"{_name(problems)}: {name} of shape {values[name].shape}, expected {expected}")
        if len(token_ids_T) == 0:
            return
        problem_ids_T = np.broadcast_to(np.asarray(problems, dtype=np.int32), token_ids_T.shape)
        if problem_ids_T.min() < 0 or token_ids_T.min() < 0:
            raise TraceError(f"{_name(problems)}: negative problem_id or token_id")
        packed = [values[name].astype(dtype, copy=False) for name, (dtype, _) in self._types.items()]
        self._add(len(token_ids_T), [problem_ids_T, token_ids_T.astype(np.int32, copy=False), *packed])

    def _arrow(self, columns: list[npt.NDArray[Any]]) -> list[pa.Array]:
        problem_ids_T, token_ids_T, *values = columns
        kinds = [field.type for field in self.schema][2:]
        return [
            pa.array(problem_ids_T),
            pa.array(token_ids_T),
            *(
                pa.Array.from_buffers(kind, len(array), [None, pa.py_buffer(np.ascontiguousarray(array))])
                for array, kind in zip(values, kinds, strict=True)
            ),
        ]


class RoutingWriter(CaptureWriter):
    """Capture routing: every token has K pairs of expert id and weight in each of the L MoE layers, in any order."""

    def __init__(self, folder: Path, moe_layers: list[int], num_experts: int, top_k: int) -> None:
        self._num_experts = num_experts
        types = {"expert_ids": (expert_dtype(num_experts), top_k), "weights": (np.dtype(np.float16), top_k)}
        super().__init__(folder, moe_layers, types)

    def add(
        self,
        problems: Problems,
        token_ids_T: npt.NDArray[np.integer[Any]],
        expert_ids_TLK: npt.NDArray[np.integer[Any]],
        weights_TLK: npt.NDArray[np.floating[Any]],
    ) -> None:
        """Append tokens of one problem, or of one problem per token.

        Raises `TraceError` if shapes disagree, an id is negative, an expert id is not in 0..E-1, or a weight is negative or not
        a finite float16. Repeated experts are found when the trace is sealed.
        """
        halves_TLK = check_pairs(expert_ids_TLK, weights_TLK, self._num_experts, _name(problems))
        self.add_tokens(problems, token_ids_T, {"expert_ids": expert_ids_TLK, "weights": halves_TLK})


class ValuesWriter(CaptureWriter):
    """Capture float16 vectors of width W, router logits or inputs, of tokens in each of the L layers."""

    def __init__(self, folder: Path, layers: list[int], column: str, width: int) -> None:
        super().__init__(folder, layers, {column: (np.dtype(np.float16), width)})
        self._column = column

    def add(self, problems: Problems, token_ids_T: npt.NDArray[np.integer[Any]], values_TLW: npt.NDArray[np.float16]) -> None:
        """Append tokens of one problem, or of one problem per token.

        Raises `TraceError` on another shape or type, or on a value that is not a finite number.
        """
        if values_TLW.dtype != np.float16:
            raise TraceError(f"{_name(problems)}: {self._column} of {values_TLW.dtype}, expected float16")
        if not np.isfinite(values_TLW).all():
            raise TraceError(f"{_name(problems)}: {self._column} hold a value that float16 cannot")
        self.add_tokens(problems, token_ids_T, {self._column: values_TLW})


def _name(problems: Problems) -> str:
    # Not np.unique: this runs for every block, and the engine may wait.
    first, last = (np.min(problems), np.max(problems)) if np.size(problems) else (0, -1)
    return f"problem {first}" if first == last else f"problems {first}..{last}"


def check_pairs(
    expert_ids_TLK: npt.NDArray[np.integer[Any]], weights_TLK: npt.NDArray[np.floating[Any]], num_experts: int, what: str
) -> npt.NDArray[np.float16]:
    """The weights as float16.

    Raises `TraceError`, which names `what`, on expert ids out of range and on weights that are negative or no finite float16.
    """
    if expert_ids_TLK.size == 0:
        return weights_TLK.astype(np.float16)
    lowest, highest = int(expert_ids_TLK.min()), int(expert_ids_TLK.max())
    if lowest < 0 or highest >= num_experts:
        raise TraceError(f"{what}: expert ids {lowest}..{highest}, expected 0..{num_experts - 1}")
    with np.errstate(over="ignore"):
        halves_TLK = np.ascontiguousarray(weights_TLK, dtype=np.float16)
    # Of finite numbers that are not negative, the bits are below those of infinity; only -0 is an exception.
    bits = halves_TLK.view(np.uint16)
    if bits.max() >= INFINITY_BITS and not (np.isfinite(halves_TLK).all() and (halves_TLK >= 0).all()):
        raise TraceError(f"{what}: a routing weight is negative, not a number, or above 65,504 (float16)")
    return halves_TLK


def refuse_repeats(expert_ids_TLK: npt.NDArray[Any], what: str) -> None:
    """Raise `TraceError`, which names `what`, if a token has an expert twice in a layer."""
    if has_repeats(expert_ids_TLK).any():
        raise TraceError(f"{what}: a token has the same expert twice in a layer")


def sort_pairs(
    expert_ids_TLK: npt.NDArray[np.unsignedinteger[Any]], weights_TLK: npt.NDArray[np.float16]
) -> tuple[npt.NDArray[np.unsignedinteger[Any]], npt.NDArray[np.float16]]:
    """Both arrays `[T, L, K]` reordered along K by weight, descending; equal weights by expert id.

    Weights must not be negative: then their bits have their order, and one sort of (inverted bits, id) as a number does.
    """
    # Adding zero turns -0 into +0, whose bits would otherwise sort first.
    bits_TLK = (weights_TLK + np.float16(0)).view(np.uint16)
    keys_TLK = (~bits_TLK).astype(np.uint32) << 16 | expert_ids_TLK
    top_k = keys_TLK.shape[-1]
    if top_k > NETWORK_TOP_K:
        keys_TLK.sort(axis=-1)
    else:
        # Bubble sort of whole columns: a handful of vector operations, where np.sort would be called for every row.
        keys_KN = np.ascontiguousarray(keys_TLK.reshape(-1, top_k).T)
        for last in range(top_k - 1, 0, -1):
            for k in range(last):
                smaller = np.minimum(keys_KN[k], keys_KN[k + 1])
                np.maximum(keys_KN[k], keys_KN[k + 1], out=keys_KN[k + 1])
                keys_KN[k] = smaller
        keys_TLK = np.ascontiguousarray(keys_KN.T).reshape(keys_TLK.shape)
    ids_TLK = (keys_TLK & 0xFFFF).astype(expert_ids_TLK.dtype)
    return ids_TLK, (~(keys_TLK >> 16).astype(np.uint16)).view(np.float16)


def has_repeats(expert_ids_TLK: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which (token, layer) `[T, L]` name an expert more than once."""
    top_k = expert_ids_TLK.shape[-1]
    if top_k > NETWORK_TOP_K:
        ordered = np.sort(expert_ids_TLK, axis=-1)
        return np.asarray((ordered[..., 1:] == ordered[..., :-1]).any(-1))
    repeats = np.zeros(expert_ids_TLK.shape[:-1], dtype=np.bool_)
    for first in range(top_k):
        for second in range(first + 1, top_k):
            repeats |= expert_ids_TLK[..., first] == expert_ids_TLK[..., second]
    return repeats


def write_metadata(directory: Path, metadata: Metadata) -> None:
    """Write `metadata.json` atomically."""
    write_text(directory / METADATA_FILE, metadata.model_dump_json(indent=1) + "\n")


def write_table(path: Path, table: pa.Table) -> None:
    """Write a small table (tokens, problems) atomically."""
    temporary = path.with_suffix(".tmp")
    pq.write_table(table, temporary, compression="zstd")
    temporary.rename(path)


def write_manifest(directory: Path, extra_files: dict[str, int] | None = None) -> Manifest:
    """Hash every file of the trace, write `manifest.json` and remove `capture/`: nothing may be written afterwards.

    extra_files: further file names with their row counts (the JSON lines).
    """
    folders = (ROUTING_FOLDER, LOGITS_FOLDER, HIDDEN_FOLDER)
    names = [f"{folder}/{p.name}" for folder in folders for p in sorted((directory / folder).glob("part-*.parquet"))]
    names += [name for name in (TOKENS_FILE, PROBLEMS_FILE) if (directory / name).exists()]
    rows = {name: pq.read_metadata(directory / name).num_rows for name in names}
    rows |= {METADATA_FILE: 0} | (extra_files or {})
    if (directory / GATES_FILE).exists():
        rows[GATES_FILE] = 0
    files = {}
    for name, count in rows.items():
        path = directory / name
        files[name] = ManifestEntry(rows=count, bytes=path.stat().st_size, sha256=sha256_of(path))
    manifest = Manifest(files=files)
    write_text(directory / MANIFEST_FILE, manifest.model_dump_json(indent=1) + "\n")
    shutil.rmtree(directory / CAPTURE_FOLDER, ignore_errors=True)
    return manifest


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)
