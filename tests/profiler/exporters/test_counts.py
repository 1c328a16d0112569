"""Counts of the parts of a split, computed by hand and against plain counting."""

from __future__ import annotations

import numpy as np
import pytest
from support.traces import MakeProblems, MakeTrace

from profiler.errors import EmptyPartError
from profiler.exporters.counts import count_parts
from profiler.trace.splits import PARTS, part_of


def prompts_of(*parts: str) -> list[str]:
    """A prompt that falls into each of these parts."""
    numbers = iter(range(10_000))
    return [next(f"p{n}" for n in numbers if part_of(f"p{n}") == part) for part in parts]


def test_by_hand(make_trace: MakeTrace) -> None:
    ids = np.array([[[0, 1]], [[1, 2]], [[1, 0]]])
    weights = np.array([[[0.75, 0.25]], [[0.5, 0.5]], [[1.0, 0.0]]])
    trace = make_trace([(ids, weights), (ids[:2], weights[:2])], 4, prompts=prompts_of("train", "test"))
    # The first position of each problem is its prompt.
    counted = count_parts(trace)
    assert counted.is_decode_only
    assert counted.parts["train"].tokens_LE.tolist() == [[1, 2, 1, 0]]
    assert counted.parts["train"].mass_LE.tolist() == [[0.0, 1.5, 0.5, 0.0]]
    assert (counted.parts["train"].num_tokens, counted.parts["train"].num_problems) == (2, 1)
    assert counted.parts["test"].tokens_LE.tolist() == [[0, 1, 1, 0]]
    everything = count_parts(trace, decode_only=False)
    assert not everything.is_decode_only
    assert everything.part("all").tokens_LE.tolist() == [[3, 5, 2, 0]]
    assert everything.part("all").num_tokens == 5
    with pytest.raises(EmptyPartError, match="no problem falls into the validation part"):
        counted.part("validation")


def test_a_part_without_generated_tokens_says_so(make_trace: MakeTrace) -> None:
    ids, weights = np.array([[[0, 1]], [[1, 2]]]), np.full((2, 1, 2), 0.5)
    # The test problem's only position is its prompt.
    trace = make_trace([(ids, weights), (ids[:1], weights[:1])], 4, prompts=prompts_of("train", "test"))
    counted = count_parts(trace)
    with pytest.raises(EmptyPartError, match=r"none of 1 problem in the test part .* has a generated token .*\(phase all\)"):
        counted.part("test")
    with pytest.raises(EmptyPartError, match="no problem falls into the validation part"):
        counted.part("validation")
    assert count_parts(trace, decode_only=False).part("test").num_tokens == 1


def test_equals_plain_counting(make_trace: MakeTrace, random_problems: MakeProblems) -> None:
    problems = random_problems(30, 9, 3, 300, 4)
    trace = make_trace(problems, 300)
    counted = count_parts(trace, decode_only=False)
    for part in PARTS:
        expected = np.zeros((3, 300))
        mass = np.zeros((3, 300))
        for number, (ids, weights) in enumerate(problems):
            if part_of(f"prompt {number}") == part:
                for layer in range(3):
                    np.add.at(expected[layer], ids[:, layer], 1)
                    np.add.at(mass[layer], ids[:, layer], weights[:, layer].astype(np.float16))
        assert (counted.part(part).tokens_LE == expected).all()
        assert np.allclose(counted.part(part).mass_LE, mass)
