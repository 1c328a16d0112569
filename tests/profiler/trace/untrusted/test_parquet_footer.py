"""Footers: the same numbers as pyarrow's for sound files, and an error for every other."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from profiler.errors import TraceError
from profiler.trace.untrusted.parquet_footer import DELTA_BYTE_ARRAY, ColumnChunk, read_pages, read_row_groups


@pytest.mark.parametrize("rows", [0, 1, 1000])
def test_counts_are_those_of_pyarrow(tmp_path: Path, rows: int) -> None:
    table = pa.table(
        {
            "number": np.arange(rows),
            "text": pa.array([f"t{n % 7}" if n % 3 else None for n in range(rows)], pa.string()),
            "list": pa.array([[1.5] * (n % 5) for n in range(rows)], pa.list_(pa.float16())),
            "nested": pa.array(
                [{"a": [n], "b": {"c": True}} for n in range(rows)],
                pa.struct([("a", pa.list_(pa.int32())), ("b", pa.struct([("c", pa.bool_())]))]),
            ),
        }
    ).replace_schema_metadata({"key": "value" * 100})
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, row_group_size=300, write_page_index=True)
    metadata = pq.read_metadata(path)
    groups = read_row_groups(path)
    assert [group.rows for group in groups] == [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
    for number, group in enumerate(groups):
        columns = range(metadata.num_columns)
        assert group.values == [metadata.row_group(number).column(column).num_values for column in columns]


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_pages_are_all_of_the_chunk(tmp_path: Path, version: str) -> None:
    path = tmp_path / "x.parquet"
    text = [f"{n:050d}" for n in range(2000)]
    encodings = {"delta": "DELTA_BYTE_ARRAY", "plain": "PLAIN"}
    table = pa.table({"delta": text, "plain": text, "few": ["a", "b"] * 1000})
    how = {"column_encoding": encodings, "use_dictionary": ["few"], "data_page_size": 10_000, "data_page_version": version}
    pq.write_table(table, path, compression="zstd", write_batch_size=100, row_group_size=1500, write_statistics=False, **how)
    metadata = pq.read_metadata(path)
    for number, group in enumerate(read_row_groups(path)):
        pages = {name: read_pages(path, chunk) for name, chunk in group.chunks.items()}
        plain = [page.size for page in pages[b"plain"]]
        # 50 bytes and their length each; the levels of a column with nulls take some more.
        assert 54 * group.rows <= sum(plain) < 55 * group.rows
        assert len(plain) >= 3
        assert max(plain) < 20_000
        assert {page.encoding for page in pages[b"delta"]} == {DELTA_BYTE_ARRAY}
        assert pages[b"few"][0].encoding is None
        for column, name in enumerate([b"delta", b"plain", b"few"]):
            found = metadata.row_group(number).column(column)
            # The promised size includes the headers.
            assert 0 <= found.total_uncompressed_size - sum(page.size for page in pages[name]) < 100 * len(pages[name])


def test_pages_elsewhere_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": [1, 2, 3]}), path)
    for chunk in (ColumnChunk(0, 10), ColumnChunk(path.stat().st_size, 10), ColumnChunk(path.stat().st_size - 8, 50)):
        with pytest.raises(TraceError, match="is not a readable Parquet file"):
            read_pages(path, chunk)


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"PAR1" + b"\xff" * 40 + b"\x28\0\0\0PAR1", b"\x19\xfc\xff\xff\xff\x7f\x07\0\0\0PAR1"]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(TraceError, match="is not a readable Parquet file"):
        read_row_groups(tmp_path / "x.parquet")


@pytest.mark.parametrize("nested", [b"\x19", b"\x1b\x01\x89"])
def test_nesting_without_end_is_refused(tmp_path: Path, nested: bytes) -> None:
    footer = b"\x49" + nested * 5000
    (tmp_path / "x.parquet").write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(TraceError, match="is not a readable Parquet file"):
        read_row_groups(tmp_path / "x.parquet")


def test_broken_footers_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": np.arange(50), "b": [[1, 2]] * 50}), path, row_group_size=10)
    sound = path.read_bytes()
    source = random.Random(0)
    refused = 0
    for _ in range(3000):
        content = bytearray(sound)
        content[source.randrange(len(content) - 500, len(content))] = source.randrange(256)
        path.write_bytes(content)
        try:
            read_row_groups(path)
        except TraceError:
            refused += 1
    assert 0 < refused < 3000
