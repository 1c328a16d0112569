"""Tables that are read some rows at a time: in order, in part, and whatever their text expands to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from profiler.errors import TraceError
from profiler.trace.untrusted import parquet_files
from profiler.trace.untrusted.parquet_files import MAX_DICTIONARY_BYTES, MAX_TEXT_BYTES, stream_table

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


@pytest.mark.parametrize("groups", [1, 3])
def test_much_text_in_a_row_group_is_read_in_order(tmp_path: Path, groups: int) -> None:
    """More than dictionaries are built for, among groups of less."""
    random = np.random.default_rng(0)
    much = [random.bytes(500).hex() for _ in range(30_000)]
    parts: list[Sequence[str | None]] = [["little"] * 5, much, ["", None, "x"]] if groups > 1 else [much]
    text = [each for part in parts for each in part]
    with pq.ParquetWriter(tmp_path / "t.parquet", SCHEMA) as writer:
        start = 0
        for part in parts:
            writer.write_table(pa.table({"problem_id": range(start, start + len(part)), "text": part}).cast(SCHEMA))
            start += len(part)
    assert sum(map(len, much)) > MAX_DICTIONARY_BYTES
    found = list(stream_table(tmp_path / "t.parquet", SCHEMA, 4000))
    assert all(part.num_rows <= 4000 for part in found)
    assert [row for part in found for row in part.column("text").to_pylist()] == text
    assert [row for part in found for row in part.column("problem_id").to_pylist()] == list(range(len(text)))


def test_text_that_repeats_the_text_before_is_not_written_out_at_once(tmp_path: Path) -> None:
    """Values stored as differences from the one before: one page of them can also stand for gigabytes."""
    text = "x" * 1_000_000
    table = pa.table({"problem_id": pa.array(range(300), pa.int32()), "text": [text] * 300})
    pq.write_table(
        table, tmp_path / "t.parquet", use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"}, compression="none"
    )
    assert (tmp_path / "t.parquet").stat().st_size < 2_000_000
    rows = 0
    for part in stream_table(tmp_path / "t.parquet", SCHEMA, 300):
        assert part.column("text").nbytes <= 2 * MAX_TEXT_BYTES
        rows += part.num_rows
    assert rows == 300


def test_columns_of_other_names_than_the_schema_s_are_refused(tmp_path: Path) -> None:
    """A column chunk's own copy of its name: pyarrow ignores it, so the chunk's pages would not be measured."""
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"problem_id": pa.array([1], pa.int32()), "text": ["x"]}), path, store_schema=False)
    content = path.read_bytes()
    last = content.rindex(b"text")
    assert content.count(b"text") == 2
    path.write_bytes(content[:last] + b"tex_" + content[last + 4 :])
    with pytest.raises(TraceError, match="expected those of the schema"):
        list(stream_table(path, SCHEMA, 10))


def test_a_page_too_large_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"problem_id": pa.array(range(200), pa.int32()), "text": [f"{n:010000d}" for n in range(200)]})
    pq.write_table(table, tmp_path / "t.parquet", use_dictionary=False)
    monkeypatch.setattr(parquet_files, "MAX_PAGE_BYTES", 1 << 20)
    monkeypatch.setattr(parquet_files, "_joined_batches", None)
    with pytest.raises(TraceError, match=r"row group 0: a page of 1 MiB, expected at most 1: rewrite it with smaller pages"):
        list(stream_table(tmp_path / "t.parquet", SCHEMA, 10))
