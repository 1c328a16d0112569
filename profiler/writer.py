"""Write a trace: stream routing rows to Parquet in any problem order, then seal them into a sorted, complete trace.

While requests run, rows go to `capture/` in the order in which problems finish (`RoutingWriter`). `seal` rewrites them
sorted by (problem_id, token_id, layer) under `routing/`; `write_manifest` comes last. Memory is bounded in all of them.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import OrderedDict, defaultdict
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
    MANIFEST_FILE,
    METADATA_FILE,
    PROBLEMS_FILE,
    ROUTING_FOLDER,
    TOKENS_FILE,
    Manifest,
    ManifestEntry,
    Metadata,
    ModelMetadata,
    RoutingChunk,
    expert_dtype,
    routing_schema,
)

# A row group is the unit of reading: 262,144 rows of K = 2 are 4 MB in memory.
ROWS_PER_GROUP = 1 << 18
ROWS_PER_FILE = 1 << 24
# Row groups kept while sealing: problems finish roughly in order, so a window of them is enough.
SEAL_CACHED_GROUPS = 16


class RoutingWriter:
    """Stream routing to `folder/part-*.parquet`; files appear under their name only when they are whole.

    folder: created if missing; must not hold parts yet.
    moe_layers: decoder layer index of each of the L MoE layers.
    """

    def __init__(self, folder: Path, moe_layers: list[int], num_experts: int, top_k: int) -> None:
        self.folder = folder
        self.rows = 0
        self._layers_L = np.asarray(moe_layers, dtype=np.int16)
        self._num_experts = num_experts
        self._top_k = top_k
        self._schema = routing_schema(num_experts, top_k)
        self._pending: list[pa.RecordBatch] = []
        self._pending_rows = 0
        self._part = 0
        self._file: pq.ParquetWriter | None = None
        self._file_rows = 0
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob("part-*.parquet")):
            raise TraceError(f"{folder} already holds routing parts; choose another folder")

    def add(
        self,
        problem_id: int,
        token_ids_T: npt.NDArray[np.integer[Any]],
        expert_ids_TLK: npt.NDArray[np.integer[Any]],
        weights_TLK: npt.NDArray[np.floating[Any]],
    ) -> None:
        """Append tokens of one problem. Pairs are sorted here by weight, descending.

        Raises `TraceError` if shapes disagree, an id is negative, an expert id is not in 0..E-1 or repeated within a layer,
        or a weight is negative or not a finite float16.
        """
        tokens, layers = len(token_ids_T), len(self._layers_L)
        expected = (tokens, layers, self._top_k)
        if expert_ids_TLK.shape != expected or weights_TLK.shape != expected:
            raise TraceError(
                f"problem {problem_id}: expert ids {expert_ids_TLK.shape} and weights {weights_TLK.shape}, expected {expected}"
            )
        if tokens == 0:
            return
        if expert_ids_TLK.min() < 0 or expert_ids_TLK.max() >= self._num_experts:
            raise TraceError(
                f"problem {problem_id}: expert ids {expert_ids_TLK.min()}..{expert_ids_TLK.max()}, "
                f"expected 0..{self._num_experts - 1}"
            )
        if problem_id < 0 or token_ids_T.min() < 0:
            raise TraceError(f"problem {problem_id}: negative problem_id or token_id")
        ids_TLK, weights_TLK = sort_pairs(expert_ids_TLK, weights_TLK)
        with np.errstate(over="ignore"):
            weights_TLK = weights_TLK.astype(np.float16)
        if not (np.isfinite(weights_TLK).all() and (weights_TLK >= 0).all()):
            raise TraceError(f"problem {problem_id}: a routing weight is negative, not a number, or above 65,504 (float16)")
        if has_repeats(ids_TLK).any():
            raise TraceError(f"problem {problem_id}: a token has the same expert twice in a layer")
        rows = tokens * layers
        columns = [
            pa.array(np.full(rows, problem_id, dtype=np.int32)),
            pa.array(np.tile(self._layers_L, tokens)),
            pa.array(np.repeat(np.asarray(token_ids_T, dtype=np.int32), layers)),
            _fixed_size_list(ids_TLK.astype(expert_dtype(self._num_experts)), self._schema.field("expert_ids").type),
            _fixed_size_list(weights_TLK, self._schema.field("weights").type),
        ]
        self._pending.append(pa.record_batch(columns, schema=self._schema))
        self._pending_rows += rows
        self.rows += rows
        if self._pending_rows >= ROWS_PER_GROUP:
            self._write_group()

    def close(self) -> None:
        """Write what is pending and give the last file its name."""
        self._write_group()
        self._close_file()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is None:
            self.close()

    def _write_group(self) -> None:
        if not self._pending:
            return
        if self._file is None:
            self._file = open_routing_file(self._part_path.with_suffix(".tmp"), self._schema)
        self._file.write_table(pa.Table.from_batches(self._pending), row_group_size=self._pending_rows)
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


def sort_pairs(
    expert_ids_TLK: npt.NDArray[np.integer[Any]], weights_TLK: npt.NDArray[np.floating[Any]]
) -> tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.floating[Any]]]:
    """Both arrays `[T, L, K]` reordered along K by weight, descending; equal weights by expert id."""
    order_TLK = np.lexsort((expert_ids_TLK, -weights_TLK), axis=-1)
    return np.take_along_axis(expert_ids_TLK, order_TLK, -1), np.take_along_axis(weights_TLK, order_TLK, -1)


def has_repeats(expert_ids_TLK: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which (token, layer) `[T, L]` name an expert more than once."""
    ordered = np.sort(expert_ids_TLK, axis=-1)
    return np.asarray((ordered[..., 1:] == ordered[..., :-1]).any(-1))


