"""Groups in synthetic tables are found; tables without groups do not beat their control by much."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.statistics.clusters import AGGLOMERATIVE, CO_ACTIVATION, K_MEANS, TRANSITIONS, cluster_experts
from analysis.statistics.pairs import expected_pairs

GROUPS = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])


def grouped(random: np.random.Generator, loads: np.ndarray, strength: float) -> np.ndarray:
    """Counts of pairs with loads, `strength` times as many within a group."""
    expected = np.outer(loads, loads) * np.where(GROUPS[:, None] == GROUPS, strength, 1.0)
    return np.asarray(random.poisson(expected))


def symmetric(table: np.ndarray) -> np.ndarray:
    upper = np.triu(table, 1)
    return np.asarray(upper + upper.T)


@pytest.mark.parametrize("method", [K_MEANS, AGGLOMERATIVE])
def test_groups_are_found_whatever_the_loads(method: str) -> None:
    random = np.random.default_rng(0)
    loads = random.uniform(3, 40, 12)
    together = symmetric(grouped(random, loads, 4.0))
    after = grouped(random, loads, 4.0)
    found = [each for each in cluster_experts(together[None].repeat(2, 0), after[None], 2) if each.method == method]
    assert {each.feature for each in found} == {CO_ACTIVATION, TRANSITIONS}
    for each in found:
        assert each.labels.tolist() == GROUPS.tolist()
        assert each.silhouette > 0.3 > each.shuffled


def test_without_groups_nothing_stands_out() -> None:
    """Rarely used experts are noisy, and must not look like a group for that."""
    random = np.random.default_rng(1)
    loads = np.array([1.0, 1, 2, 2, 30, 40, 50, 60, 70, 80, 90, 100])
    together = symmetric(random.poisson(expected_pairs(loads * 100)))
    after = random.poisson(np.outer(loads, loads))
    found = cluster_experts(together[None].repeat(2, 0), after[None], 2)
    assert max(each.silhouette - each.shuffled for each in found) < 0.1
    assert max(each.silhouette for each in found) < 0.35


def test_few_experts_make_no_clusters() -> None:
    assert cluster_experts(np.ones((2, 3, 3), dtype=int), np.ones((1, 3, 3), dtype=int), 2) == []
