"""Pairs by hand, no preference in uniform routing, and the number of different sets."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from support.frames import counted, make_axes, make_frame, uniform

from analysis.counts.pairs import SKETCH, PairCounts
from analysis.statistics.pairs import estimate_distinct, expected_pairs, pair_statistics


def test_pairs_by_hand() -> None:
    problem = np.array([[[0, 1, 2]], [[1, 0, 3]], [[3, 2, 4]]])
    counts = counted(PairCounts(make_axes(1, 5, 3)), [make_frame([problem], 5)])
    expected = np.zeros((5, 5), dtype=int)
    for first, second in ((0, 1), (0, 2), (1, 2), (1, 0), (1, 3), (0, 3), (3, 2), (3, 4), (2, 4)):
        expected[first, second] += 1
    assert counts.together[0].tolist() == (expected + expected.T).tolist()
    # The two strongest of each token: 0 and 1, twice, and 3 and 2.
    leading = counts.leading([0])
    assert leading is not None
    pairs = leading.pairs_LEE[0]
    assert (pairs[0, 1], pairs[2, 3], pairs.sum()) == (2, 1, 6)
    statistics = pair_statistics(counts, 3)
    assert statistics is not None
    assert statistics.unique_sets.tolist() == [3]
    assert statistics.possible_sets == 10


def test_empty_slots_make_no_pairs() -> None:
    frame = make_frame([np.array([[[0, 1, 4]], [[2, 4, 4]], [[4, 4, 4]]])], 4)
    counts = counted(PairCounts(make_axes(1, 4, 3)), [frame])
    assert counts.together.sum() == 2
    leading = counts.leading([0])
    assert leading is not None
    assert leading.pairs_LEE.sum() == 2
    assert leading.members_LE.tolist() == [[1, 1, 1, 0]]


def test_uniform_routing_has_no_preferred_pairs() -> None:
    ids = uniform(np.random.default_rng(0), 40_000, 1, 8, 3)
    statistics = pair_statistics(counted(PairCounts(make_axes(1, 8, 3)), [make_frame([ids], 8)]), 3)
    assert statistics is not None
    off_diagonal = statistics.lift_LEE[0][~np.eye(8, dtype=bool)]
    # A pair is expected 40000 x 3 / 28 times, so that lifts have a standard error of 1.5 %.
    assert np.abs(off_diagonal - 1).max() < 0.08
    assert statistics.unique_sets[0] == comb(8, 3)
    assert statistics.even_sets == pytest.approx(comb(8, 3))


def test_uneven_load_alone_is_not_preference() -> None:
    """Pairs drawn without preference from experts of very different load have a lift of one."""
    random = np.random.default_rng(1)
    popularity = np.array([0.4, 0.3, 0.1, 0.1, 0.05, 0.05])
    pairs = random.choice(36, 200_000, p=np.outer(popularity, popularity).ravel())
    first, second = pairs // 6, pairs % 6
    ids = np.stack([first, second], 1)[first != second][:, None, :]
    statistics = pair_statistics(counted(PairCounts(make_axes(1, 6, 2)), [make_frame([ids], 6)]), 2)
    assert statistics is not None
    assert np.abs(statistics.lift_LEE[0][~np.eye(6, dtype=bool)] - 1).max() < 0.1


def test_a_preferred_pair_is_found() -> None:
    random = np.random.default_rng(2)
    ids = uniform(random, 20_000, 2, 6, 2)
    ids[:4000, 1] = [5, 2]
    statistics = pair_statistics(counted(PairCounts(make_axes(2, 6, 2)), [make_frame([ids], 6)]), 2)
    assert statistics is not None
    assert sorted(statistics.top_pair[1].tolist()) == [2, 5]
    assert statistics.top_lift[1] > 1.5
    assert statistics.top_lift[0] < 1.1


def test_expected_pairs_keep_every_expert_in_as_many() -> None:
    sums = np.array([30.0, 20, 10, 5, 1])
    expected = expected_pairs(sums)
    assert expected.sum(1) == pytest.approx(sums, rel=1e-6)
    assert expected == pytest.approx(expected.T)
    assert np.diag(expected).tolist() == [0] * 5


def test_distinct_sets_are_estimated_beyond_the_sketch() -> None:
    hashes = np.unique(np.random.default_rng(3).integers(0, 2**64 - 1, 300_000, dtype=np.uint64, endpoint=True))
    assert estimate_distinct(hashes[:SKETCH]) == pytest.approx(300_000, rel=0.04)
    assert estimate_distinct(hashes[:100]) == 100


def test_one_expert_per_token_has_no_pairs() -> None:
    counts = counted(PairCounts(make_axes(1, 4, 1)), [make_frame([np.array([[[1]], [[2]]])], 4)])
    assert pair_statistics(counts, 1) is None
