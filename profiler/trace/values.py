"""Router logits and router inputs of a trace: the files of its folders `logits/` and `hidden/`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from profiler.errors import TraceError
from profiler.trace.decoding import decode_lists, entries
from profiler.trace.schema import MAX_HIDDEN_SIZE, values_schema
from profiler.trace.untrusted.parquet_files import (
    check_decoded_sizes,
    open_parquet,
    problems_of_groups,
    read_row_group,
    same_columns,
)

# Rows that are decoded at a time.
ROWS_AT_A_TIME = 1 << 14


def read_values(
    directory: Path, folder: str, problem_id: int
) -> tuple[npt.NDArray[np.int32], list[int], npt.NDArray[np.float16]]:
    """Read the values of one problem: positions `[T]`, the L decoder layers, and float16 values `[T, L, W]`.

    folder: `"logits"` or `"hidden"`. Raises `TraceError` if the trace in `directory` has none of this problem, or lacks some
    layers for some tokens.
    """
    tables = []
    for path, file in _files(directory, folder):
        for group, (first, last) in enumerate(problems_of_groups(file, path)):
            if first <= problem_id <= last:
                table = _read_group(file, group, path)
                tables.append(table.filter(pc.equal(table.column("problem_id"), problem_id)))
    if not sum(table.num_rows for table in tables):
        raise TraceError(f"{directory}: no {folder} of problem {problem_id}")
    whole = pa.concat_tables(tables)
    token_ids, layers = whole.column("token_id").to_numpy(), whole.column("layer").to_numpy()
    count = len(np.unique(layers))
    if len(layers) % count or (layers.reshape(-1, count) != layers[:count]).any():
        raise TraceError(f"{directory}: {folder} of problem {problem_id} lacks layers for some tokens")
    return token_ids[::count], layers[:count].tolist(), decode_lists(whole.column(3), count)


def iterate_values(
    directory: Path, folder: str, problems: range | None = None
) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int16], npt.NDArray[np.float16]]]:
    """Iterate over problem ids `[N]`, decoder layers `[N]` and float16 values `[N, W]`, some thousand rows at a time.

    folder: `"logits"` or `"hidden"`. problems: skip row groups that contain none of these problems. Raises `TraceError` if rows
    break the format.
    """
    for path, file in _files(directory, folder):
        found = None if problems is None else problems_of_groups(file, path)
        for group in range(file.num_row_groups):
            if found is not None and problems is not None:
                first, last = found[group]
                if last < problems.start or first >= problems.stop:
                    continue
            whole = _read_group(file, group, path)
            for start in range(0, whole.num_rows, ROWS_AT_A_TIME):
                table = whole.slice(start, ROWS_AT_A_TIME)
                values = decode_lists(table.column(3), 1)[:, 0]
                yield table.column("problem_id").to_numpy(), table.column("layer").to_numpy(), values


def _files(directory: Path, folder: str) -> Iterator[tuple[Path, pq.ParquetFile]]:
    """The files of a folder, their columns and sizes checked."""
    for path in sorted((directory / folder).glob("part-*.parquet")):
        with open_parquet(path) as file:
            names = file.schema_arrow.names
            if len(names) != 4 or not same_columns(file.schema_arrow, _expected_schema(file.schema_arrow, path)):
                raise TraceError(f"{path}: columns {names}, expected problem_id, layer, token_id and one list of float16")
            check_decoded_sizes(file, path)
            yield path, file


def _read_group(file: pq.ParquetFile, group: int, path: Path) -> pa.Table:
    table = read_row_group(file, group, path)
    if any(column.null_count for column in [*table.columns, *entries(table.column(3))]):
        raise TraceError(f"{path}, row group {group}: nulls, expected none")
    return table


def _expected_schema(schema: pa.Schema, path: Path) -> pa.Schema:
    kind = schema.field(3).type
    if not pa.types.is_fixed_size_list(kind) or not 1 <= kind.list_size <= MAX_HIDDEN_SIZE:
        raise TraceError(f"{path}: column {schema.names[3]!r} is {kind}, expected a fixed-size list of float16")
    return values_schema(schema.names[3], kind.list_size)
