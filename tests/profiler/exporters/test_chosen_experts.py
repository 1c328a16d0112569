"""Choices and their value, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiler.errors import SpecmoeError
from profiler.exporters.chosen_experts import Budget, choose_experts, choose_layers, distinct_experts, hit_rate, overlap
from profiler.exporters.counts import ExpertCounts


def counts(rows: list[list[int]], tokens: int) -> ExpertCounts:
    table = np.array(rows)
    return ExpertCounts(table, table.astype(np.float64), tokens, 1)


def test_the_best_of_each_layer_or_of_all() -> None:
    score_LE = np.array([[5, 9, 1], [2, 2, 2]])
    assert choose_experts(score_LE, 2).tolist() == [[False, True, False], [True, False, False]]
    assert choose_experts(score_LE, 2, over_all_layers=True).tolist() == [[True, True, False], [False, False, False]]
    # Three experts in two layers: one of each.
    assert choose_experts(score_LE, 3).sum() == 2
    assert hit_rate(choose_experts(score_LE, 2), score_LE) == (9 + 2) / 21


@given(st.integers(0, 12), st.booleans(), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_no_choice_of_as_many_has_a_higher_hit_rate(experts: int, over_all: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    score_LE = random.integers(0, 9, (3, 4))
    kept_LE = choose_experts(score_LE, experts, over_all_layers=over_all)
    assert kept_LE.sum() == (experts if over_all else experts // 3 * 3)
    if over_all:
        other = random.permutation(12) < experts
        assert hit_rate(kept_LE, score_LE) >= hit_rate(other.reshape(3, 4), score_LE)
    else:
        other_LE = random.permuted(np.tile(np.arange(4), (3, 1)), axis=1) < experts // 3
        assert hit_rate(kept_LE, score_LE) >= hit_rate(other_LE, score_LE)


def test_layers_that_read_more_distinct_experts_are_kept() -> None:
    # Layer 0 always uses experts 0 and 1; layer 1 uses all four equally.
    table = counts([[10, 10, 0, 0], [5, 5, 5, 5]], 10)
    assert distinct_experts(table, 1).tolist() == [2, 2]
    assert distinct_experts(table, 2).tolist() == [2, 3]
    assert choose_layers(table, 1, 2).tolist() == [False, True]
    swapped = counts([[5, 5, 5, 5], [10, 10, 0, 0]], 10)
    assert choose_layers(swapped, 1, 2).tolist() == [True, False]
    # With one token a step a trace says nothing: the last layers, as --n-cpu-moe keeps.
    assert choose_layers(swapped, 1, 1).tolist() == [False, True]


def test_overlap() -> None:
    first, second = np.array([[3, 1, 0]]), np.array([[1, 1, 2]])
    assert overlap(first, first) == 1
    assert overlap(first, second) == 0.25 + 0.25
    assert overlap(np.array([[1, 0]]), np.array([[0, 7]])) == 0


def test_budgets() -> None:
    assert Budget(fraction=0.25).experts(24, 32, None) == 192
    assert Budget(slots=3).experts(24, 32, None) == 72
    assert Budget(gigabytes=1.0).experts(24, 32, 13e6) == 76
    assert Budget(gigabytes=999.0).experts(24, 32, 13e6) == 768
    for wrong, message in (
        (Budget(), "exactly one"),
        (Budget(fraction=0.5, slots=1), "exactly one"),
        (Budget(fraction=1.5), "0 to 1"),
        (Budget(slots=33), "0 to 32"),
        (Budget(gigabytes=-1.0), "0 or more"),
    ):
        with pytest.raises(SpecmoeError, match=message):
            wrong.experts(24, 32, 13e6)
    with pytest.raises(SpecmoeError, match="size of an expert"):
        Budget(gigabytes=1.0).experts(24, 32, None)
