"""Routing weights: their distribution by rank, and how much the router preferred the last expert it chose to the next."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from analysis.accumulator import Accumulator, Counts, Floats
from analysis.frames import Frame
from analysis.kernels import HALVES, count_weights
from analysis.survey import Axes
from profiler.reader import Trace

# Positive float16 values are in the order of their bits; without the last four of them, bins are at most 1/64 wide, relatively.
SHIFT = 4
BINS = (0x7C00 >> SHIFT) + 1
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

MARGIN_BIN = 1 / 64
MARGIN_BINS = 2048


class WeightCounts(Accumulator):
    """Histogram of the weights per layer and rank `[L, K, BINS]`; rank 0 is the strongest."""

    added = ("histogram",)

    def __init__(self, axes: Axes) -> None:
        self.histogram: Counts = np.zeros((axes.layers, axes.top_k, BINS), dtype=np.int64)

    def update(self, frame: Frame) -> None:
        """Count a frame; nothing where the trace has no weights."""
        if frame.chunk.weights_TLK is not None:
            # Minus zero is zero.
            count_weights(frame.chunk.weights_TLK.view(np.uint16) & 0x7FFF, SHIFT, self.histogram)


@dataclass(frozen=True)
class WeightStatistics:
    """quantiles `[L, K, 5]` of the weights as the model applies them, at QUANTILES; mean `[L, K]`. Both within 1 %.

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
    totals = np.maximum(counts.histogram.sum(-1), 1)
    cumulative = counts.histogram.cumsum(-1) / totals[..., None]
    places = np.stack([(cumulative < quantile).sum(-1) for quantile in QUANTILES], axis=-1)
    return WeightStatistics(
        quantiles=values[np.minimum(places, BINS - 1)],
        mean=(counts.histogram * values).sum(-1) / totals,
        even=1 / counts.histogram.shape[1],
    )


class MarginCounts(Accumulator):
    """Histogram `[L, MARGIN_BINS]` of the margin: the K-th largest router logit minus the next, in steps of MARGIN_BIN.

    It is counted from `logits/`, problem by problem (`add`), where a trace has them.
    """

    added = ("histogram",)

    def __init__(self, axes: Axes) -> None:
        self.histogram: Counts = np.zeros((axes.layers, MARGIN_BINS), dtype=np.int64)
        self._layers, self._top_k = list(axes.moe_layers), axes.top_k
        self._experts = axes.num_experts

    def update(self, frame: Frame) -> None:
        """Frames have no logits."""

    def add(self, logits_TLE: npt.NDArray[np.float16], layers: list[int]) -> None:
        """Count the logits of one problem, of some of the MoE layers."""
        if self._top_k >= self._experts:
            return
        descending = -np.sort(-logits_TLE.astype(np.float32), axis=-1)
        margins_TL = descending[..., self._top_k - 1] - descending[..., self._top_k]
        bins_TL = np.minimum(margins_TL / MARGIN_BIN, MARGIN_BINS - 1).astype(np.int64)
        for column, layer in enumerate(layers):
            if layer in self._layers:
                row = self.histogram[self._layers.index(layer)]
                row += np.bincount(bins_TL[:, column], minlength=MARGIN_BINS)


def add_margins(trace: Trace, counts: MarginCounts, problem_ids: list[int]) -> None:
    """Count the margins of some problems of `trace`, a problem at a time."""
    for problem_id in problem_ids:
        _, layers, logits_TLE = trace.values("logits", problem_id)
        finite_T = np.isfinite(logits_TLE).all((1, 2))
        counts.add(logits_TLE[finite_T], layers)


@dataclass(frozen=True)
class MarginStatistics:
    """quantiles `[L, 5]` of the margin in logits at QUANTILES, within MARGIN_BIN; `nan` where a layer has no logits.

    close `[L]`: share of tokens whose margin is below 0.1: a change of the router's inputs that small changes the set.
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
        close = counts.histogram[:, : round(0.1 / MARGIN_BIN)].sum(1) / totals_L
    quantiles = np.stack([(cumulative < quantile).sum(1) * MARGIN_BIN for quantile in QUANTILES], axis=-1)
    return MarginStatistics(np.where(totals_L[:, None] > 0, quantiles, np.nan), close)
