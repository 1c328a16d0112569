"""Expert load by hand, and blocks of problems that do not depend on how a trace is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.frames import counted, make_axes, make_frame

from analysis.counts.load import LoadCounts, ProblemBlocks, count_experts
from analysis.statistics.load import entropy, load_statistics


def test_load_by_hand() -> None:
    # Layer 0 uses experts 0,1 | 0,1 | 0,2; layer 1 always 3,2.
    ids = np.array([[[0, 1], [3, 2]], [[1, 0], [3, 2]], [[0, 2], [2, 3]]], dtype=np.uint8)
    counts = count_experts(ids, 4)
    assert counts.tolist() == [[3, 2, 1, 0], [0, 0, 3, 3]]
    load = load_statistics(counts)
    assert load.entropy_bits == pytest.approx([0.5 * 1 + (1 / 3) * np.log2(3) + (1 / 6) * np.log2(6), 1.0])
    assert load.entropy_share == pytest.approx(load.entropy_bits / 2)
    assert load.max_over_mean == pytest.approx([2.0, 2.0])
    assert load.coverage.tolist() == [0.75, 0.5]
    # Differences of all ordered pairs of 3, 2, 1, 0 are 20 in sum, of 3, 3, 0, 0 they are 24: over 2 x 16 x the mean 1.5.
    assert load.gini == pytest.approx([20 / 48, 24 / 48])
    # Variances 5/4 and 9/4, mean 3/2.
    assert load.cv == pytest.approx([np.sqrt(5) / 3, 1.0])


def test_even_and_extreme_load() -> None:
    even, one = load_statistics(np.array([[5, 5, 5, 5]])), load_statistics(np.array([[0, 9, 0, 0]]))
    assert (even.gini[0], even.cv[0], even.entropy_share[0]) == (0, 0, 1)
    assert (one.gini[0], one.max_over_mean[0], one.entropy_share[0], one.coverage[0]) == (0.75, 4, 0, 0.25)


def test_entropy_of_certainty_is_plain_zero() -> None:
    assert str(float(entropy(np.array([1.0, 0.0])))) == "0.0"


def test_selections_and_weight_by_dataset_and_phase() -> None:
    # Two problems of two tokens, one layer, the first token of each of the prompt.
    problems = [np.array([[[0, 1]], [[1, 2]]]), np.array([[[2, 0]], [[2, 1]]])]
    weights = [np.array([[[0.75, 0.25]], [[0.5, 0.5]]]), np.array([[[1.0, 0.0]], [[0.625, 0.375]]])]
    axes = make_axes(1, 3, 2, datasets=("code", "math"))
    counts = counted(LoadCounts(axes), [make_frame(problems, 3, weights=weights, datasets=[0, 1])])
    assert counts.counts[:, :, 0].tolist() == [[[1, 1, 0], [0, 1, 1], [0, 0, 0]], [[1, 0, 1], [0, 1, 1], [0, 0, 0]]]
    assert counts.mass[:, :2, 0].tolist() == [[[0.75, 0.25, 0], [0, 0.5, 0.5]], [[0, 0, 1.0], [0, 0.375, 0.625]]]
    assert counts.tokens.tolist() == [[1, 1, 0], [1, 1, 0]]


def test_empty_slots_are_not_counted() -> None:
    frame = make_frame([np.array([[[0, 3]], [[3, 3]]])], 3, weights=[np.array([[[0.5, np.nan]], [[np.nan, np.nan]]])])
    counts = counted(LoadCounts(make_axes(1, 3, 2)), [frame])
    assert counts.counts.sum((0, 1)).tolist() == [[1, 0, 0]]
    assert counts.mass.sum((0, 1)).tolist() == [[0.5, 0, 0]]


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5000)), min_size=1, max_size=150, unique=True), st.integers(0, 150))
def test_blocks_of_problems_do_not_depend_on_the_cut(problems: list[tuple[int, int]], cut: int) -> None:
    problems.sort(key=lambda pair: pair[1])
    axes = make_axes(1, 2, 1, datasets=("a", "b"))

    def blocks(part: list[tuple[int, int]]) -> ProblemBlocks:
        blocks = ProblemBlocks(axes)
        # So small that blocks must hold several problems.
        blocks._most = 8
        for dataset, problem_id in part:
            blocks.add(np.array([problem_id]), np.array([dataset]), np.array([[[problem_id, 1]]], dtype=np.uint32))
        return blocks

    whole, merged = blocks(problems), blocks(problems[:cut])
    merged.merge(blocks(problems[cut:]))
    assert len(whole.counts) <= 8 or whole.modulus == 1
    assert whole.modulus == merged.modulus
    assert {key: value.tolist() for key, value in whole.counts.items()} == {k: v.tolist() for k, v in merged.counts.items()}
    total = sum(counts[0, 0] for counts in whole.counts.values())
    assert total == sum(problem_id for _, problem_id in problems)
