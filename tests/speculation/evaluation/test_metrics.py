"""Metrics by hand, chance by simulation, and that parts add up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speculation.evaluation.metrics import (
    BUDGET_FACTORS,
    BUDGET_POINTS,
    ConfidenceCounts,
    ProblemSums,
    RankCounts,
    budget_m,
    chance,
    evaluated_m,
    true_ranks,
)


def counts(scores: list[list[float]], true: list[list[int]], weights: list[list[float]] | None = None) -> RankCounts:
    result = RankCounts(len(scores[0]), len(true[0]), has_weights=weights is not None)
    result.add(true_ranks(np.array(scores), np.array(true)), None if weights is None else np.array(weights))
    return result


def test_by_hand() -> None:
    scores = [
        [0.9, 0.8, 0.1, 0.2],  # order 0 1 3 2
        [0.1, 0.2, 0.3, 0.4],  # order 3 2 1 0
        [0.5, 0.5, 0.5, 0.5],  # ties by id: 0 1 2 3
    ]
    found = counts(scores, [[0, 1], [1, 3], [2, 3]], [[0.8, 0.2], [0.5, 0.5], [0.6, 0.4]])
    metrics = found.metrics()
    assert metrics["recall@2"] == pytest.approx((2 + 1 + 0) / 6)
    assert metrics["recall@3"] == pytest.approx((2 + 2 + 1) / 6)
    assert metrics["top-1"] == pytest.approx(1 / 3)
    assert metrics["hit@3"] == pytest.approx(3 / 3)
    assert metrics["exact"] == pytest.approx(1 / 3)
    assert metrics["any"] == pytest.approx(2 / 3)
    assert metrics["coverage@3"] == pytest.approx(2 / 3)
    assert metrics["coverage@4"] == metrics["recall@4"] == metrics["mass@4"] == 1.0
    # The top 2 hold 0.8 + 0.2 of the first example, the 0.5 of expert 3 of the second, none of the third.
    assert metrics["mass@2"] == pytest.approx(1.5 / 3)
    assert metrics["mass@3"] == pytest.approx((1 + 1 + 0.6) / 3)
    assert found.budget() == [
        {name: metrics[f"{name}@{m}"] for name in ("recall", "coverage", "mass")} | {"m": m} for m in (2, 3, 4)
    ]


@pytest.mark.parametrize("top_k", [1, 2])
def test_without_weights_nothing_depends_on_the_order_of_the_experts(top_k: int) -> None:
    """Whichever of a token's experts its source lists first, the numbers are the same: order and weights are not used."""
    random = np.random.default_rng(0)
    scores, true = random.random((60, 8)), random.random((60, 8)).argsort(1)[:, :top_k]
    in_order, reversed_ = (counts(scores.tolist(), ids.tolist()) for ids in (true, true[:, ::-1]))
    assert in_order.metrics() == reversed_.metrics()
    assert in_order.budget() == reversed_.budget()
    names = in_order.metrics().keys()
    assert names == chance(8, top_k, has_weights=False).keys()
    assert not any(name.startswith("mass@") for name in names)
    # The only expert is the strongest.
    assert ("top-1" in names) == ("hit@3" in names) == (top_k == 1)
    assert all(point["mass"] is None for point in in_order.budget())
    with_weights = counts(scores.tolist(), true.tolist(), np.tile([0.5], (60, top_k)).tolist())
    assert with_weights.metrics().items() >= in_order.metrics().items()
    with pytest.raises(ValueError, match="has_weights is False"):
        in_order.add(true_ranks(scores, true), np.ones(true.shape))


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
    result.add(true_ranks(random.random((40_000, 8)), np.tile([3, 5], (40_000, 1))), random.random((40_000, 2)))
    found, expected = result.metrics(), chance(8, 2)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=0.013), name


@settings(deadline=None)  # the first call compiles
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(0, 40))
def test_parts_add_up_to_the_whole(seed: int, size: int, cut: int) -> None:
    random = np.random.default_rng(seed)
    ranks = true_ranks(random.random((size, 6)), random.random((size, 6)).argsort(1)[:, :3])
    weights = random.integers(1, 9, (size, 3)) / 8
    whole, first, second = (RankCounts(6, 3) for _ in range(3))
    whole.add(ranks, weights)
    first.add(ranks[:cut], weights[:cut])
    second.add(ranks[cut:], weights[cut:])
    first.merge(second)
    assert first.metrics() == whole.metrics()
    assert first.budget() == whole.budget()


