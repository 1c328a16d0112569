"""Places where the same run of tokens ended before, by hand and against a search."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from speculation.data.repeats import RUN_LENGTHS, UNKNOWN_TOKEN, find_matches


def test_by_hand() -> None:
    #       0  1  2  3  4  5  6 | 7  8
    keys = [5, 6, 9, 5, 6, 5, 6, 5, 6]
    first = [0, 0, 0, 0, 0, 0, 0, 7, 7]
    matches = find_matches(np.array(keys), np.array(first))
    # 6 after 5 at place 4 was so at 1; at 6 last at 4, as 5 6; no run of four has come before, and the other stretch is apart.
    assert matches.index_T.tolist() == [-1, -1, -1, 0, 1, 3, 4, -1, -1]
    assert matches.order_T.tolist() == [0, 0, 0, 1, 2, 1, 2, 0, 0]


def test_unknown_tokens_match_nothing() -> None:
    keys = np.array([3, UNKNOWN_TOKEN, 3, UNKNOWN_TOKEN, 3])
    matches = find_matches(keys, np.zeros(5, dtype=np.int64))
    assert matches.index_T.tolist() == [-1, -1, 0, -1, 2]
    assert matches.order_T.tolist() == [0, 0, 1, 0, 1]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 3), st.booleans()), min_size=1, max_size=40))
def test_against_a_search(tokens: list[tuple[int, bool]]) -> None:
    keys = np.array([key for key, _ in tokens])
    starts = np.array([True, *(start for _, start in tokens[1:])])
    first = np.maximum.accumulate(np.where(starts, np.arange(len(keys)), 0))
    matches = find_matches(keys, first)
    for place in range(len(keys)):
        expected = (-1, 0)
        for number, length in enumerate(RUN_LENGTHS, start=1):
            for earlier in range(place - 1, first[place] + length - 2, -1):
                run = keys[earlier - length + 1 : earlier + 1]
                if UNKNOWN_TOKEN not in run and (run == keys[place - length + 1 : place + 1]).all():
                    expected = (earlier, number)
                    break
        assert (matches.index_T[place], matches.order_T[place]) == expected, place
