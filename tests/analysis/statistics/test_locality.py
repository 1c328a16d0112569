"""Repetition and reuse by hand and against plain loops; chance and the shuffled expectation on independent routing."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from support.frames import counted, make_axes, make_frame, uniform

from analysis.counts.load import count_experts
from analysis.counts.locality import DISTANCES, SEGMENT, RepetitionCounts, ReuseCounts
from analysis.counts.pairs import PairCounts
from analysis.statistics.locality import Repetition, repetition, repetition_chance, reuse_statistics


def repetition_of(problems: list[np.ndarray], experts: int, top_k: int) -> Repetition:
    frame = make_frame(problems, experts)
    axes = make_axes(problems[0].shape[1], experts, top_k)
    counts, pairs = counted(RepetitionCounts(axes), [frame]), counted(PairCounts(axes), [frame])
    load = count_experts(frame.chunk.expert_ids_TLK, experts)
    return repetition(counts.same[0], counts.seen[0], counts.first[0, :, :-1], load, pairs.leading([0]), top_k, "all")


def test_repetition_by_hand() -> None:
    # One layer; problem 0 has four tokens, problem 1 two: three and one comparisons at distance 1, two at distance 2.
    problems = [np.array([[[0, 1, 2]], [[0, 3, 4]], [[3, 0, 5]], [[1, 2, 0]]]), np.array([[[5, 4, 3]], [[2, 1, 3]]])]
    found = repetition_of(problems, 6, 3)
    assert found.compared == 4
    # First choices 0 0 | 0 3 | 3 1 | 5 2: one of four is the same.
    assert found.first[0] == pytest.approx([1 / 4])
    # First or second: {0,1} {0,3} meet; {0,3} {3,0} meet; {3,0} {1,2} do not; {5,4} {2,1} do not.
    assert found.first_or_second[0] == pytest.approx([2 / 4])
    # In common: {0}; {0,3}; {0}; {3}: 5 of 12.
    assert found.shared[0] == pytest.approx([5 / 12])
    # Distance 2: {0,1,2} {3,0,5} and {0,3,4} {1,2,0}.
    assert found.shared[1] == pytest.approx([2 / 6])
    assert np.isnan(found.first[DISTANCES.index(4)]).all()


def test_tokens_of_other_problems_and_behind_gaps_are_not_compared() -> None:
    frame = make_frame([np.zeros((3, 1, 1), dtype=int), np.zeros((2, 1, 1), dtype=int)], 4)
    frame = replace(frame, chunk=replace(frame.chunk, token_ids_T=np.array([0, 1, 5, 0, 1], dtype=np.int32)))
    counts = counted(RepetitionCounts(make_axes(1, 4, 1)), [frame])
    assert counts.seen[0, :, 0].tolist() == [2, 0, 0, 0, 0, 0, 0, 0]


def test_mixtral_s_random_level() -> None:
    """Table 5 of the Mixtral paper gives 12.5 % and 46 % as random."""
    first, first_or_second, shared = repetition_chance(8, 2)
    assert (100 * first, round(100 * first_or_second), shared) == (12.5, 46, 0.25)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (8, 1), (100, 4)])
def test_independent_uniform_tokens_repeat_by_chance(experts: int, top_k: int) -> None:
    tokens = 40_000
    problems = np.split(uniform(np.random.default_rng(0), tokens, 1, experts, top_k), 20)
    found = repetition_of(problems, experts, top_k)
    chance = repetition_chance(experts, top_k)
    for values, shuffled, expected in zip(
        (found.first, found.first_or_second, found.shared),
        (found.first_shuffled, found.first_or_second_shuffled, found.shared_shuffled),
        chance,
        strict=True,
    ):
        spread = 5 * np.sqrt(expected * (1 - expected) / tokens)
        assert np.abs(values - expected).max() < spread
        assert np.abs(shuffled - expected).max() < spread


def test_the_shuffled_expectation_is_what_shuffling_gives() -> None:
    """Uneven loads, correlated pairs: permuted tokens repeat as often as the expectation says."""
    random = np.random.default_rng(1)
    base = random.choice([0, 0, 0, 1, 2, 5], 50_000)
    ids = np.stack([base, (base + 1 + (random.random(50_000) < 0.3)) % 8, (base + 5) % 8], 1)[:, None, :]
    found = repetition_of([random.permutation(ids)], 8, 3)
    assert found.first_shuffled == pytest.approx(found.first[0], abs=0.01)
    assert found.first_or_second_shuffled == pytest.approx(found.first_or_second[0], abs=0.01)
    assert found.shared_shuffled == pytest.approx(found.shared[0], abs=0.01)


def test_reuse_by_hand() -> None:
    # Experts over one problem's tokens, one layer, top-1: 0 1 0 0 2 1; then another problem.
    problems = [np.array([0, 1, 0, 0, 2, 1])[:, None, None], np.array([0, 0])[:, None, None]]
    counts = counted(ReuseCounts(make_axes(1, 3, 1)), [make_frame(problems, 3)])
    # Cold: 0, 1, 2, and 0 of the second problem. Gaps: 0 after 2, 0 after 1, 1 after 4; 0 after 1.
    assert counts.cold.tolist() == [4]
    assert counts.gaps[0, :4].tolist() == [2, 1, 1, 0]
    # In between: one other (1), none, two others (0 and 2), none.
    assert counts.between[0].tolist() == [2, 1, 1]
    assert counts.lengths == Counter({6: 1, 2: 1})


def test_experts_of_one_token_are_one_access() -> None:
    """Of a token's K experts none is older than another."""
    problem = np.array([[[0, 1]], [[2, 3]], [[1, 0]]])
    counts = counted(ReuseCounts(make_axes(1, 4, 2)), [make_frame([problem], 4)])
    assert counts.between[0].tolist() == [0, 0, 2, 0]


