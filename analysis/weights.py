"""Routing weights: their distribution by rank, and how much the router preferred the last expert it chose to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.accumulator import Accumulator, Counts, Floats
from analysis.frames import Frame
from analysis.kernels import HALVES, count_weights
from analysis.survey import Axes
from profiler.reader import Trace
from profiler.schema import LOGITS_FOLDER

# Positive float16 values are in the order of their bits; without the last four of them, bins are at most 1/64 wide, relatively.
SHIFT = 4
BINS = (0x7C00 >> SHIFT) + 1
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

# A sixth of what is called close.
CLOSE = 0.1
MARGIN_BIN = CLOSE / 6
MARGIN_BINS = 2048


class WeightCounts(Accumulator):
    """Histogram `[L, K, BINS]` and sums `[L, K]` of the weights per layer and rank; rank 0 is the strongest."""

    added = ("histogram", "sums")

    def __init__(self, axes: Axes) -> None:
        self.histogram: Counts = np.zeros((axes.layers, axes.top_k, BINS), dtype=np.int64)
        self.sums: Floats = np.zeros((axes.layers, axes.top_k))

    def update(self, frame: Frame) -> None:
        """Count a frame; nothing where the trace has no weights."""
        if frame.chunk.weights_TLK is not None:
            # Minus zero is zero.
            count_weights(frame.chunk.weights_TLK.view(np.uint16) & 0x7FFF, HALVES, SHIFT, self.histogram, self.sums)


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


class MarginCounts(Accumulator):
    """Histogram `[L, MARGIN_BINS]` of the margin: the K-th largest router logit minus the next, in steps of MARGIN_BIN.

    It is counted from `logits/` (`add_margins`), where a trace has them.
    """

    added = ("histogram",)

    def __init__(self, axes: Axes) -> None:
        self.histogram: Counts = np.zeros((axes.layers, MARGIN_BINS), dtype=np.int64)
        self._layers = np.array(axes.moe_layers)
        self._top_k, self._experts = axes.top_k, axes.num_experts

    def update(self, frame: Frame) -> None:
        """Frames have no logits."""

    def add(self, layers_N: npt.NDArray[np.int16], logits_NE: npt.NDArray[np.float16]) -> None:
        """Count rows of logits, each of the decoder's layer in `layers_N`; rows that are not finite are left out."""
        if self._top_k >= self._experts:
            return
        places_N = np.searchsorted(self._layers, layers_N)
        places_N[places_N == len(self._layers)] = 0
        known_N = (self._layers[places_N] == layers_N) & np.isfinite(logits_NE).all(1)
        descending = -np.sort(-logits_NE[known_N].astype(np.float32), axis=-1)
        margin_N = descending[:, self._top_k - 1] - descending[:, self._top_k]
        bin_N = np.minimum(margin_N / MARGIN_BIN, MARGIN_BINS - 1).astype(np.int64)
        flat = np.bincount(places_N[known_N] * MARGIN_BINS + bin_N, minlength=self.histogram.size)
        self.histogram += flat.reshape(self.histogram.shape)


def add_margins(trace: Trace, counts: MarginCounts, chosen: Callable[[npt.NDArray[Any]], npt.NDArray[np.bool_]]) -> None:
    """Count the margins of the problems that `chosen` picks by their ids, some rows of `logits/` at a time."""
    for problem_ids_N, layers_N, logits_NE in trace.value_rows(LOGITS_FOLDER):
        picked_N = chosen(problem_ids_N)
        counts.add(layers_N[picked_N], logits_NE[picked_N])


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
