"""Read untrusted Parquet files of a trace: the sizes that a file declares are checked before anything is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from profiler.errors import UNREADABLE, TraceError, first_line
from profiler.trace.schema import REQUIRED_COLUMNS
from profiler.trace.untrusted.parquet_footer import DELTA_BYTE_ARRAY, read_pages, read_row_groups

# Our own row groups are below 40 MB; a few compressed bytes of an untrusted file must not expand to gigabytes.
MAX_GROUP_BYTES = 256 << 20
MAX_TABLE_BYTES = 768 << 20
# For tables that are read some rows at a time: text in memory at once, a page, and a row group's text read as dictionaries.
MAX_TEXT_BYTES = 64 << 20
MAX_PAGE_BYTES = 256 << 20
MAX_DICTIONARY_BYTES = 24 << 20
BUFFER_BYTES = 1 << 20
JOINED_BYTES = 4 << 20


def same_columns(schema: pa.Schema, expected: pa.Schema) -> bool:
    """Whether names and types are equal. Declared nullability is ignored: the data itself is checked for nulls."""

    def plain(kind: pa.DataType) -> tuple[str, int]:
        if pa.types.is_fixed_size_list(kind):
            return str(kind.value_type), int(kind.list_size)
        return str(kind), 0

    return [(f.name, plain(f.type)) for f in schema] == [(f.name, plain(f.type)) for f in expected]


def count_rows(path: Path) -> int | None:
    """The number of rows according to the file's footer; None if it is not readable."""
    try:
        return int(pq.read_metadata(path).num_rows)
    except UNREADABLE:
        return None


def open_parquet(path: Path, **options: Any) -> pq.ParquetFile:
    """Open a file with verification of its page checksums. Raises `TraceError` if it is not readable."""
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True, **options)
        # Names that are not text raise only when they are accessed.
        _ = file.schema_arrow.names, file.num_row_groups
        return file
    except UNREADABLE as error:
        raise TraceError(f"{path} is not a readable Parquet file: {first_line(error)}") from error


def problems_of_groups(file: pq.ParquetFile, path: Path) -> list[tuple[int, int]]:
    """The first and last problem id of each row group, read from the column itself.

    The column's statistics are not used: pyarrow 26 crashes the process on those of a broken file.
    """
    found = []
    for group in range(file.num_row_groups):
        ids = read_row_group(file, group, path, ["problem_id"]).column(0)
        found.append((ids[0].as_py() or 0, ids[-1].as_py() or 0) if len(ids) else (0, -1))
    return found


def check_decoded_sizes(file: pq.ParquetFile, path: Path) -> None:
    """Raise `TraceError` if a decoded row group would be too large, or if its numbers of values do not match its rows."""
    kinds = [field.type for field in file.schema_arrow]
    entries = [kind.list_size if pa.types.is_fixed_size_list(kind) else 1 for kind in kinds]
    groups = read_row_groups(path)
    if len(groups) != file.num_row_groups:
        raise TraceError(f"{path}: {len(groups)} row groups in the footer, pyarrow finds {file.num_row_groups}")
    for number, group in enumerate(groups):
        if group.rows * sum(map(_row_bytes, kinds)) > MAX_GROUP_BYTES:
            raise TraceError(f"{path}, row group {number}: {group.rows:,} rows are larger than {MAX_GROUP_BYTES >> 20} MiB")
        if group.values != [group.rows * each for each in entries]:
            what = f"columns of {group.values} values, expected lists of {entries}"
            raise TraceError(f"{path}, row group {number}: {what} in {group.rows:,} rows")


def read_row_group(file: pq.ParquetFile, group: int, path: Path, columns: list[str] | None = None) -> pa.Table:
    """A row group, after `check_decoded_sizes`. Raises `TraceError` if it cannot be decoded."""
    rows = file.metadata.row_group(group).num_rows
    try:
        table = file.read_row_group(group, columns=columns)
        # A broken page can decode to another length than it declares.
        table.validate()
    except UNREADABLE as error:
        raise TraceError(f"{path}, row group {group}: cannot be decoded: {first_line(error)}") from error
    if table.num_rows != rows:
        raise TraceError(f"{path}, row group {group}: {table.num_rows:,} rows, expected {rows:,}")
    return table


