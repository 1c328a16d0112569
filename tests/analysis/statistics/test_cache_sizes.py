"""The bounds of LRU hold for real caches, whatever the order in which they see the experts of a token."""

from __future__ import annotations

import numpy as np
import pytest
from support.frames import counted, make_axes, make_frame

from analysis.counts.load import LoadCounts
from analysis.counts.locality import ReuseCounts
from analysis.statistics.cache_sizes import CacheSizes, cache_sizes
from analysis.statistics.load import load_statistics
from analysis.statistics.locality import reuse_statistics

LAYERS, EXPERTS, TOP_K = 2, 7, 3


def problems(seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    preference = random.gumbel(size=(LAYERS, EXPERTS))
    return [
        np.argsort(random.gumbel(size=(tokens, LAYERS, EXPERTS)) + preference, axis=2)[:, :, :TOP_K] for tokens in (1, 30, 41)
    ]


def found_of(ids: list[np.ndarray]) -> CacheSizes:
    axes = make_axes(LAYERS, EXPERTS, TOP_K)
    frame = make_frame(ids, EXPERTS)
    reuse, load = counted(ReuseCounts(axes), [frame]), counted(LoadCounts(axes), [frame])
    counts_LE = load.counts.sum((0, 1))
    return cache_sizes(reuse_statistics(reuse, counts_LE, len(frame)), load_statistics(counts_LE), TOP_K)


def misses_of(ids: list[np.ndarray], layer: int, slots: int, order: np.random.Generator) -> float:
    """Miss ratio of an LRU cache in plain Python, which uses the experts of a token in random order."""
    missed = used = 0
    for problem in ids:
        cache: list[int] = []
        for token in problem[:, layer].tolist():
            missed += sum(expert not in cache for expert in token)
            used += len(token)
            for expert in order.permutation(token).tolist():
                cache = [*(other for other in cache if other != expert), expert]
            cache = cache[-slots:]
    return missed / used


@pytest.mark.parametrize("seed", range(3))
def test_every_order_is_within_the_bounds(seed: int) -> None:
    ids = problems(seed)
    found = found_of(ids)
    assert found.sizes.tolist() == [3, 4, 5, 6, 7]
    for layer in range(LAYERS):
        for place, slots in enumerate(found.sizes.tolist()):
            for order in range(4):
                miss = misses_of(ids, layer, slots, np.random.default_rng(order))
                assert found.lru_low[layer, place] - 1e-9 <= miss <= found.lru_high[layer, place] + 1e-9


def test_with_room_for_all_only_first_uses_miss() -> None:
    ids = problems(0)
    first = sum(len(np.unique(problem[:, 0])) for problem in ids) / sum(problem[:, 0].size for problem in ids)
    found = found_of(ids)
    assert found.lru_low[0, -1] == pytest.approx(first)
    assert found.popular[0, -1] == pytest.approx(0)


def test_the_most_used_experts_are_kept() -> None:
    ids = [np.array([0, 0, 1, 2, 0, 1])[:, None, None]]
    axes = make_axes(1, 4, 1)
    frame = make_frame(ids, 4)
    reuse, load = counted(ReuseCounts(axes), [frame]), counted(LoadCounts(axes), [frame])
    counts_LE = load.counts.sum((0, 1))
    found = cache_sizes(reuse_statistics(reuse, counts_LE, 6), load_statistics(counts_LE), 1)
    assert found.popular[0] == pytest.approx([3 / 6, 1 / 6, 0, 0])
    # 0 0 1 2 0 1: with K = 1 both bounds are LRU's misses: of one slot 5, of two 5, of three 3 (the first uses).
    assert found.lru_low[0] == pytest.approx([5 / 6, 5 / 6, 3 / 6, 3 / 6])
    assert found.lru_high[0] == pytest.approx(found.lru_low[0])
