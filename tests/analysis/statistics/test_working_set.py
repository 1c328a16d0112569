"""The longest problem's working set, next to that of its tokens in random order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from support.frames import counted, make_axes, make_frame

from analysis.counts import longest
from analysis.counts.longest import LongestProblem
from analysis.statistics import working_set as module
from analysis.statistics.working_set import working_set

EXPERTS, TOP_K = 6, 2


def problem(tokens: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.argsort(random.random((tokens, 2, EXPERTS)), axis=2)[:, :, :TOP_K]


def kept(ids: list[np.ndarray]) -> LongestProblem:
    return counted(LongestProblem(make_axes(2, EXPERTS, TOP_K)), [make_frame(ids, EXPERTS)])


def test_the_longest_is_kept_and_of_equals_the_first() -> None:
    found = kept([problem(3), problem(9, 1), problem(9, 2), problem(4)]).route
    assert (found.number, found.tokens) == (1, 9)
    assert np.array_equal(found.expert_ids_TLK, problem(9, 1))
    assert found.positions_T.tolist() == list(range(9))


def test_a_long_problem_is_cut_but_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longest, "MAX_TOKENS", 5)
    found = kept([problem(7), problem(9, 1)]).route
    assert (found.number, found.tokens, len(found.positions_T)) == (1, 9, 5)
    assert np.array_equal(found.expert_ids_TLK, problem(9, 1)[:5])


def test_distinct_experts_of_the_last_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOWS", (1, 2, 4, 9))
    ids = problem(7)
    found = working_set(kept([ids]).route, EXPERTS)
    assert found is not None
    assert (found.problem, found.tokens, found.decode_from) == (0, 7, 1)
    for number, window in enumerate((1, 2, 4)):
        assert np.isnan(found.distinct[number, : window - 1]).all()
        for t in range(window - 1, 7):
            distinct = [len(np.unique(ids[t - window + 1 : t + 1, layer])) for layer in range(2)]
            assert found.distinct[number, t] == pytest.approx(np.mean(distinct))
        # All ways to draw so many of the seven tokens.
        ways = [
            len(np.unique(ids[list(drawn), layer])) for drawn in itertools.combinations(range(7), window) for layer in range(2)
        ]
        assert found.shuffled[number] == pytest.approx(np.mean(ways))
    assert np.isnan(found.distinct[3]).all()
    assert np.isnan(found.shuffled[3])


def test_no_problem_has_no_working_set() -> None:
    assert working_set(LongestProblem(make_axes(2, EXPERTS, TOP_K)).route, EXPERTS) is None
