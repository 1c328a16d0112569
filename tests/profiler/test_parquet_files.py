"""Tables that are read some rows at a time: in order, in part, and whatever their text expands to."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from profiler.errors import TraceError
from profiler.parquet_files import MAX_TEXT_BYTES, stream_table

SCHEMA = pa.schema([("problem_id", pa.int32()), ("text", pa.string())])


def test_rows_come_in_order_and_from_a_problem_on(tmp_path: Path) -> None:
    table = pa.table(
        {"problem_id": pa.array(range(100), pa.int32()), "text": [f"t{n}" for n in range(100)], "more": [1.0] * 100}
    )
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=10)
    parts = list(stream_table(tmp_path / "t.parquet", SCHEMA, 7))
    assert all(part.num_rows <= 7 and part.schema == SCHEMA for part in parts)
    assert [row for part in parts for row in part.column("text").to_pylist()] == [f"t{n}" for n in range(100)]
    later = pa.concat_tables(stream_table(tmp_path / "t.parquet", SCHEMA, 7, from_problem=35))
    assert later.column("problem_id").to_pylist() == list(range(30, 100))


def test_repeated_text_is_not_written_out_at_once(tmp_path: Path) -> None:
    """A page of some kilobytes can stand for gigabytes."""
    text = "x" * 1_000_000
    table = pa.table({"problem_id": pa.array(range(200), pa.int32()), "text": pa.array([text] * 200).dictionary_encode()})
    pq.write_table(table, tmp_path / "t.parquet")
    assert (tmp_path / "t.parquet").stat().st_size < 2_000_000
    rows = 0
    for part in stream_table(tmp_path / "t.parquet", SCHEMA, 200):
        assert part.column("text").nbytes <= MAX_TEXT_BYTES + 8 * part.num_rows + 8
        rows += part.num_rows
    assert rows == 200


def test_missing_columns_and_files_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"problem_id": pa.array([1], pa.int32())}), tmp_path / "t.parquet")
    with pytest.raises(TraceError, match=r"lacks column 'text'; it has problem_id"):
        list(stream_table(tmp_path / "t.parquet", SCHEMA, 10))
    with pytest.raises(TraceError, match=r"absent\.parquet is missing"):
        list(stream_table(tmp_path / "absent.parquet", SCHEMA, 10))
