"""Histograms of routing weights by rank, and of margins between router logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.counts.accumulator import Accumulator, Counts, Floats
from analysis.counts.frames import Frame
from analysis.counts.kernels import HALVES, count_weights
from analysis.counts.survey import Axes
from profiler.trace.reader import Trace
from profiler.trace.schema import LOGITS_FOLDER

# Positive float16 values are in the order of their bits; without the last four, bins have a relative width of at most 1/64.
SHIFT = 4
BINS = (0x7C00 >> SHIFT) + 1

CLOSE = 0.1
# CLOSE is a multiple of the bin width, so that the share of close margins is exact.
MARGIN_BIN = CLOSE / 6
MARGIN_BINS = 2048


class WeightCounts(Accumulator):
    """Histogram `[L, K, BINS]` and sums `[L, K]` of the weights per layer and rank; rank 0 is the strongest."""

    added = ("histogram", "sums")

    def __init__(self, axes: Axes) -> None:
        self.histogram: Counts = np.zeros((axes.layers, axes.top_k, BINS), dtype=np.int64)
        self.sums: Floats = np.zeros((axes.layers, axes.top_k))

    def update(self, frame: Frame) -> None:
        """Count a frame, if the trace has weights."""
        if frame.chunk.weights_TLK is not None:
            # The mask turns minus zero into zero.
            count_weights(frame.chunk.weights_TLK.view(np.uint16) & 0x7FFF, HALVES, SHIFT, self.histogram, self.sums)


class MarginCounts(Accumulator):
    """Histogram `[L, MARGIN_BINS]` of the margin: the K-th largest router logit minus the next, in bins of MARGIN_BIN.

    Margins are counted from `logits/`, if the trace has them (`add_margins`).
    """

    added = ("histogram",)

    def __init__(self, axes: Axes) -> None:
        self.histogram: Counts = np.zeros((axes.layers, MARGIN_BINS), dtype=np.int64)
        self._layers = np.array(axes.moe_layers)
        self._top_k, self._experts = axes.top_k, axes.num_experts

    def update(self, frame: Frame) -> None:
        """Frames have no logits."""

    def add(self, layers_N: npt.NDArray[np.int16], logits_NE: npt.NDArray[np.float16]) -> None:
        """Count rows of logits; layers_N: decoder layer of each row. Rows with values that are not finite are left out."""
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
    """Count the margins of the problems whose ids `chosen` selects, reading `logits/` in batches of rows."""
    for problem_ids_N, layers_N, logits_NE in trace.value_rows(LOGITS_FOLDER):
        picked_N = chosen(problem_ids_N)
        counts.add(layers_N[picked_N], logits_NE[picked_N])