def open_routing_file(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A Parquet writer with the encodings of routing rows: zstd, dictionaries for ids and positions."""
    return pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=True, write_statistics=True)


def write_metadata(directory: Path, metadata: Metadata) -> None:
    """Write `metadata.json` atomically."""
    write_text(directory / METADATA_FILE, metadata.model_dump_json(indent=1) + "\n")


def write_table(path: Path, table: pa.Table) -> None:
    """Write a small table (tokens, problems) atomically."""
    temporary = path.with_suffix(".tmp")
    pq.write_table(table, temporary, compression="zstd")
    temporary.rename(path)


def seal(directory: Path, model: ModelMetadata, sequence_tokens: dict[int, int]) -> dict[int, int]:
    """Sort `capture/` into `routing/` and return the tokens that each problem lacks.

    sequence_tokens: problem id -> N, the tokens of prompt and output. A model routes N - 1 of them: the last generated
    token is never fed back. Engines that schedule ahead may have routed it; such rows are dropped. Positions that were
    captured twice keep the last capture.
    Returns problem id -> number of the N - 1 positions without routing, for the problems that lack some.
    Raises `TraceError` if a captured problem is not in `sequence_tokens`.
    """
    capture = directory / CAPTURE_FOLDER
    blocks = _blocks_by_problem(capture)
    unknown = sorted(set(blocks) - set(sequence_tokens))
    if unknown:
        raise TraceError(f"{capture}: rows of unknown problem {unknown[0]}")
    missing: dict[int, int] = {}
    groups = _RowGroupCache(len(model.moe_layers), model.top_k)
    with RoutingWriter(directory / ROUTING_FOLDER, model.moe_layers, model.num_experts, model.top_k) as writer:
        for problem_id in sorted(sequence_tokens):
            routed = sequence_tokens[problem_id] - 1
            pieces = [groups.tokens(*block) for block in blocks.get(problem_id, [])]
            if pieces:
                chunk = _last_capture_of_each_position(pieces, routed)
                writer.add(problem_id, chunk.token_ids_T, chunk.expert_ids_TLK, chunk.weights_TLK)
            lacking = routed - (len(chunk) if pieces else 0)
            if lacking > 0:
                missing[problem_id] = lacking
    groups.close()
    shutil.rmtree(capture)
    return missing


def write_manifest(directory: Path, extra_files: dict[str, int] | None = None) -> Manifest:
    """Hash every file of the trace and write `manifest.json`; nothing may be written to the trace afterwards.

    extra_files: further file names with their row counts (the JSON lines).
    """
    names = [f"{ROUTING_FOLDER}/{p.name}" for p in sorted((directory / ROUTING_FOLDER).glob("part-*.parquet"))]
    names += [name for name in (TOKENS_FILE, PROBLEMS_FILE) if (directory / name).exists()]
    rows = {name: pq.read_metadata(directory / name).num_rows for name in names}
    rows |= {METADATA_FILE: 0} | (extra_files or {})
    files = {}
    for name, count in rows.items():
        path = directory / name
        files[name] = ManifestEntry(rows=count, bytes=path.stat().st_size, sha256=sha256_of(path))
    manifest = Manifest(files=files)
    write_text(directory / MANIFEST_FILE, manifest.model_dump_json(indent=1) + "\n")
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


def _fixed_size_list(values_TLK: npt.NDArray[Any], kind: pa.FixedSizeListType) -> pa.FixedSizeListArray:
    flat = pa.array(np.ascontiguousarray(values_TLK).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=kind)


def _last_capture_of_each_position(pieces: list[RoutingChunk], routed: int) -> RoutingChunk:
    token_ids = np.concatenate([piece.token_ids_T for piece in pieces])
    # np.unique keeps the first of equals: look from the end, so that the last capture wins.
    positions, from_end = np.unique(token_ids[::-1], return_index=True)
    keep = (len(token_ids) - 1 - from_end)[positions < routed]
    return RoutingChunk(
        problem_ids_T=np.concatenate([piece.problem_ids_T for piece in pieces])[keep],
        token_ids_T=token_ids[keep],
        expert_ids_TLK=np.concatenate([piece.expert_ids_TLK for piece in pieces])[keep],
        weights_TLK=np.concatenate([piece.weights_TLK for piece in pieces])[keep],
    )


_Block = tuple[Path, int, int, int]
"""Rows of one problem: file, row group, first row in the group, number of rows."""


def _blocks_by_problem(folder: Path) -> dict[int, list[_Block]]:
    blocks: dict[int, list[_Block]] = defaultdict(list)
    for path in sorted(folder.glob("part-*.parquet")):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                ids = file.read_row_group(group, columns=["problem_id"]).column(0).to_numpy()
                starts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 1))
                ends = np.append(starts[1:], len(ids))
                for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                    blocks[int(ids[start])].append((path, group, start, end - start))
    return dict(blocks)


class _RowGroupCache:
    """Decoded row groups, least recently used dropped first."""

    def __init__(self, layers: int, top_k: int) -> None:
        self._layers, self._top_k = layers, top_k
        self._files: dict[Path, pq.ParquetFile] = {}
        self._groups: OrderedDict[tuple[Path, int], RoutingChunk] = OrderedDict()

    def tokens(self, path: Path, group: int, start: int, rows: int) -> RoutingChunk:
        key = (path, group)
        if key in self._groups:
            self._groups.move_to_end(key)
        else:
            if path not in self._files:
                self._files[path] = pq.ParquetFile(path)
            table = self._files[path].read_row_group(group)
            self._groups[key] = decode_rows(table, self._layers, self._top_k)
            if len(self._groups) > SEAL_CACHED_GROUPS:
                self._groups.popitem(last=False)
        chunk = self._groups[key]
        tokens = slice(start // self._layers, (start + rows) // self._layers)
        return RoutingChunk(
            chunk.problem_ids_T[tokens], chunk.token_ids_T[tokens], chunk.expert_ids_TLK[tokens], chunk.weights_TLK[tokens]
        )

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def decode_rows(table: pa.Table, layers: int, top_k: int) -> RoutingChunk:
    """Rows sorted by token and layer as `[T, L, K]` views on the table's own buffers (no copy beyond joining chunks).

    The caller has checked that every token has all layers.
    """
    table = table.combine_chunks()

    def values(name: str) -> npt.NDArray[Any]:
        column = table.column(name)
        array = column.chunk(0) if column.num_chunks else pa.array([], column.type)
        return np.asarray(array.flatten().to_numpy(zero_copy_only=True).reshape(-1, layers, top_k))

    return RoutingChunk(
        problem_ids_T=table.column("problem_id").to_numpy()[::layers],
        token_ids_T=table.column("token_id").to_numpy()[::layers],
        expert_ids_TLK=values("expert_ids"),
        weights_TLK=values("weights"),
    )
