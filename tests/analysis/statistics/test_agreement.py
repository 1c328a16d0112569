"""Two traces on the same prompts: equal, altered where it was done, and at chance when nothing is the same."""

from __future__ import annotations

import numpy as np
import pytest
from support.traces import MakeProblems, MakeTrace

from analysis.statistics.agreement import prompt_agreement


def test_agreement_by_hand(make_trace: MakeTrace) -> None:
    # Two prompts of two tokens (a third token is generated), one layer, top-2 of four.
    weights = np.tile([0.75, 0.25], (3, 1, 1))
    mine = [np.array([[[0, 1]], [[2, 3]], [[0, 1]]]), np.array([[[1, 2]], [[3, 0]], [[0, 1]]])]
    theirs = [np.array([[[1, 0]], [[2, 1]], [[2, 3]]]), np.array([[[1, 2]], [[1, 2]], [[2, 3]]])]
    first, second = (
        make_trace([(ids, weights) for ids in problems], 4, name=name, prompt_tokens=2)
        for name, problems in (("mine", mine), ("theirs", theirs))
    )
    found = prompt_agreement(first, second)
    assert found is not None
    assert (found.problems, found.tokens) == (2, 4)
    # In common: 2, 1, 2, 0 of 2; the same sets: two of four; the same first: 2 and 2, 1 and 1.
    assert found.shared == pytest.approx([5 / 8])
    assert found.same_set == pytest.approx([2 / 4])
    assert found.same_first == pytest.approx([2 / 4])


def test_a_trace_agrees_with_itself_and_not_with_a_shuffled_one(make_trace: MakeTrace, random_problems: MakeProblems) -> None:
    problems = random_problems(count=10, tokens=60, layers=3, num_experts=8, top_k=2)
    others = random_problems(count=10, tokens=60, layers=3, num_experts=8, top_k=2, seed=1)
    one, two = make_trace(problems, 8, name="one", prompt_tokens=50), make_trace(others, 8, name="two", prompt_tokens=50)
    itself, random = prompt_agreement(one, one), prompt_agreement(one, two)
    assert itself is not None
    assert random is not None
    assert itself.shared.tolist() == itself.same_set.tolist() == [1, 1, 1]
    assert random.shared == pytest.approx(random.shared_shuffled, abs=0.05)
    assert random.shared_shuffled == pytest.approx(np.full(3, 0.25), abs=0.02)


def test_prompts_are_matched_by_their_text(make_trace: MakeTrace, random_problems: MakeProblems) -> None:
    problems = random_problems(count=4, tokens=6, layers=2, num_experts=4, top_k=1)
    one = make_trace(problems, 4, name="one", prompts=["a", "b", "c", "d"], prompt_tokens=6)
    part = make_trace(problems[1:3], 4, name="part", prompts=["b", "c"], prompt_tokens=6)
    found = prompt_agreement(one, part)
    assert found is not None
    assert found.problems == 2
    assert found.shared.tolist() == [1, 1]
    assert prompt_agreement(one, make_trace(problems[:1], 4, name="none", prompts=["z"], prompt_tokens=6)) is None


def test_other_shapes_and_lengths_are_not_compared(make_trace: MakeTrace, random_problems: MakeProblems) -> None:
    one = make_trace(random_problems(count=2, tokens=6, layers=2, num_experts=4, top_k=1), 4, name="one", prompt_tokens=6)
    wide = make_trace(random_problems(count=2, tokens=6, layers=2, num_experts=5, top_k=1), 5, name="wide", prompt_tokens=6)
    short = make_trace(random_problems(count=2, tokens=6, layers=2, num_experts=4, top_k=1), 4, name="short", prompt_tokens=3)
    assert prompt_agreement(one, wide) is None
    assert prompt_agreement(one, short) is None
