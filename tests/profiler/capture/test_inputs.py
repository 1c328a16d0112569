"""What requests read: rows in any order, of any number of requests, in little memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from profiler.capture.inputs import CapturedInputs
from profiler.trace.stream import InputsWriter

# Rows of (request, position, vocabulary id) in blocks, as an engine may write them.
BLOCKS = st.lists(
    st.lists(st.tuples(st.sampled_from([0, 1, 7]), st.integers(0, 5), st.integers(-1, 3)), min_size=1, max_size=8), max_size=6
)


def write(folder: Path, blocks: list[list[tuple[int, int, int]]]) -> None:
    with InputsWriter(folder) as writer:
        for block in blocks:
            numbers, positions, vocab_ids = (np.array(values) for values in zip(*block, strict=True))
            writer.add(numbers, positions, vocab_ids)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(BLOCKS, st.sampled_from([0, 1, 2, 7, 9]), st.lists(st.integers(0, 3), max_size=7))
def test_the_last_row_of_a_position_counts(
    tmp_path_factory: pytest.TempPathFactory, blocks: list[list[tuple[int, int, int]]], number: int, tokens: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    write(folder, blocks)
    read = [(position, vocab) for block in blocks for request, position, vocab in block if request == number]
    rows = dict(read)
    wrong = [p for p in sorted(rows) if p < len(tokens) - 1 and rows[p] >= 0 and rows[p] != tokens[p]]
    inputs = CapturedInputs(folder)
    assert inputs.known == any(blocks)
    assert inputs.difference(number, tokens) == ((wrong[0], rows[wrong[0]]) if wrong else None)
    # Not if an earlier position was computed again later: then this one was a draft token that was rejected.
    last = max(len(tokens) - 2, 0)
    since = [position for position, _ in read[max((n for n, row in enumerate(read) if row[0] == last), default=0) :]]
    assert inputs.has_read(number, tokens) == (last in rows and min(since) >= last and not wrong)


def test_a_token_takes_less_than_twelve_bytes(tmp_path: Path) -> None:
    """Of all requests of a batch in turn, as a decoding engine writes them."""
    with InputsWriter(tmp_path) as writer:
        for first in range(0, 2000, 10):
            numbers, positions = np.tile(np.arange(100), 10), np.repeat(np.arange(first, first + 10), 100)
            writer.add(numbers, positions, positions)
    tracemalloc.start()
    inputs = CapturedInputs(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert inputs.has_read(99, list(range(2000)))
    assert peak < 12 * 200_000
