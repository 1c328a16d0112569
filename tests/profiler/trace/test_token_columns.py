"""Values of tokens, read along with the routing: the same as from whole tables, however both are cut into pieces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.traces import write_synthetic_trace

from profiler.errors import TraceError
from profiler.trace.reader import Trace
from profiler.trace.schema import RoutingChunk
from profiler.trace.token_columns import TokenColumns

COLUMNS = [pa.field("vocab_id", pa.int32())]
MISSING = np.array([-1, 0])


def both(table: pa.Table) -> np.ndarray:
    """Vocabulary id, and its last digit."""
    ids_N = table.column("vocab_id").to_numpy().astype(np.int64)
    return np.stack([ids_N, ids_N % 10], axis=-1)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    ids = np.tile([[[0, 1]]], (2, 1, 1))
    return write_synthetic_trace(tmp_path_factory.mktemp("trace") / "t", [(ids, np.full(ids.shape, 0.5))], 4)


def chunk_of(keys: list[tuple[int, int]]) -> RoutingChunk:
    problems_T, tokens_T = np.array(keys, np.int32).T
    return RoutingChunk(problems_T, tokens_T, np.zeros((len(keys), 1, 1), np.uint8), None)


def write_tokens(trace: Trace, keys: list[tuple[int, int]], row_group_size: int) -> None:
    problems, tokens = zip(*keys, strict=True)
    columns = {"problem_id": pa.array(problems, pa.int32()), "token_id": pa.array(tokens, pa.int32())}
    vocab = pa.array([100 * problem + token for problem, token in keys], pa.int32())
    pq.write_table(pa.table({**columns, "vocab_id": vocab}), trace.path / "tokens.parquet", row_group_size=row_group_size)


@settings(max_examples=50)
@given(
    listed=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 8)), min_size=1),
    asked=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 8)), min_size=1),
    cuts=st.sets(st.integers(1, 35)),
    rows=st.integers(1, 8),
)
def test_values_are_those_of_the_whole_table(
    trace: Trace, listed: set[tuple[int, int]], asked: set[tuple[int, int]], cuts: set[int], rows: int
) -> None:
    write_tokens(trace, sorted(listed), row_group_size=rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("profiler.trace.token_columns.ROWS_AT_A_TIME", rows)
        columns = TokenColumns(trace, COLUMNS, both, MISSING, first_problem=min(asked)[0])
        keys = sorted(asked)
        ends = [*sorted(cut for cut in cuts if cut < len(keys)), len(keys)]
        found = [columns.of(chunk_of(keys[first:end])) for first, end in zip([0, *ends], ends, strict=False)]
    expected = [[100 * problem + token, token] if (problem, token) in listed else [-1, 0] for problem, token in keys]
    assert np.concatenate(found).tolist() == expected


@pytest.mark.parametrize("keys", [[(0, 1), (0, 0)], [(1, 0), (0, 0)], [(0, 0), (0, 0)]])
@pytest.mark.parametrize("rows", [1, 2])
def test_an_unsorted_table_is_refused(trace: Trace, keys: list[tuple[int, int]], rows: int) -> None:
    write_tokens(trace, keys, row_group_size=rows)
    with pytest.raises(TraceError, match=r"tokens\.parquet is not sorted by \(problem_id, token_id\)"):
        TokenColumns(trace, COLUMNS, both, MISSING).of(chunk_of([(2, 0)]))


def test_without_a_table_all_are_missing(trace: Trace, tmp_path: Path) -> None:
    assert TokenColumns(Trace(tmp_path, trace.metadata, None), COLUMNS, both, MISSING).of(chunk_of([(0, 0)])).tolist() == [
        [-1, 0]
    ]
