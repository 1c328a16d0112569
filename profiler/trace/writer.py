"""Write the files of a trace: routing (and logits, hidden) as Parquet, tables, metadata, and the manifest last.

A file gets its final name only when it is complete.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from profiler.errors import TraceError
from profiler.trace.schema import (
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
)

# A row group is the unit of reading: 131,072 rows of K = 2 are 2 MB in memory. Wide rows (logits, hidden) get fewer rows.
ROWS_PER_GROUP = 1 << 17
BYTES_PER_GROUP = 32 << 20
ROWS_PER_FILE = 1 << 24
# For tables: text is decoded into dictionaries, which take several times a row group's size.
TEXT_PER_GROUP = 16 << 20
KEY_COLUMNS = ("problem_id", "layer", "token_id")


class BlockWriter:
    """Stream the rows of a trace, one per (problem, token, layer), to `folder/part-*.parquet`.

    folder: created if missing; must not contain parts yet. layers: decoder layer index of each of the L recorded layers.
    schema: `routing_schema` or `values_schema`. The encodings are the best by size and speed of those measured
    (docs/reference/trace.md).
    """

    def __init__(self, folder: Path, layers: list[int], schema: pa.Schema) -> None:
        self.schema = schema
        self._folder = folder
        self._layers_L = np.asarray(layers, dtype=np.int16)
        self._lists = {field.name: field.type for field in schema if field.name not in KEY_COLUMNS}
        # Every list entry of a trace has one or two bytes.
        token_bytes = len(layers) * 2 * sum(kind.list_size for kind in self._lists.values())
        self.tokens_per_group = max(1, min(ROWS_PER_GROUP // len(layers), BYTES_PER_GROUP // token_bytes))
        self._part = 0
        self._file: pq.ParquetWriter | None = None
        self._file_rows = 0
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob("part-*.parquet")):
            raise TraceError(f"{folder} already holds parts; choose another folder")

    def write(
        self, problem_ids_T: npt.NDArray[np.int32], token_ids_T: npt.NDArray[np.int32], lists: dict[str, npt.NDArray[Any]]
    ) -> None:
        """Append tokens as one row group, ideally `tokens_per_group` of them.

        lists: maps each list column to an array `[T, L, W]` of its type. For empty slots, where the schema allows nulls, it
        also has `"empty"`, a mask `[T, L, K]`.
        """
        if len(token_ids_T) == 0:
            return
        if self._file is None:
            elements = {name: f"{name}.list.element" for name in self._lists}
            encodings = dict.fromkeys(KEY_COLUMNS, "DELTA_BINARY_PACKED") | dict.fromkeys(elements.values(), "PLAIN")
            if "expert_ids" in elements:
                encodings[elements["expert_ids"]] = "BYTE_STREAM_SPLIT"
            self._file = pq.ParquetWriter(
                self._part_path.with_suffix(".tmp"),
                self.schema,
                compression="zstd",
                compression_level=1,
                use_dictionary=False,
                column_encoding=encodings,
                write_statistics=list(KEY_COLUMNS),
                # So that reading detects a flipped bit, not only comparing hashes.
                write_page_checksum=True,
            )
        layers = len(self._layers_L)
        columns = [
            pa.array(np.repeat(problem_ids_T, layers)),
            pa.array(np.tile(self._layers_L, len(token_ids_T))),
            pa.array(np.repeat(token_ids_T, layers)),
            *self._list_columns(lists),
        ]
        rows = len(token_ids_T) * layers
        self._file.write_table(pa.Table.from_arrays(columns, schema=self.schema), row_group_size=rows)
        self._file_rows += rows
        if self._file_rows >= ROWS_PER_FILE:
            self.close()

    def close(self) -> None:
        """Finish the open file and give it its final name."""
        if self._file is None:
            return
        self._file.close()
        self._part_path.with_suffix(".tmp").rename(self._part_path)
        self._file, self._file_rows = None, 0
        self._part += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is None:
            self.close()

    def _list_columns(self, lists: dict[str, npt.NDArray[Any]]) -> list[pa.Array]:
        empty = lists.get("empty")
        columns = []
        for name, kind in self._lists.items():
            values = lists[name].reshape(-1)
            if empty is None:
                entries = pa.array(values)
            else:
                # The id E may not fit the column's type. Masked entries are null whatever their value.
                entries = pa.array(np.where(empty.reshape(-1), 0, values).astype(values.dtype), mask=empty.reshape(-1))
            columns.append(pa.FixedSizeListArray.from_arrays(entries.cast(kind.value_type), type=kind))
        return columns

    @property
    def _part_path(self) -> Path:
        return self._folder / f"part-{self._part:05d}.parquet"


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Lock the directory against other collectors on this machine. The lock ends with the process, even if it is killed.

    On file systems without locks (some network ones) nothing is locked.
    Raises `TraceError` if another process, or another part of this one, holds the lock.
    """
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TraceError(
                f"{directory}: another process is collecting into it; wait for it, or choose another output folder"
            ) from error
        except OSError as error:
            if error.errno not in {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}:
                raise
        yield
    finally:
        os.close(handle)


def write_metadata(directory: Path, metadata: Metadata) -> None:
    """Write `metadata.json` atomically."""
    write_text(directory / METADATA_FILE, metadata.model_dump_json(indent=1) + "\n")


def public_command() -> list[str]:
    """This process's command line for the metadata, without the path of the interpreter or script."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table (tokens, problems) atomically, in row groups small enough for readers to hold their text several times."""
    temporary = path.with_suffix(".tmp")
    rows = max(1, table.num_rows * TEXT_PER_GROUP // max(table.nbytes, TEXT_PER_GROUP))
    pq.write_table(table, temporary, row_group_size=rows, compression="zstd", write_page_checksum=True)
    temporary.rename(path)


def write_manifest(directory: Path, extra_files: dict[str, int] | None = None) -> Manifest:
    """Hash every file of the trace, write `manifest.json` and remove `capture/`. Nothing may be written afterwards.

    extra_files: additional file names with their row counts (the JSON lines).
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
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with temporary_of(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def temporary_of(path: Path) -> Iterator[Path]:
    """A file to write in the block, which gets the name `path` at its end. It is removed if the block raises an error.

    Its name is hidden and contains the final name and the process's number, so that no other file has the same one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def left_temporaries(path: Path) -> set[Path]:
    """What killed processes left of `temporary_of(path)`."""
    start, end = f".{path.name}.", ".tmp"
    return {other for other in path.parent.iterdir() if other.name.startswith(start) and other.name.endswith(end)}


def check_free(out: Path, *, resume: bool = False) -> None:
    """Raise `TraceError` unless `out` does not exist or is an empty folder.

    resume: also accept a trace, complete or not, and a folder in which a collection was killed before it wrote its metadata.
    """
    if out.is_dir() and (out / METADATA_FILE).exists():
        if resume:
            return
        if (out / MANIFEST_FILE).exists():
            raise TraceError(f"{out} already holds a trace: choose another output folder, or delete that one first")
        raise TraceError(f"{out} holds an unfinished collection: resume it, or delete that folder first")
    existing = next(parent for parent in [out, *out.absolute().parents] if parent.exists())
    if not existing.is_dir():
        raise TraceError(f"{existing} is a file, not a folder: choose another output folder")
    # The process may have been killed before metadata.json had its final name.
    begun = left_temporaries(out / METADATA_FILE) if resume and out.is_dir() else set()
    if out.exists() and (not out.is_dir() or set(out.iterdir()) - begun):
        raise TraceError(f"{out} exists and is not an empty folder: choose another output folder")