def _row_bytes(kind: pa.DataType) -> int:
    bits = kind.list_size * kind.value_type.bit_width if pa.types.is_fixed_size_list(kind) else kind.bit_width
    return int(bits) // 8


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read a table with the columns of `schema`, and any additional columns of numbers, booleans or text.

    Raises `TraceError` if the file is missing, lacks a column, has nulls where the format allows none, or takes too much
    memory.
    """
    found = _columns_found(path, schema)
    further = [field for field in found if field.name not in schema.names and _is_plain(field.type)]
    wanted = pa.schema([*schema, *further])
    # Text is read as dictionaries: a page of a few bytes can encode gigabytes of repeated text.
    text = [field.name for field in found if _is_text(field.type)]
    with open_parquet(path, read_dictionary=text) as file:
        fixed = sum(field.type.bit_width // 8 for field in found if field.name in wanted.names and _is_fixed(field.type))
        if file.metadata.num_rows * (fixed + 4 * len(text)) > MAX_TABLE_BYTES:
            raise TraceError(f"{path}: {file.metadata.num_rows:,} rows take more than {MAX_TABLE_BYTES >> 20} MiB")
        try:
            table = file.read(columns=wanted.names)
            if sum(_text_bytes(table.column(name)) for name in text if name in wanted.names) > MAX_TABLE_BYTES:
                raise TraceError(f"{path}: its text takes more than {MAX_TABLE_BYTES >> 20} MiB")
            table = table.cast(wanted)
        except UNREADABLE as error:
            raise TraceError(f"{path} cannot be decoded: {first_line(error)}") from error
    for name in schema.names:
        if name in REQUIRED_COLUMNS and table.column(name).null_count:
            raise TraceError(f"{path}: nulls in column {name!r}, expected none")
    return table


def stream_table(path: Path, schema: pa.Schema, rows: int, from_problem: int = 0) -> Iterator[pa.Table]:
    """The columns of `schema` in order, at most `rows` rows at a time, so that memory does not grow with the table.

    from_problem: row groups that end before this problem are skipped; the column problem_id must be sorted for that.
    Raises `TraceError` as `read_table` does, and if a page or the text of one row is too large.
    """
    found = _columns_found(path, schema)
    text = [field.name for field in found if field.name in schema.names and _is_text(field.type)]
    limits = _rows_without_dictionary(path, schema.names, text)
    with open_parquet(path) as file:
        groups = list(range(file.num_row_groups))
        if len(limits) != len(groups):
            raise TraceError(f"{path}: {len(limits)} row groups, pyarrow finds {len(groups)}")
        if from_problem:
            groups = [group for group, (_, last) in enumerate(problems_of_groups(file, path)) if last >= from_problem]
    for limit, alike in groupby(groups, key=limits.__getitem__):
        # With a buffer, pages are read one at a time.
        how = {"read_dictionary": text} if limit is None else {"pre_buffer": False, "buffer_size": BUFFER_BYTES}
        try:
            for table in _joined_batches(path, list(alike), schema.names, min(limit or rows, rows), rows, how):
                for name in schema.names:
                    if name in REQUIRED_COLUMNS and table.column(name).null_count:
                        raise TraceError(f"{path}: nulls in column {name!r}, expected none")
                for part in [table] if limit else _with_little_text(table, text, path):
                    yield part.cast(schema)
        except UNREADABLE as error:
            raise TraceError(f"{path} cannot be decoded: {first_line(error)}") from error
        if limit:
            # Otherwise the memory pool keeps the memory of large pages.
            pa.default_memory_pool().release_unused()


def _rows_without_dictionary(path: Path, columns: list[str], text: list[str]) -> list[int | None]:
    """For each row group, how many rows to read at a time without dictionaries; None if its text is to be read as dictionaries.

    A page of a few bytes can encode gigabytes of repeated text. Dictionaries keep that small, but a dictionary is built from
    all text of a row group and takes six times its size. Where a row group has a lot of text, rows are limited instead, relying
    on no value being larger than its page. Raises `TraceError` if a page is too large.
    """
    limits: list[int | None] = []
    with open_parquet(path) as file:
        # pyarrow reads by the names in the schema; the names stored with the column chunks are a second copy, which may differ.
        leaves = [file.schema.column(number).path.encode() for number in range(len(file.schema))]
    groups = read_row_groups(path)
    if sum(chunk.size for group in groups for chunk in group.chunks.values()) > path.stat().st_size:
        raise TraceError(f"{path} is not a readable Parquet file: its columns are larger than the file")
    for number, group in enumerate(groups):
        if list(group.chunks) != leaves:
            raise TraceError(
                f"{path}, row group {number}: columns {list(group.chunks)}, expected those of the schema: {leaves}"
            )
        pages = {name: read_pages(path, group.chunks[name.encode()]) for name in columns}
        largest = max((page.size for of_column in pages.values() for page in of_column), default=0)
        if largest > MAX_PAGE_BYTES:
            what = f"a page of {largest >> 20} MiB, expected at most {MAX_PAGE_BYTES >> 20}"
            raise TraceError(f"{path}, row group {number}: {what}: rewrite it with smaller pages or row groups")
        of_text = [page for name in text for page in pages.get(name, [])]
        repeats = any(page.encoding == DELTA_BYTE_ARRAY for page in of_text)
        if repeats or sum(page.size for page in of_text) > MAX_DICTIONARY_BYTES:
            limits.append(max(1, MAX_TEXT_BYTES // max(page.size + 1 for page in of_text)))
        else:
            limits.append(None)
    return limits


def _joined_batches(
    path: Path, groups: list[int], columns: list[str], at_once: int, rows: int, how: dict[str, Any]
) -> Iterator[pa.Table]:
    """Row groups, decoded `at_once` rows at a time and joined into tables of at most `rows`. how: options of `open_parquet`."""

    def joined() -> pa.Table:
        table = pa.Table.from_batches(waiting).select(columns)
        table.validate()
        return table

    waiting: list[pa.RecordBatch] = []
    count = size = 0
    with open_parquet(path, **how) as file:
        for batch in file.iter_batches(at_once, row_groups=groups, columns=columns):
            if waiting and (count + len(batch) > rows or size > JOINED_BYTES):
                yield joined()
                waiting, count, size = [], 0, 0
            waiting.append(batch)
            count, size = count + len(batch), size + batch.nbytes
        if waiting:
            yield joined()


def _with_little_text(table: pa.Table, text: list[str], path: Path) -> Iterator[pa.Table]:
    """Split the table into parts whose text, still in dictionaries, takes at most `MAX_TEXT_BYTES` each when expanded."""
    if sum(_text_bytes(table.column(name)) for name in text) <= MAX_TEXT_BYTES:
        yield table
    elif table.num_rows == 1:
        raise TraceError(f"{path}: a row has more than {MAX_TEXT_BYTES >> 20} MiB of text")
    else:
        half = table.num_rows // 2
        yield from _with_little_text(table.slice(0, half), text, path)
        yield from _with_little_text(table.slice(half), text, path)


def _columns_found(path: Path, wanted: pa.Schema) -> pa.Schema:
    """All columns of the table. Raises `TraceError` if a wanted column is missing, or if a column occurs twice."""
    if not path.is_file():
        raise TraceError(f"{path} is missing")
    with open_parquet(path) as file:
        found = file.schema_arrow
    missing = [name for name in wanted.names if name not in found.names]
    if missing:
        raise TraceError(f"{path} lacks column {missing[0]!r}; it has {', '.join(found.names)}")
    if len(set(found.names)) < len(found.names):
        raise TraceError(f"{path} has a column twice")
    return found


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_plain(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or _is_fixed(kind))


def _is_fixed(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _text_bytes(column: pa.ChunkedArray) -> int:
    """The size of a dictionary column when expanded to plain text."""
    lengths = [pc.take(pc.binary_length(chunk.dictionary), chunk.indices) for chunk in column.chunks]
    return sum(pc.sum(chunk.cast(pa.int64())).as_py() or 0 for chunk in lengths)
