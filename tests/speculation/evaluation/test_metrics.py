"""Metrics by hand, chance by simulation, and that parts add up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speculation.evaluation.metrics import ConfidenceCounts, RankCounts, chance, evaluated_m, true_ranks


def counts(scores: list[list[float]], true: list[list[int]]) -> RankCounts:
    result = RankCounts(len(scores[0]), len(true[0]))
    result.add(true_ranks(np.array(scores), np.array(true)))
    return result


def test_by_hand() -> None:
    scores = [
        [0.9, 0.8, 0.1, 0.2],  # order 0 1 3 2
        [0.1, 0.2, 0.3, 0.4],  # order 3 2 1 0
        [0.5, 0.5, 0.5, 0.5],  # ties by id: 0 1 2 3
    ]
    metrics = counts(scores, [[0, 1], [1, 3], [2, 3]]).metrics()
    assert metrics["recall@2"] == pytest.approx((2 + 1 + 0) / 6)
    assert metrics["recall@3"] == pytest.approx((2 + 2 + 1) / 6)
    assert metrics["top-1"] == pytest.approx(1 / 3)
    assert metrics["hit@3"] == pytest.approx(3 / 3)
    assert metrics["exact"] == pytest.approx(1 / 3)
    assert metrics["any"] == pytest.approx(2 / 3)
    assert metrics["coverage@3"] == pytest.approx(2 / 3)
    assert metrics["coverage@4"] == metrics["recall@4"] == 1.0


def test_which_m_are_reported() -> None:
    assert evaluated_m(8, 2) == [1, 2, 3, 4, 5, 6]
    assert evaluated_m(64, 6) == [1, 3, 5, 6, 8, 10, 12, 20]


@pytest.mark.parametrize(
    ("experts", "top_k", "recall", "any_", "exact"),
    [
        (8, 2, 0.25, 0.464, 0.0357),
        (60, 4, 0.0667, 0.247, 2.1e-6),
        (64, 6, 0.0938, 0.460, 1.3e-8),
        (64, 8, 0.125, 0.679, 2.3e-10),
    ],
)
def test_chance_of_real_models(experts: int, top_k: int, recall: float, any_: float, exact: float) -> None:
    level = chance(experts, top_k)
    assert level[f"recall@{top_k}"] == pytest.approx(recall, rel=2e-3)
    assert level["any"] == pytest.approx(any_, rel=2e-3)
    assert level["exact"] == pytest.approx(exact, rel=0.05)


def test_chance_is_what_random_scores_get() -> None:
    random = np.random.default_rng(0)
    result = RankCounts(8, 2)
    result.add(true_ranks(random.random((40_000, 8)), np.tile([3, 5], (40_000, 1))))
    found, expected = result.metrics(), chance(8, 2)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=0.013), name


@settings(deadline=None)  # the first call compiles
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(0, 40))
def test_parts_add_up_to_the_whole(seed: int, size: int, cut: int) -> None:
    random = np.random.default_rng(seed)
    ranks = true_ranks(random.random((size, 6)), random.random((size, 6)).argsort(1)[:, :3])
    whole, first, second = (RankCounts(6, 3) for _ in range(3))
    whole.add(ranks)
    first.add(ranks[:cut])
    second.add(ranks[cut:])
    first.merge(second)
    assert first.metrics() == whole.metrics()


def test_calibration_and_confidence_by_hand() -> None:
    confidence = ConfidenceCounts()
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    true = np.array([[0], [0], [0], [1]])
    confidence.add(probabilities, true, true_ranks(probabilities, true))
    # Bins 0.9: mean 0.9, observed 1; 0.1: 0.1, 0; 0.6: 0.6, 0.5; 0.4: 0.4, 0.5. Two entries each of eight.
    assert confidence.calibration_error() == pytest.approx(0.1)
    curve = confidence.precision_by_coverage()
    assert curve[0] == {"threshold": 0.0, "coverage": 1.0, "recall@K": 0.75}
    assert curve[-1]["coverage"] == 0.5
    assert curve[-1]["recall@K"] == 1.0


def test_groups_are_counted_apart_and_add_up() -> None:
    random = np.random.default_rng(0)
    ranks = true_ranks(random.random((50, 6)), random.random((50, 6)).argsort(1)[:, :3])
    group = random.integers(0, 4, 50)
    group[group == 2] = 3
    together, alone = RankCounts(6, 3, groups=4), RankCounts(6, 3)
    together.add(ranks, group)
    alone.add(ranks)
    assert together.metrics() == alone.metrics()
    assert together.metrics(2) == {}
    for number in (0, 1, 3):
        own = RankCounts(6, 3)
        own.add(ranks[group == number])
        assert together.metrics(number) == own.metrics()


@settings(deadline=None)  # the first call compiles
@given(st.integers(0, 2**32 - 1), st.integers(2, 9))
def test_ranks_are_places_in_a_stable_sort(seed: int, experts: int) -> None:
    random = np.random.default_rng(seed)
    scores = random.integers(0, 4, (12, experts)).astype(np.float32)
    true = random.random((12, experts)).argsort(1)[:, :2]
    order = np.argsort(-scores, axis=1, kind="stable")
    expected = [[order[row].tolist().index(expert) for expert in true[row]] for row in range(12)]
    assert true_ranks(scores, true).tolist() == expected
