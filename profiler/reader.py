"""Read a trace: metadata, problems, tokens, and routing as `[T, L, K]` arrays in chunks of whole problems."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from profiler.errors import TraceError
from profiler.schema import (
    CAPTURE_FOLDER,
    MANIFEST_FILE,
    MAX_HIDDEN_SIZE,
    METADATA_FILE,
    PROBLEMS_FILE,
    PROBLEMS_SCHEMA,
    ROUTING_FOLDER,
    SCHEMA_VERSION,
    TOKENS_FILE,
    TOKENS_SCHEMA,
    Manifest,
    Metadata,
    RoutingChunk,
    routing_schema,
    values_schema,
)
from profiler.writer import has_repeats, sha256_of

MAX_DOCUMENT_BYTES = 64 << 20

_DocumentType = TypeVar("_DocumentType", bound=BaseModel)


@dataclass(frozen=True)
class Trace:
    """An opened trace directory. Nothing but `metadata.json` and `manifest.json` is read until asked for."""

    path: Path
    metadata: Metadata
    manifest: Manifest | None

    @classmethod
    def open(cls, path: str | Path, *, allow_incomplete: bool = False) -> Self:
        """Open the trace directory `path`.

        Raises `TraceError` if it is no trace, or if it is incomplete (no manifest, a file missing or of another size) and
        `allow_incomplete` is false.
        """
        directory = Path(path)
        if not directory.is_dir():
            raise TraceError(f"{directory}: no such trace directory")
        if not (directory / METADATA_FILE).is_file():
            raise TraceError(f"{directory} is not a trace: it has no {METADATA_FILE}")
        metadata = _read_document(directory / METADATA_FILE, Metadata)
        if metadata.schema_version != SCHEMA_VERSION:
            raise TraceError(f"{directory}: schema version {metadata.schema_version}, this release reads {SCHEMA_VERSION}")
        has_manifest = (directory / MANIFEST_FILE).is_file()
        manifest = _read_document(directory / MANIFEST_FILE, Manifest) if has_manifest else None
        trace = cls(directory, metadata, manifest)
        if not allow_incomplete:
            faults = trace.faults()
            if faults:
                raise TraceError(f"{directory} is incomplete: {faults[0]}; collect it again or look with 'specmoe inspect'")
        return trace

    def faults(self, *, verify: bool = False) -> list[str]:
        """What keeps the trace from being complete, one line each; empty if it is. `verify` compares every hash."""
        if self.manifest is None:
            captured = [_rows(path) or 0 for path in sorted((self.path / CAPTURE_FOLDER).glob("part-*.parquet"))]
            unsealed = f"; {sum(captured):,} tokens wait in {CAPTURE_FOLDER}/, not sealed" if captured else ""
            return [f"no {MANIFEST_FILE} (the collection did not finish){unsealed}"]
        faults = []
        if self.manifest.schema_version != SCHEMA_VERSION:
            faults.append(f"{MANIFEST_FILE} has schema version {self.manifest.schema_version}, expected {SCHEMA_VERSION}")
        if METADATA_FILE not in self.manifest.files or not self.routing_files:
            faults.append(f"{MANIFEST_FILE} does not list {METADATA_FILE} and at least one routing file")
        for name, entry in self.manifest.files.items():
            file = self.path / name
            if not file.is_file():
                faults.append(f"{name} is missing")
            elif file.stat().st_size != entry.bytes:
                faults.append(f"{name} has {file.stat().st_size} bytes, expected {entry.bytes}")
            elif name.endswith(".parquet") and (rows := _rows(file)) != entry.rows:
                faults.append(f"{name} has {rows} rows, expected {entry.rows}")
            elif verify and sha256_of(file) != entry.sha256:
                faults.append(f"{name} does not match its sha256")
        return faults

    @property
    def routing_files(self) -> list[Path]:
        """The Parquet parts in order: those that the manifest lists, or all if there is none yet."""
        if self.manifest is not None:
            return [self.path / name for name in sorted(self.manifest.files) if name.startswith(f"{ROUTING_FOLDER}/")]
        return sorted((self.path / ROUTING_FOLDER).glob("part-*.parquet"))

    @cached_property
    def num_rows(self) -> int:
        """Routing rows: one per (problem, token, MoE layer)."""
        return sum(_open_parquet(path).metadata.num_rows for path in self.routing_files)

    @property
    def has_problems(self) -> bool:
        """Whether prompts are known; a trace converted from bare routing rows has neither problems nor tokens."""
        return (self.path / PROBLEMS_FILE).is_file()

    @cached_property
    def problems(self) -> pa.Table:
        """`problems.parquet`, sorted by problem_id; columns as in `profiler.schema.PROBLEMS_SCHEMA`."""
        return _read_table(self.path / PROBLEMS_FILE, PROBLEMS_SCHEMA)

    @cached_property
    def tokens(self) -> pa.Table:
        """`tokens.parquet`: every token of every problem, sorted by (problem_id, token_id)."""
        return _read_table(self.path / TOKENS_FILE, TOKENS_SCHEMA)

    def chunks(self) -> Iterator[RoutingChunk]:
        """Routing in order, in chunks of whole problems; a chunk is about one row group (some MB).

        Raises `TraceError`, naming the file and row, on rows that break the format.
        """
        carried: RoutingChunk | None = None
        last_key = -1
        for path in self.routing_files:
            file = _open_parquet(path)
            expected = routing_schema(self.metadata.model.num_experts, self.metadata.model.top_k)
            if file.schema_arrow.remove_metadata() != expected:
                raise TraceError(f"{path}: columns {file.schema_arrow.names} of other names or types than the metadata says")
            for group in range(file.metadata.num_row_groups):
                chunk = self._decode(_read_row_group(file, group, path), path, group)
                if _key(chunk, 0) <= last_key:
                    raise TraceError(f"{path}, row group {group}: its first row does not come after the row before it")
                last_key = _key(chunk, -1)
                if carried is not None:
                    chunk = concatenate([carried, chunk])
                # The last problem may go on in the next row group.
                last = int(np.searchsorted(chunk.problem_ids_T, chunk.problem_ids_T[-1]))
                whole, carried = _split(chunk, last)
                if len(whole):
                    yield whole
        if carried is not None:
            yield carried

    def load(self) -> RoutingChunk:
        """All routing in memory: 3 to 4 bytes per (token, layer, expert)."""
        return concatenate(list(self.chunks()))

    def arrays(self, problem_id: int) -> RoutingChunk:
        """Routing of one problem. Raises `TraceError` if the trace has none of it."""
        pieces = []
        for path in self.routing_files:
            file = _open_parquet(path)
            for group in range(file.metadata.num_row_groups):
                statistics = file.metadata.row_group(group).column(0).statistics
                if statistics is not None and not statistics.min <= problem_id <= statistics.max:
                    continue
                table = _read_row_group(file, group, path)
                rows = table.filter(pc.equal(table.column("problem_id"), problem_id))
                if rows.num_rows:
                    pieces.append(self._decode(rows, path, group))
        if not pieces:
            raise TraceError(f"{self.path}: no routing of problem {problem_id}")
        whole = concatenate(pieces)
        if (np.diff(whole.token_ids_T) <= 0).any():
            raise TraceError(f"{self.path}: rows of problem {problem_id} are not sorted by token_id over the row groups")
        return whole

    def values(self, folder: str, problem_id: int) -> tuple[npt.NDArray[np.int32], list[int], npt.NDArray[np.float16]]:
        """Router logits (`folder` "logits", W = E) or router inputs ("hidden", W = D) of one problem.

        Returns positions `[T]`, decoder layers (L of them) and float16 values `[T, L, W]`. Raises `TraceError` if the trace has
        none of this problem.
        """
        tables = []
        for path in sorted((self.path / folder).glob("part-*.parquet")):
            file = _open_parquet(path)
            names = file.schema_arrow.names
            if len(names) != 4 or file.schema_arrow.remove_metadata() != _values_schema(file.schema_arrow, path):
                raise TraceError(f"{path}: columns {names}, expected problem_id, layer, token_id and one list of float16")
            for group in range(file.metadata.num_row_groups):
                statistics = file.metadata.row_group(group).column(0).statistics
                if statistics is not None and not statistics.min <= problem_id <= statistics.max:
                    continue
                table = _read_row_group(file, group, path)
                tables.append(table.filter(pc.equal(table.column("problem_id"), problem_id)))
        if not sum(table.num_rows for table in tables):
            raise TraceError(f"{self.path}: no {folder} of problem {problem_id}")
        whole = pa.concat_tables(tables)
        token_ids, layers = whole.column("token_id").to_numpy(), whole.column("layer").to_numpy()
        count = len(np.unique(layers))
        if len(layers) % count or (layers.reshape(-1, count) != layers[:count]).any():
            raise TraceError(f"{self.path}: {folder} of problem {problem_id} lacks layers for some tokens")
        return token_ids[::count], layers[:count].tolist(), decode_lists(whole.column(3), count)

    def _decode(self, table: pa.Table, path: Path, group: int) -> RoutingChunk:
        layers_L = np.asarray(self.metadata.model.moe_layers)
        layers = len(layers_L)
        if table.num_rows == 0 or table.num_rows % layers:
            raise TraceError(f"{path}, row group {group}: {table.num_rows} rows, expected a multiple of {layers} layers")
        lists = ("expert_ids", "weights")
        nested = [chunk.flatten() for name in lists for chunk in table.column(name).chunks]
        if any(column.null_count for column in [*table.columns, *nested]):
            raise TraceError(f"{path}, row group {group}: nulls, expected none")
        problem_TL = table.column("problem_id").to_numpy().reshape(-1, layers).astype(np.int64)
        token_TL = table.column("token_id").to_numpy().reshape(-1, layers).astype(np.int64)
        layer_TL = table.column("layer").to_numpy().reshape(-1, layers)
        broken_T = (
            (layer_TL != layers_L).any(1) | (problem_TL != problem_TL[:, :1]).any(1) | (token_TL != token_TL[:, :1]).any(1)
        )
        broken_T |= (problem_TL[:, 0] < 0) | (token_TL[:, 0] < 0)
        key_T = problem_TL[:, 0] << 32 | token_TL[:, 0]
        broken_T[1:] |= np.diff(key_T) <= 0
        chunk = decode_rows(table, layers)
        broken_T |= (chunk.expert_ids_TLK >= self.metadata.model.num_experts).any((1, 2))
        broken_T |= has_repeats(chunk.expert_ids_TLK).any(1)
        with np.errstate(invalid="ignore"):
            broken_T |= ~(chunk.weights_TLK >= 0).all((1, 2)) | ~np.isfinite(chunk.weights_TLK).all((1, 2))
        if broken_T.any():
            row = int(np.flatnonzero(broken_T)[0]) * layers
            raise TraceError(
                f"{path}, row group {group}, row {row}: expected rows sorted by (problem_id, token_id, layer), every MoE layer "
                f"once, different expert ids below {self.metadata.model.num_experts} and finite weights, not negative"
            )
        return chunk


def concatenate(chunks: list[RoutingChunk]) -> RoutingChunk:
    """Join chunks in order. Raises `TraceError` if there is none (a trace without rows)."""
    if not chunks:
        raise TraceError("the trace has no routing rows")
    if len(chunks) == 1:
        return chunks[0]
    names = [field.name for field in fields(RoutingChunk)]
    return RoutingChunk(**{name: np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in names})


def decode_rows(table: pa.Table, layers: int) -> RoutingChunk:
    """Rows sorted by token and layer as `[T, L, K]` views on the table's own buffers (no copy beyond joining chunks).

    The caller has checked that every token has all layers.
    """
    return RoutingChunk(
        problem_ids_T=table.column("problem_id").to_numpy()[::layers],
        token_ids_T=table.column("token_id").to_numpy()[::layers],
        expert_ids_TLK=decode_lists(table.column("expert_ids"), layers),
        weights_TLK=decode_lists(table.column("weights"), layers),
    )


def decode_lists(column: pa.ChunkedArray, layers: int) -> npt.NDArray[Any]:
    """A fixed-size list column, rows sorted by token and layer, as `[T, L, W]`: a view unless it has several chunks."""
    array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays([pa.array([], column.type), *column.chunks])
    return np.asarray(array.flatten().to_numpy(zero_copy_only=True).reshape(-1, layers, column.type.list_size))


def _split(chunk: RoutingChunk, at: int) -> tuple[RoutingChunk, RoutingChunk]:
    names = [field.name for field in fields(RoutingChunk)]
    return (
        RoutingChunk(**{name: getattr(chunk, name)[:at] for name in names}),
        RoutingChunk(**{name: getattr(chunk, name)[at:] for name in names}),
    )


def _values_schema(schema: pa.Schema, path: Path) -> pa.Schema:
    kind = schema.field(3).type
    if not pa.types.is_fixed_size_list(kind) or not 1 <= kind.list_size <= MAX_HIDDEN_SIZE:
        raise TraceError(f"{path}: column {schema.names[3]!r} is {kind}, expected a fixed-size list of float16")
    return values_schema(schema.names[3], kind.list_size)


def _key(chunk: RoutingChunk, token: int) -> int:
    return int(chunk.problem_ids_T[token]) << 32 | int(chunk.token_ids_T[token])


def _rows(path: Path) -> int | None:
    """Rows by the file's own footer; None if it is not readable."""
    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError):
        return None