def test_calibration_and_confidence_by_hand() -> None:
    confidence = ConfidenceCounts()
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    true = np.array([[0], [0], [0], [1]])
    confidence.add(probabilities, true, true_ranks(probabilities, true))
    # Bins 0.9: mean 0.9, observed 1; 0.1: 0.1, 0; 0.6: 0.6, 0.5; 0.4: 0.4, 0.5. Two entries each of eight.
    assert confidence.calibration_error() == pytest.approx(0.1)
    found = [(round(each["predicted"], 3), each["observed"], each["count"]) for each in confidence.reliability()]
    assert found == [(0.1, 0.0, 2), (0.4, 0.5, 2), (0.6, 0.5, 2), (0.9, 1.0, 2)]
    curve = confidence.precision_by_coverage()
    assert curve[0] == {"threshold": 0.0, "coverage": 1.0, "recall@K": 0.75}
    assert curve[-1]["coverage"] == 0.5
    assert curve[-1]["recall@K"] == 1.0


def test_groups_are_counted_apart_and_add_up() -> None:
    random = np.random.default_rng(0)
    ranks = true_ranks(random.random((50, 6)), random.random((50, 6)).argsort(1)[:, :3])
    group = random.integers(0, 4, 50)
    group[group == 2] = 3
    weights = random.integers(1, 9, (50, 3)) / 8
    together, alone = RankCounts(6, 3, groups=4), RankCounts(6, 3)
    together.add(ranks, weights, group)
    alone.add(ranks, weights)
    assert together.metrics() == alone.metrics()
    assert together.metrics(2) == {}
    assert together.budget(2) == []
    for number in (0, 1, 3):
        own = RankCounts(6, 3)
        own.add(ranks[group == number], weights[group == number])
        assert together.metrics(number) == own.metrics()


def test_intervals_are_of_the_ratios_of_sums() -> None:
    """Problems that are all alike have no spread; intervals of unlike ones enclose the ratio over all."""
    random = np.random.default_rng(0)
    ranks, weights = random.random((400, 6)).argsort(1)[:, :2], random.random((400, 2))
    alike = ProblemSums(2, 5)
    for problem in range(5):
        alike.add(ranks, weights, np.full(400, problem))
    counted = RankCounts(6, 2)
    counted.add(ranks, weights)
    metrics = counted.metrics()
    for name, bounds in alike.intervals().items():
        assert bounds == pytest.approx((metrics[name], metrics[name])), name
    unlike = ProblemSums(2, 20)
    unlike.add(ranks, weights, random.integers(0, 20, 400))
    assert unlike.intervals().keys() == {"recall@2", "exact", "top-1", "mass@2"}
    for name, (low, high) in unlike.intervals().items():
        assert low < metrics[name] < high, name


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (32, 4), (35, 2), (128, 8), (512, 10), (1, 1), (6, 6), (65_535, 1)])
def test_a_budget_begins_at_k_and_ends_at_all_experts(experts: int, top_k: int) -> None:
    all_m = budget_m(experts, top_k)
    assert all_m[0] == top_k
    assert all_m[-1] == experts
    assert all_m == sorted(set(all_m))
    assert len(all_m) <= BUDGET_POINTS + len(BUDGET_FACTORS)
    # Those that a table shows are there.
    assert {round(top_k * factor) for factor in BUDGET_FACTORS if top_k * factor <= experts - 1} <= set(all_m)


@settings(deadline=None)  # the first call compiles
@given(st.integers(0, 2**32 - 1), st.integers(2, 9))
def test_ranks_are_places_in_a_stable_sort(seed: int, experts: int) -> None:
    random = np.random.default_rng(seed)
    scores = random.integers(0, 4, (12, experts)).astype(np.float32)
    true = random.random((12, experts)).argsort(1)[:, :2]
    order = np.argsort(-scores, axis=1, kind="stable")
    expected = [[order[row].tolist().index(expert) for expert in true[row]] for row in range(12)]
    assert true_ranks(scores, true).tolist() == expected


def test_problems_without_examples_do_not_widen_the_interval() -> None:
    sums = ProblemSums(2, 10, has_weights=False)
    sums.add(np.array([[0, 1], [1, 0]]), None, np.array([3, 3]))
    assert sums.intervals() == {"recall@2": (1.0, 1.0), "exact": (1.0, 1.0)}
    assert ProblemSums(2, 10).intervals() == {}
