"""Footers: the same numbers as pyarrow's for sound files, and an error for every other."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from profiler.errors import TraceError
from profiler.parquet_footer import read_row_groups


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


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"PAR1" + b"\xff" * 40 + b"\x28\0\0\0PAR1", b"\x19\xfc\xff\xff\xff\x7f\x07\0\0\0PAR1"]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.parquet").write_bytes(content)
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
