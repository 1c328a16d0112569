"""Metrics of expert prediction, computed from the ranks that a predictor gives to the true experts.

Counts are summed over examples and only then divided, so the counts of parts can be added before a ratio is taken. There are N
examples, E experts, and K true experts per example. Rank 0 is the expert with the highest score.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import comb
from typing import Any, Self

import numba
import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]

FIXED_M = (1, 3, 5, 10, 20)
CONFIDENCE_BINS = 20

DEFINITIONS = {
    "recall@m": "sum over examples of |top-m predicted ∩ true| / sum of K",
    "top-1": "the strongest true expert is the first prediction",
    "hit@m": "the strongest true expert is among the top m",
    "exact": "the top K are the true set",
    "any": "at least one of the top K is true",
    "coverage@m": "all K true experts are among the top m",
    "chance": "expected value for a uniformly random ranking",
    "calibration_error": "mean |predicted probability - observed frequency| in 20 equal bins of probability, weighted by count",
    "breakdowns": "by_phase and other groups (of the predicted token), calibration, precision_by_coverage: for horizon 1 only",
    "intervals": "95 % bootstrap intervals: problems resampled with replacement 1,000 times",
    "precision_by_coverage": "for thresholds of confidence (mean probability of the top K): the fraction of examples at or "
    "above the threshold, and their recall@K",
}


def true_ranks(scores_NE: npt.NDArray[np.floating[Any]], true_NK: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Ranks `[N, K]` of the true experts `true_NK` among the scores `[N, E]`; equal scores rank by expert id.

    Example:
        >>> true_ranks(np.array([[0.1, 0.7, 0.2]]), np.array([[1, 0]])).tolist()
        [[0, 2]]
    """
    ranks_NK = np.empty(true_NK.shape, dtype=np.int64)
    _count_better(np.ascontiguousarray(scores_NE), true_NK, ranks_NK)
    return ranks_NK


@numba.njit(cache=True, nogil=True)
def _count_better(scores_NE: npt.NDArray[np.floating[Any]], true_NK: npt.NDArray[Any], ranks_NK: npt.NDArray[np.int64]) -> None:
    for n in range(true_NK.shape[0]):
        for k in range(true_NK.shape[1]):
            own = true_NK[n, k]
            score = scores_NE[n, own]
            rank = 0
            for expert in range(scores_NE.shape[1]):
                other = scores_NE[n, expert]
                rank += other > score or (other == score and expert < own)
            ranks_NK[n, k] = rank


class RankCounts:
    """Histograms of ranks `[G, E]`, for each of G groups of examples.

    Attributes:
        num_experts: E.
        top_k: K.
        examples: `[G]`, number of examples.
        every: Ranks of all true experts.
        strongest: Ranks of the true expert with the largest routing weight.
        best: Ranks of the best-ranked true expert.
        worst: Ranks of the worst-ranked true expert.
    """

    def __init__(self, num_experts: int, top_k: int, groups: int = 1) -> None:
        self.num_experts, self.top_k = num_experts, top_k
        self.examples: Counts = np.zeros(groups, dtype=np.int64)
        self.every, self.strongest, self.best, self.worst = (np.zeros((groups, num_experts), dtype=np.int64) for _ in range(4))

    def add(self, ranks_NK: npt.NDArray[np.int64], group_N: npt.NDArray[np.integer[Any]] | int = 0) -> None:
        """Count ranks.

        Args:
            ranks_NK: Ranks from `true_ranks`, those of the strongest true expert first.
            group_N: The group of each example, or one group for all.
        """
        group_N = np.broadcast_to(np.asarray(group_N, dtype=np.int64), len(ranks_NK))
        self.examples += np.bincount(group_N, minlength=len(self.examples))

        def count(into: Counts, ranks_NJ: npt.NDArray[np.int64]) -> None:
            cells_NJ = group_N[:, None] * self.num_experts + ranks_NJ
            into += np.bincount(cells_NJ.reshape(-1), minlength=into.size).reshape(into.shape)

        count(self.every, ranks_NK)
        count(self.strongest, ranks_NK[:, :1])
        count(self.best, ranks_NK.min(1, keepdims=True))
        count(self.worst, ranks_NK.max(1, keepdims=True))

    def merge(self, other: Self) -> None:
        """Add the counts of other examples."""
        for name in ("examples", "every", "strongest", "best", "worst"):
            getattr(self, name).__iadd__(getattr(other, name))

    def metrics(self, group: int | None = None) -> dict[str, float]:
        """All metrics by name, such as `recall@2`, for one group or for all together; empty without examples."""
        chosen = slice(None) if group is None else slice(group, group + 1)
        n, k = int(self.examples[chosen].sum()), self.top_k
        if not n:
            return {}
        every, strongest, best, worst = (each[chosen].sum(0) for each in (self.every, self.strongest, self.best, self.worst))
        result = {f"recall@{m}": float(every[:m].sum() / (n * k)) for m in evaluated_m(self.num_experts, k)}
        result["top-1"] = float(strongest[0] / n)
        result |= {f"hit@{m}": float(strongest[:m].sum() / n) for m in evaluated_m(self.num_experts, k)}
        result["exact"] = float(worst[:k].sum() / n)
        result["any"] = float(best[:k].sum() / n)
        wide = (m for m in evaluated_m(self.num_experts, k) if m >= k)
        result |= {f"coverage@{m}": float(worst[:m].sum() / n) for m in wide}
        return result


