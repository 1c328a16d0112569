"""Groups in synthetic tables are found; tables without groups do not beat their control by much."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import pairwise_distances, rand_score, silhouette_score

from analysis.statistics.clusters import (
    AGGLOMERATIVE,
    CLUSTERS,
    CO_ACTIVATION,
    K_MEANS,
    TRANSITIONS,
    _agglomerative,
    cluster_experts,
    silhouette,
)
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


@pytest.mark.parametrize("seed", range(4))
def test_silhouettes_and_trees_are_those_of_scikit_learn(seed: int) -> None:
    random = np.random.default_rng(seed)
    profile = random.normal(size=(12, 5)) + 3 * GROUPS[:, None]
    # Two experts that are alike have a distance of zero, and a member on its own has a silhouette of zero.
    profile[1] = profile[0]
    distances = pairwise_distances(profile)
    labelings = _agglomerative(profile, list(CLUSTERS))
    for clusters, labels in zip(CLUSTERS, labelings, strict=True):
        theirs = AgglomerativeClustering(clusters).fit_predict(profile)
        assert rand_score(labels, theirs) == 1
        assert silhouette(distances, labels) == pytest.approx(silhouette_score(distances, theirs, metric="precomputed"))


def test_a_single_cluster_has_no_silhouette() -> None:
    assert silhouette(np.ones((4, 4)) - np.eye(4), np.zeros(4, dtype=np.int32)) == -1
    assert silhouette(np.zeros((4, 4)), np.array([0, 0, 1, 2], dtype=np.int32)) == 0
