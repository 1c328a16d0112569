"""Distances and specialized experts: none found in random routing, and those of synthetic routing found."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.counts.load import ProblemBlocks
from analysis.statistics.domains import distance_of, domain_distances, jensen_shannon_distance, specialization

from support.frames import make_axes  # isort: skip

NAMES = ("code", "math")


def blocks_of(shares: dict[int, np.ndarray], problems: int, tokens: int, seed: int) -> ProblemBlocks:
    """Problems of each dataset, whose selections are drawn from that dataset's shares `[L, E]`."""
    random = np.random.default_rng(seed)
    layers, experts = shares[0].shape
    blocks = ProblemBlocks(make_axes(layers, experts, 1, datasets=NAMES))
    for dataset, share_LE in shares.items():
        for number in range(problems):
            counts = np.stack([random.multinomial(tokens, share_E) for share_E in share_LE])
            blocks.add(np.array([dataset * problems + number]), np.array([dataset]), counts[None].astype(np.uint32))
    return blocks


def test_jensen_shannon_distance_by_hand() -> None:
    assert jensen_shannon_distance(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(1.0)
    assert jensen_shannon_distance(np.array([0.5, 0.5]), np.array([0.5, 0.5])) == 0.0
    divergence = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)) - 0.5
    assert jensen_shannon_distance(np.array([1.0, 0.0]), np.array([0.5, 0.5])) == pytest.approx(np.sqrt(divergence))


def test_domains_differ_where_they_were_made_to() -> None:
    even = np.full(4, 0.25)
    shares = {0: np.stack([even, [0.5, 0.5, 0, 0]]), 1: np.stack([even, [0, 0, 0.5, 0.5]])}
    blocks = blocks_of(shares, 20, 30, 0)
    (distance,) = domain_distances(blocks, NAMES)
    assert (distance.first, distance.second) == NAMES
    assert distance.distance[1] == pytest.approx(1.0)
    assert distance.distance[0] < 0.1
    assert (distance.shuffled < 0.2).all()
    assert (distance.shuffled <= distance.shuffled_high).all()


def test_equal_domains_are_within_their_control() -> None:
    random = np.random.default_rng(1)
    share = random.dirichlet(np.ones(8), 6)
    (distance,) = domain_distances(blocks_of({0: share, 1: share}, 30, 100, 2), NAMES)
    assert (distance.distance < 2 * distance.shuffled_high).all()
    assert distance.distance.mean() == pytest.approx(distance.shuffled.mean(), abs=0.02)


def test_specialized_experts_are_found_with_their_interval() -> None:
    share = np.full((3, 8), 1 / 8)
    code = share.copy()
    # Expert 2 of layer 1 is used three times as often in code: 0.3 instead of 0.1, and the other seven share the rest evenly.
    code[1] = np.where(np.arange(8) == 2, 0.3, 0.7 / 7)
    math = share.copy()
    math[1] = np.where(np.arange(8) == 2, 0.1, 0.9 / 7)
    found = {each.dataset: each for each in specialization(blocks_of({0: code, 1: math}, 40, 200, 3), NAMES)}
    best = found["code"].specialists[0]
    assert (best.layer, best.expert) == (1, 2)
    assert best.low < 3 < best.high
    assert best.ratio == pytest.approx(3, rel=0.1)
    assert best.share == pytest.approx(2.4, rel=0.1)
    assert found["math"].found >= 1


def test_equal_domains_have_as_many_specialists_as_the_control() -> None:
    share = np.random.default_rng(4).dirichlet(np.full(32, 3.0), 20)
    found = specialization(blocks_of({0: share, 1: share}, 40, 300, 5), NAMES)
    # 2.5 % of 640 intervals lie above 1 by chance.
    assert all(each.found < 50 and each.shuffled < 50 for each in found)


def test_intervals_need_problems() -> None:
    share = np.full((1, 4), 0.25)
    assert specialization(blocks_of({0: share, 1: share}, 3, 50, 6), NAMES) == []
    assert specialization(blocks_of({0: share}, 30, 50, 6), NAMES) == []


def test_the_same_problems_are_exchanged_in_pairs() -> None:
    """Problems that differ a lot, each a little altered: only the control within pairs is small enough to see it."""
    random = np.random.default_rng(7)
    shares = random.dirichlet(np.full(16, 0.1), size=60)
    altered = shares * np.where(np.arange(16) < 4, 1.25, 1.0)
    ours, theirs = (
        np.stack([random.multinomial(20_000, share / share.sum()) for share in group]).astype(np.float32)
        for group in (shares, altered)
    )
    apart = distance_of("a", "b", ours, theirs, (1, 16))
    paired = distance_of("a", "b", ours, theirs, (1, 16), paired=True)
    assert paired.distance == pytest.approx(apart.distance)
    assert apart.distance[0] < apart.shuffled_high[0]
    assert paired.distance[0] > paired.shuffled_high[0]
    unaltered = np.stack([random.multinomial(20_000, share) for share in shares]).astype(np.float32)
    same = distance_of("a", "b", ours, unaltered, (1, 16), paired=True)
    assert same.distance[0] < 3 * same.shuffled_high[0]
