"""Differences between traces are found where they were put, and nowhere else more often than between halves."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.statistics.differences import LoadDifference, load_difference
from analysis.statistics.domains import Blocks

LAYERS, EXPERTS = 6, 16


def drawn(problems: int, seed: int, factor: float = 1.0) -> Blocks:
    """Selections of problems that differ from each other; `factor`: how much more layer 2 uses expert 3."""
    random = np.random.default_rng(seed)
    shares = np.random.default_rng(0).dirichlet(np.full(EXPERTS, 8.0), size=LAYERS)
    shares[2, 3] *= factor
    of_problem = np.stack([[random.dirichlet(40 * share) for share in shares] for _ in range(problems)])
    return random.multinomial(100, of_problem).reshape(problems, -1).astype(np.float32)


def difference(ours: dict[str, Blocks], theirs: dict[str, Blocks], *, is_paired: bool = False) -> LoadDifference:
    found = load_difference("a", "b", ours, theirs, (LAYERS, EXPERTS), is_paired=is_paired)
    assert found is not None
    return found


def test_a_difference_by_hand() -> None:
    ours = np.array([[6, 2, 4, 4]] * 5, dtype=np.float32)
    theirs = np.array([[2, 6, 4, 4]] * 5, dtype=np.float32)
    found = load_difference("a", "b", {"d": ours}, {"d": theirs}, (2, 2))
    assert found is not None
    # 3/4 of the first layer's selections instead of 1/4: half an even share of two experts each way.
    assert found.share.tolist() == [[1, -1], [0, 0]]
    assert found.low == pytest.approx(found.share)
    assert found.high == pytest.approx(found.share)
    assert found.found == 2
    assert found.moved.tolist() == [0.5, 0]
    # Problems that are all alike have halves that are alike; five have no halves with enough problems for intervals.
    assert found.moved_halves.tolist() == [0, 0]
    assert np.isnan(found.found_halves).all()
    assert [(each.dataset, each.problems, each.moved) for each in found.datasets] == [
        ("d", (5, 5), 0.25),
        ("all", (5, 5), 0.25),
    ]


def test_the_expert_that_changed_is_found() -> None:
    found = difference({"x": drawn(60, 1), "y": drawn(60, 2, 3.0)}, {"x": drawn(60, 3), "y": drawn(60, 4)})
    assert found.is_found[2, 3]
    assert np.abs(found.share).argmax() == 2 * EXPERTS + 3
    assert found.moved.argmax() == 2
    # The dataset that changed comes first; only a sixth of the layers did, and the other dataset differs as halves do.
    assert [each.dataset for each in found.datasets] == ["y", "x", "all"]
    changed, same = (each.moved / each.moved_halves for each in found.datasets[:2])
    assert changed > 1.2 * same


def test_equal_traces_differ_as_their_halves_do() -> None:
    found = [difference({"x": drawn(60, 2 * seed)}, {"x": drawn(60, 2 * seed + 1)}) for seed in range(10, 14)]
    cells = LAYERS * EXPERTS
    assert np.mean([each.found for each in found]) < 0.12 * cells
    assert np.mean([each.found_halves for each in found]) == pytest.approx(0.05 * cells, abs=0.05 * cells)
    for each in found:
        assert each.moved.mean() < each.moved_halves.mean()
        assert each.datasets[-1].entropy_low < 0 < each.datasets[-1].entropy_high


def test_paired_problems_are_drawn_together() -> None:
    """Problems differ far more than the traces: only in pairs is a small difference certain."""
    random = np.random.default_rng(0)
    ours = drawn(40, 1)
    theirs = ours.copy()
    theirs[:, 0] += random.integers(0, 2, len(ours))
    paired, apart = (difference({"x": ours}, {"x": theirs}, is_paired=is_paired) for is_paired in (True, False))
    assert paired.is_found[0, 0]
    assert not apart.is_found[0, 0]
    assert paired.found_halves == apart.found_halves
    assert np.array_equal(paired.share, apart.share)


def test_too_few_problems_have_no_intervals() -> None:
    assert load_difference("a", "b", {"x": drawn(4, 1)}, {"x": drawn(9, 2)}, (LAYERS, EXPERTS)) is None