def test_segments_by_hand() -> None:
    # Two whole segments and a half: experts 0 and 1 in turn, then only 0; the rest does not count.
    first, second = np.arange(SEGMENT) % 2, np.zeros(SEGMENT, dtype=int)
    problem = np.concatenate([first, second, np.full(SEGMENT // 2, 2)])[:, None, None]
    counts = counted(ReuseCounts(make_axes(1, 4, 1)), [make_frame([problem, problem[:SEGMENT]], 4)])
    # Whole segments: two, and the second problem's only one; distinct experts 2 + 1 + 2; one pair of adjacent ones.
    assert counts.segments[0].tolist() == [3, 5, 1, SEGMENT // 2 * SEGMENT, SEGMENT**2]


def test_independent_routing_is_reused_as_expected() -> None:
    random = np.random.default_rng(2)
    popularity = np.array([0.4, 0.3, 0.2, 0.05, 0.05])
    problems = [random.choice(5, (length, 2, 1), p=popularity) for length in random.integers(5, 400, 200)]
    frame = make_frame(problems, 5)
    counts = counted(ReuseCounts(make_axes(2, 5, 1)), [frame])
    load = count_experts(frame.chunk.expert_ids_TLK, 5)
    found = reuse_statistics(counts, load, len(frame))
    assert found.gap_share == pytest.approx(found.gap_shuffled, abs=0.01)
    assert found.cold_share == pytest.approx(found.cold_shuffled, abs=0.003)
    assert found.working_set == pytest.approx(found.working_set_shuffled, abs=0.02)
    assert found.adjacent == pytest.approx(found.adjacent_shuffled, abs=0.01)


def test_lasting_experts_are_found() -> None:
    """Problems that keep to two experts of many reuse them sooner than a shuffle would."""
    random = np.random.default_rng(3)
    problems = [random.choice([n % 16, (n + 3) % 16], (200, 1, 1)) for n in range(64)]
    frame = make_frame(problems, 16)
    counts = counted(ReuseCounts(make_axes(1, 16, 1)), [frame])
    found = reuse_statistics(counts, count_experts(frame.chunk.expert_ids_TLK, 16), len(frame))
    assert found.median_gap[0] < 3
    assert found.working_set[0] == pytest.approx(2 / 16, abs=0.001)
    assert found.working_set_shuffled[0] > 0.8
    assert found.adjacent[0] == pytest.approx(0.5, abs=0.03)
    assert found.adjacent_shuffled[0] == pytest.approx(1 / 16, abs=0.01)


def test_empty_slots_are_on_both_sides() -> None:
    """Independent routing to one or two of four slots: observed and shuffled are equal."""
    random = np.random.default_rng(4)
    problems = [uniform(random, 500, 1, 16, 4) for _ in range(40)]
    for ids in problems:
        filled = random.integers(1, 3, ids.shape[:2])
        ids[np.arange(4) >= filled[..., None]] = 16
    frame = make_frame(problems, 16)
    found = repetition_of(problems, 16, 4)
    for observed, shuffled in (
        (found.first, found.first_shuffled),
        (found.first_or_second, found.first_or_second_shuffled),
        (found.shared, found.shared_shuffled),
    ):
        assert observed.mean() == pytest.approx(shuffled.mean(), rel=0.03)
    counts = counted(ReuseCounts(make_axes(1, 16, 4)), [frame])
    reuse = reuse_statistics(counts, count_experts(frame.chunk.expert_ids_TLK, 16), len(frame))
    assert reuse.adjacent == pytest.approx(reuse.adjacent_shuffled, rel=0.03)


def test_the_reuse_control_goes_beyond_what_was_seen() -> None:
    """Problems of one constant expert each: the control must not take over that every gap is one."""
    problems = [np.full((100, 1, 1), number % 16) for number in range(160)]
    frame = make_frame(problems, 16)
    counts = counted(ReuseCounts(make_axes(1, 16, 1)), [frame])
    found = reuse_statistics(counts, count_experts(frame.chunk.expert_ids_TLK, 16), len(frame))
    assert found.gap_share[0, 0] == 1.0
    random = np.random.default_rng(5)
    shuffled = [random.integers(0, 16, (100, 1, 1)) for _ in range(400)]
    drawn = counted(ReuseCounts(make_axes(1, 16, 1)), [make_frame(shuffled, 16)])
    buckets = found.gap_shuffled.shape[1]
    assert found.gap_shuffled[0] == pytest.approx(drawn.gaps[0, :buckets] / drawn.gaps.sum(), abs=0.02)
    assert found.cold_shuffled[0] == pytest.approx(drawn.cold[0] / (drawn.cold[0] + drawn.gaps.sum()), abs=0.02)