def evaluated_m(num_experts: int, top_k: int) -> list[int]:
    """The m for which metrics are reported: K, K+2, K+4, 2K, 1, 3, 5, 10 and 20, as far as they do not exceed E."""
    return sorted({m for m in (top_k, top_k + 2, top_k + 4, 2 * top_k, *FIXED_M) if m <= num_experts})


def chance(num_experts: int, top_k: int) -> dict[str, float]:
    """Expected metrics of a uniformly random ranking, with the names of `RankCounts.metrics`."""
    e, k = num_experts, top_k
    result = {f"recall@{m}": m / e for m in evaluated_m(e, k)}
    result["top-1"] = 1 / e
    result |= {f"hit@{m}": m / e for m in evaluated_m(e, k)}
    result["exact"] = 1 / comb(e, k)
    result["any"] = 1 - comb(e - k, k) / comb(e, k)
    result |= {f"coverage@{m}": comb(e - k, m - k) / comb(e, m) for m in evaluated_m(e, k) if m >= k}
    return result


@dataclass
class ConfidenceCounts:
    """Sums per bin of probability: for calibration over all N x E probabilities, for confidence filtering over examples."""

    bin_probability: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(CONFIDENCE_BINS))
    bin_true: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(CONFIDENCE_BINS))
    bin_count: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(CONFIDENCE_BINS))
    confident_examples: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(CONFIDENCE_BINS))
    confident_hits: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(CONFIDENCE_BINS))

    def add(
        self,
        probabilities_NE: npt.NDArray[np.floating[Any]],
        true_NK: npt.NDArray[Any],
        ranks_NK: npt.NDArray[np.int64],
    ) -> None:
        """Count examples.

        Args:
            probabilities_NE: Predicted probability that an expert is among the K true ones.
            true_NK: True experts.
            ranks_NK: Their ranks, from `true_ranks`.
        """
        k = true_NK.shape[1]
        bins = _bins(probabilities_NE).reshape(-1)
        is_true_NE = np.zeros(probabilities_NE.shape, dtype=np.float64)
        np.put_along_axis(is_true_NE, true_NK.astype(np.int64), 1.0, axis=1)
        self.bin_probability += np.bincount(bins, probabilities_NE.reshape(-1), CONFIDENCE_BINS)
        self.bin_true += np.bincount(bins, is_true_NE.reshape(-1), CONFIDENCE_BINS)
        self.bin_count += np.bincount(bins, minlength=CONFIDENCE_BINS)
        confidence_N = np.partition(probabilities_NE, -k, axis=1)[:, -k:].mean(1)
        confidence_bins = _bins(confidence_N)
        self.confident_examples += np.bincount(confidence_bins, minlength=CONFIDENCE_BINS)
        self.confident_hits += np.bincount(confidence_bins, (ranks_NK < k).mean(1), CONFIDENCE_BINS)

    def calibration_error(self) -> float:
        """Expected calibration error (Naeini et al., 2015) of the predicted probabilities."""
        return float(np.abs(self.bin_probability - self.bin_true).sum() / max(self.bin_count.sum(), 1))

    def precision_by_coverage(self) -> list[dict[str, float]]:
        """The threshold, the fraction of examples at or above it, and their recall@K, from the lowest threshold up."""
        kept = self.confident_examples[::-1].cumsum()[::-1]
        hits = self.confident_hits[::-1].cumsum()[::-1]
        return [
            {
                "threshold": number / CONFIDENCE_BINS,
                "coverage": float(kept[number] / kept[0]),
                "recall@K": float(hits[number] / kept[number]),
            }
            for number in range(CONFIDENCE_BINS)
            if kept[number]
        ]


def _bins(probabilities: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.int64]:
    return np.clip((probabilities * CONFIDENCE_BINS).astype(np.int64), 0, CONFIDENCE_BINS - 1)
