"""Transitions by hand, chance on independent routing, a known Markov router, and the shuffled control."""

from __future__ import annotations

import numpy as np
import pytest
from support.frames import counted, make_axes, make_frame, uniform

from analysis.counts.transitions import TransitionCounts
from analysis.statistics.load import entropy
from analysis.statistics.transitions import (
    held_out_hits,
    hits,
    hop_statistics,
    mutual_information,
    shuffled_table,
    transition_probabilities,
)


def test_all_pairs_count_by_hand() -> None:
    problem = np.array([[[0, 1], [1, 2], [2, 0]], [[0, 2], [1, 0], [0, 1]]])
    counts = counted(TransitionCounts(make_axes(3, 3, 2, hops=2)), [make_frame([problem], 3)])
    pairs, strongest = counts.pairs.sum(0), counts.strongest.sum(0)
    # Layer 0 -> 1: token 0 pairs {0,1} x {1,2}, token 1 pairs {0,2} x {1,0}.
    assert pairs[0, 0].tolist() == [[1, 2, 1], [0, 1, 1], [1, 1, 0]]
    # Two hops, 0 -> 2: {0,1} x {2,0} and {0,2} x {0,1}.
    assert pairs[1, 0].tolist() == [[2, 1, 1], [1, 0, 1], [1, 1, 0]]
    assert strongest[0, 0].tolist() == [[0, 2, 0], [0, 0, 0], [0, 0, 0]]
    assert pairs[1, 1].sum() == 0
    assert transition_probabilities(pairs)[0, 0].tolist() == [[0.25, 0.5, 0.25], [0, 0.5, 0.5], [0.5, 0.5, 0]]


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_counts_equal_a_plain_loop(top_k: int) -> None:
    random = np.random.default_rng(top_k)
    problems = [uniform(random, 20, 4, 5, top_k) for _ in range(3)]
    for problem in problems:
        # Some tokens went to fewer experts; K empty slots are a token without any.
        problem[random.random(problem.shape[:2]) < 0.2, top_k - 1] = 5
    counts = counted(TransitionCounts(make_axes(4, 5, top_k, hops=3)), [make_frame(problems, 5)])
    expected = np.zeros((2, 3, 4, 5, 5), dtype=int)
    for number, problem in enumerate(problems):
        for token in problem:
            for hop in (1, 2, 3):
                for layer in range(4 - hop):
                    for here in token[layer]:
                        for there in token[layer + hop]:
                            if here < 5 and there < 5:
                                expected[number % 2, hop - 1, layer, here, there] += 1
    assert (counts.pairs == expected).all()


def test_guesses_by_hand() -> None:
    # From 0, mostly to 1; from 1, always to 0. Folds disagree about 0.
    folds = np.array([[[1, 3], [4, 0]], [[3, 1], [4, 0]]])
    both = folds.sum(0)
    assert both.tolist() == [[4, 4], [8, 0]]
    assert hits(folds[0], folds[0], 1) == pytest.approx(7 / 8)
    # Fold 0 predicted by fold 1: from 0 it guesses 0, right once; from 1 always right. The other way round likewise.
    assert held_out_hits(folds, 1) == pytest.approx((1 + 4 + 1 + 4) / 16)
    assert np.isnan(held_out_hits(np.array([[[1, 1], [0, 0]], [[0, 0], [0, 0]]]), 1))


def test_unknown_rows_are_guessed_by_popularity() -> None:
    test, train = np.array([[0, 0, 0], [0, 0, 5]]), np.array([[0, 1, 3], [0, 0, 0]])
    assert hits(test, train, 1) == 1.0


def test_mutual_information_by_hand() -> None:
    # Perfectly linked, two values: 1 bit; the correction subtracts (2 - 2 - 2 + 1) / (2 N ln 2), that is adds 1 / (2 N ln 2).
    assert mutual_information(np.array([[50, 0], [0, 50]])) == pytest.approx(1 + 1 / (200 * np.log(2)))
    # Independent: 0 bits; the correction subtracts (4 - 2 - 2 + 1) / (2 N ln 2).
    assert mutual_information(np.array([[25, 25], [25, 25]])) == pytest.approx(-1 / (200 * np.log(2)))


def test_independent_uniform_routing_is_at_chance() -> None:
    tokens, experts = 40_000, 8
    frame = make_frame(np.split(uniform(np.random.default_rng(1), tokens, 3, experts, 2), 40), experts)
    hop = hop_statistics(counted(TransitionCounts(make_axes(3, experts, 2, hops=2)), [frame]), 1, 2)
    spread = 5 * np.sqrt(experts / 4 / tokens)
    assert np.abs(hop.information_bits).max() < 0.002
    assert np.abs(hop.information_shuffled_bits).max() < 0.002
    for values in (hop.same_strongest, hop.independent_strongest, hop.held_out_top1):
        assert np.abs(values - 1 / experts).max() < spread
    for values in (hop.same_selected, hop.independent_selected, hop.held_out_topk, hop.marginal_topk, hop.shuffled_topk):
        assert np.abs(values - 2 / experts).max() < 2 * spread
    assert np.abs(hop.conditional_top1 - 1 / experts).max() < 3 * spread


def test_a_known_markov_router_is_recovered_and_the_shuffle_destroys_it() -> None:
    random = np.random.default_rng(2)
    matrix = random.dirichlet(np.full(4, 0.3), size=4)
    first = random.integers(0, 4, 60_000)
    second = (random.random(60_000)[:, None] > matrix[first].cumsum(1)).sum(1)
    frame = make_frame(np.split(np.stack([first, second], 1)[:, :, None], 60), 4)
    counts = counted(TransitionCounts(make_axes(2, 4, 1)), [frame])
    assert np.abs(transition_probabilities(counts.pairs.sum(0))[0, 0] - matrix).max() < 0.02
    hop = hop_statistics(counts, 1, 1)
    expected = entropy(matrix.mean(0)) - entropy(matrix).mean()
    assert hop.information_bits[0] == pytest.approx(expected, abs=0.02)
    assert abs(hop.information_shuffled_bits[0]) < 0.001
    assert hop.held_out_top1[0] == pytest.approx(matrix.max(1).mean(), abs=0.01)
    assert hop.shuffled_top1[0] == pytest.approx(matrix.mean(0).max(), abs=0.01)


def test_a_shuffled_trace_shares_no_information() -> None:
    random = np.random.default_rng(3)
    strongest = random.integers(0, 6, 30_000)
    linked = np.stack([strongest, (strongest + 1) % 6], 1)[:, :, None]
    shuffled = linked.copy()
    shuffled[:, 1] = random.permutation(shuffled[:, 1])
    both = [
        hop_statistics(counted(TransitionCounts(make_axes(2, 6, 1)), [make_frame([ids], 6)]), 1, 1)
        for ids in (linked, shuffled)
    ]
    assert both[0].information_bits[0] == pytest.approx(np.log2(6), abs=0.01)
    assert abs(both[1].information_bits[0]) < 0.001


def test_shuffled_tables_keep_their_margins() -> None:
    random = np.random.default_rng(4)
    table = random.integers(0, 50, (5, 5)) * (np.arange(5) != 2)
    shuffled = shuffled_table(table, random)
    assert (shuffled.sum(0) == table.sum(0)).all()
    assert (shuffled.sum(1) == table.sum(1)).all()
    assert not shuffled_table(np.zeros((3, 3), dtype=int), random).any()