def _read_document(path: Path, kind: type[_DocumentType]) -> _DocumentType:
    if path.stat().st_size > MAX_DOCUMENT_BYTES:
        raise TraceError(f"{path} is larger than {MAX_DOCUMENT_BYTES >> 20} MiB, which no trace needs")
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise TraceError(f"{path} is not valid: {where}: {first['msg']}") from error


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise TraceError(f"{path} is not a readable Parquet file: {_first_line(error)}") from error


def _read_row_group(file: pq.ParquetFile, group: int, path: Path) -> pa.Table:
    try:
        return file.read_row_group(group)
    except (pa.ArrowException, OSError) as error:
        raise TraceError(f"{path}, row group {group}: cannot be decoded: {_first_line(error)}") from error


def _read_table(path: Path, schema: pa.Schema) -> pa.Table:
    if not path.is_file():
        raise TraceError(f"{path} is missing")
    file = _open_parquet(path)
    missing = [name for name in schema.names if name not in file.schema_arrow.names]
    if missing:
        raise TraceError(f"{path} lacks column {missing[0]!r}; it has {', '.join(file.schema_arrow.names)}")
    try:
        table = file.read(columns=schema.names).cast(schema)
    except (pa.ArrowException, OSError) as error:
        raise TraceError(f"{path} cannot be decoded: {_first_line(error)}") from error
    for name in schema.names:
        if table.column(name).null_count:
            raise TraceError(f"{path}: nulls in column {name!r}, expected none")
    return table


def _first_line(error: BaseException) -> Any:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
