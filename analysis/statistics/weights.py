"""Routing weights: their distribution by rank, and how much the router preferred the last expert it chose to the next."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.counts.accumulator import Floats
from analysis.counts.kernels import HALVES
from analysis.counts.weights import BINS, MARGIN_BIN, SHIFT, MarginCounts, WeightCounts

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class WeightStatistics:
    """quantiles `[L, K, 5]` of the weights as the model applies them, at QUANTILES, within 1/64; mean `[L, K]`.

    `nan` for ranks that no token has.

    even: 1/K, what each of K experts would have if they shared a sum of 1 evenly.
    """

    quantiles: Floats
    mean: Floats
    even: float


def weight_statistics(counts: WeightCounts) -> WeightStatistics | None:
    """Statistics of the weights; None if none were recorded."""
    if not counts.histogram.any():
        return None
    # The middle of a bin.
    values = HALVES[(np.arange(BINS) << SHIFT) + (1 << SHIFT) // 2]
    values[0], values[-1] = 0.0, HALVES[0x7BFF]
    totals = counts.histogram.sum(-1)
    used = totals > 0
    cumulative = counts.histogram.cumsum(-1) / np.maximum(totals, 1)[..., None]
    places = np.stack([(cumulative < quantile).sum(-1) for quantile in QUANTILES], axis=-1)
    return WeightStatistics(
        quantiles=np.where(used[..., None], values[np.minimum(places, BINS - 1)], np.nan),
        mean=np.where(used, counts.sums / np.maximum(totals, 1), np.nan),
        even=1 / counts.histogram.shape[1],
    )


@dataclass(frozen=True)
class MarginStatistics:
    """quantiles `[L, 5]` of the margin in logits at QUANTILES, within MARGIN_BIN; `nan` where a layer has no logits.

    close `[L]`: share of tokens whose margin is below CLOSE: a change of the router's inputs that small changes the set.
    """

    quantiles: Floats
    close: Floats


def margin_statistics(counts: MarginCounts) -> MarginStatistics | None:
    """Statistics of the margins; None where no logits were recorded."""
    if not counts.histogram.any():
        return None
    totals_L = counts.histogram.sum(1)
    with np.errstate(invalid="ignore"):
        cumulative = counts.histogram.cumsum(1) / totals_L[:, None]
        close = counts.histogram[:, :6].sum(1) / totals_L
    quantiles = np.stack([(cumulative < quantile).sum(1) * MARGIN_BIN for quantile in QUANTILES], axis=-1)
    return MarginStatistics(np.where(totals_L[:, None] > 0, quantiles, np.nan), close)
