"""Misses of every size of an expert cache, from counts: LRU as a pair of bounds, and the most used experts, always kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.counts.accumulator import Counts, Floats
from analysis.statistics.load import LoadStatistics
from analysis.statistics.locality import ReuseStatistics


@dataclass(frozen=True)
class CacheSizes:
    """Miss ratios of one cache per layer by its number of slots: the share of selected experts that are not in the cache.

    An LRU cache that is empty at the beginning of a problem has the expert of a reuse iff fewer other experts were used since
    than it has slots (Mattson et al., 1970). The K experts of a token are used at the same time. How many of them a cache
    counts as used later than the one in question depends on its order of them: none to K - 1, hence two bounds.

    Attributes:
        sizes: Slots of a layer's cache, from K to E `[C]`.
        lru_low, lru_high: Bounds of LRU's miss ratio `[L, C]`.
        popular: Miss ratio with the layer's most used experts of the whole trace in the cache, from the first token on
            `[L, C]`. It knows the loads of the tokens that it is evaluated on, but nothing of their order.
    """

    sizes: Counts
    lru_low: Floats
    lru_high: Floats
    popular: Floats


def cache_sizes(reuse: ReuseStatistics, load: LoadStatistics, top_k: int) -> CacheSizes:
    """Miss ratios of all sizes from the reuse and the load of a trace; `nan` for a layer without selections."""
    experts = load.share_LE.shape[1]
    sizes = np.arange(top_k, experts + 1)
    # hits[:, c]: share of all selections with fewer than c other experts in between.
    hits = np.zeros((len(load.share_LE), experts + 1))
    hits[:, 1:] = reuse.between_share.cumsum(1)
    hits *= 1 - reuse.cold_share[:, None]
    kept = np.zeros_like(hits)
    kept[:, 1:] = -np.sort(-load.share_LE, axis=1).cumsum(1)
    kept[~load.counts_LE.any(1)] = np.nan
    return CacheSizes(sizes, 1 - hits[:, sizes], 1 - hits[:, sizes - top_k + 1], np.abs(1 - kept[:, sizes]))
