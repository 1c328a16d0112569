"""Routing weights by rank, and the router's margin between the last selected expert and the next."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.counts.accumulator import Floats
from analysis.counts.kernels import HALVES
from analysis.counts.weights import BINS, MARGIN_BIN, SHIFT, MarginCounts, WeightCounts

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class WeightStatistics:
    """Routing weights as the model applies them, per layer and rank; `nan` for ranks that no token has.

    quantiles `[L, K, 5]`: at QUANTILES, with a relative error of at most 1/64. mean `[L, K]`. even: 1/K, the weight of each
    expert if K experts shared a sum of 1 evenly.
    """

    quantiles: Floats
    mean: Floats
    even: float


def weight_statistics(counts: WeightCounts) -> WeightStatistics | None:
    """Statistics of the weights; None if weights were not recorded."""
    if not counts.histogram.any():
        return None
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
    """Margin between the K-th largest router logit and the next, per layer; `nan` for layers without logits.

    quantiles `[L, 5]`: at QUANTILES, in logits, with an error of at most MARGIN_BIN. close `[L]`: share of tokens whose margin
    is below CLOSE: a change of the logits that small changes the set of selected experts.
    """

    quantiles: Floats
    close: Floats


def margin_statistics(counts: MarginCounts) -> MarginStatistics | None:
    """Statistics of the margins; None if logits were not recorded."""
    if not counts.histogram.any():
        return None
    totals_L = counts.histogram.sum(1)
    with np.errstate(invalid="ignore"):
        cumulative = counts.histogram.cumsum(1) / totals_L[:, None]
        close = counts.histogram[:, :6].sum(1) / totals_L
    quantiles = np.stack([(cumulative < quantile).sum(1) * MARGIN_BIN for quantile in QUANTILES], axis=-1)
    return MarginStatistics(np.where(totals_L[:, None] > 0, quantiles, np.nan), close)
