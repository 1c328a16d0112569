"""The row groups of a trace's routing files, each file checked before the first is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from profiler.errors import TraceError
from profiler.trace.decoding import decode_routing
from profiler.trace.schema import Metadata, RoutingChunk, routing_schema
from profiler.trace.untrusted.parquet_files import (
    check_decoded_sizes,
    open_parquet,
    problems_of_groups,
    read_row_group,
    same_columns,
)


@dataclass(frozen=True)
class RowGroup:
    """One row group of an open routing file."""

    path: Path
    number: int
    _file: pq.ParquetFile
    _metadata: Metadata

    @property
    def place(self) -> str:
        """The file and the row group, for messages."""
        return f"{self.path}, row group {self.number}"

    @property
    def num_rows(self) -> int:
        """Its rows, from the file's footer."""
        return int(self._file.metadata.row_group(self.number).num_rows)

    def table(self) -> pa.Table:
        """Its rows as they are in the file. Raises `TraceError` if they cannot be read."""
        return read_row_group(self._file, self.number, self.path)

    def decode(self, table: pa.Table | None = None) -> RoutingChunk:
        """Its rows, or those of its `table`, as arrays. Raises `TraceError` if they break the format."""
        return decode_routing(self.table() if table is None else table, self._metadata, self.place)


class RowGroups:
    """Iterates over row groups, and remembers which files have been checked."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        model, record = metadata.model, metadata.record
        self._schema = routing_schema(model.num_experts, model.top_k, weights=record.weights)
        # Files whose columns and sizes have been checked: the first and last problem of each row group, once it was needed.
        self._checked: dict[Path, list[tuple[int, int]] | None] = {}

    def of(self, files: Iterable[Path], problems: range | None = None) -> Iterator[RowGroup]:
        """The row groups of `files` in order, or those that may contain `problems`. Each is valid until the next is taken.

        Raises `TraceError` if a file's columns are not those that the metadata says, or if it declares more than is plausible.
        """
        for path in files:
            with open_parquet(path) as file:
                if path not in self._checked:
                    if not same_columns(file.schema_arrow, self._schema):
                        names = file.schema_arrow.names
                        raise TraceError(f"{path}: columns {names}, whose names or types differ from what the metadata says")
                    check_decoded_sizes(file, path)
                    self._checked[path] = None
                for number in range(file.num_row_groups):
                    if problems is not None:
                        first, last = self._problems_of(path, file)[number]
                        if first >= problems.stop or last < problems.start:
                            continue
                    yield RowGroup(path, number, file, self._metadata)

    def first_problem_of(self, group: RowGroup) -> int:
        """The first problem id of a row group, read from its rows."""
        return self._problems_of(group.path, group._file)[group.number][0]

    def _problems_of(self, path: Path, file: pq.ParquetFile) -> list[tuple[int, int]]:
        found = self._checked[path]
        if found is None:
            found = self._checked[path] = problems_of_groups(file, path)
        return found
