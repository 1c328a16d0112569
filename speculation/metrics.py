"""Metrics of expert prediction, from the ranks that a predictor gives to the true experts.

Counts are summed over examples and only then divided, so parts can be added before a ratio is taken. N examples, K true
experts, E experts; rank 0 is the expert with the highest score.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import comb
from typing import Any, Self

import numpy as np
import numpy.typing as npt

FIXED_M = (1, 3, 5, 10, 20)
CONFIDENCE_BINS = 20

DEFINITIONS = {
    "recall@m": "sum over examples of |top-m predicted ∩ true| / sum of K",
    "top-1": "the strongest true expert is the first prediction",
    "hit@m": "the strongest true expert is among the top m",
    "exact": "the top K are the true set",
    "any": "at least one of the top K is true",
    "coverage@m": "all K true experts are among the top m",
    "chance": "expected value of a uniformly random ranking",
    "calibration_error": "mean |predicted probability - observed frequency| in 20 equal bins of probability, weighted by count",
    "breakdowns": "by_phase, by_position, calibration and precision_by_coverage are of horizon 1",
    "precision_by_coverage": "for thresholds of confidence (mean probability of the top K): the fraction of examples kept and "
    "the recall@K among them",
}


def true_ranks(scores_NE: npt.NDArray[np.floating[Any]], true_NK: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Rank `[N, K]` of each true expert; equal scores rank by expert id."""
    order_NE = np.argsort(-scores_NE, axis=1, kind="stable")
    rank_NE = np.empty_like(order_NE)
    np.put_along_axis(rank_NE, order_NE, np.arange(scores_NE.shape[1])[None], axis=1)
    return np.take_along_axis(rank_NE, true_NK.astype(np.int64), axis=1)


@dataclass
class RankCounts:
    """How often each rank occurred `[E]`: of any true expert, of the strongest, of the best-ranked and the worst-ranked one."""

    num_experts: int
    top_k: int
    examples: int = 0
    every: npt.NDArray[np.int64] = field(init=False)
    strongest: npt.NDArray[np.int64] = field(init=False)
    best: npt.NDArray[np.int64] = field(init=False)
    worst: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        for name in ("every", "strongest", "best", "worst"):
            setattr(self, name, np.zeros(self.num_experts, dtype=np.int64))

    def add(self, ranks_NK: npt.NDArray[np.int64]) -> None:
        """Count ranks as `true_ranks` returns them, the strongest true expert first."""

        def count(ranks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
            return np.bincount(ranks.reshape(-1), minlength=self.num_experts)

        self.examples += len(ranks_NK)
        self.every += count(ranks_NK)
        self.strongest += count(ranks_NK[:, 0])
        self.best += count(ranks_NK.min(1))
        self.worst += count(ranks_NK.max(1))

    def merge(self, other: Self) -> None:
        """Add the counts of other examples."""
        self.examples += other.examples
        for name in ("every", "strongest", "best", "worst"):
            getattr(self, name).__iadd__(getattr(other, name))

    def metrics(self) -> dict[str, float]:
        """Every metric by name, e.g. `recall@2`; empty without examples."""
        if not self.examples:
            return {}
        n, k = self.examples, self.top_k
        result = {f"recall@{m}": float(self.every[:m].sum() / (n * k)) for m in evaluated_m(self.num_experts, k)}
        result["top-1"] = float(self.strongest[0] / n)
        result |= {f"hit@{m}": float(self.strongest[:m].sum() / n) for m in evaluated_m(self.num_experts, k)}
        result["exact"] = float(self.worst[:k].sum() / n)
        result["any"] = float(self.best[:k].sum() / n)
        wide = (m for m in evaluated_m(self.num_experts, k) if m >= k)
        result |= {f"coverage@{m}": float(self.worst[:m].sum() / n) for m in wide}
        return result


def evaluated_m(num_experts: int, top_k: int) -> list[int]:
    """The m for which metrics are reported: K, K+2, K+4, 2K and 1, 3, 5, 10, 20, up to E."""
    return sorted({m for m in (top_k, top_k + 2, top_k + 4, 2 * top_k, *FIXED_M) if m <= num_experts})


def chance(num_experts: int, top_k: int) -> dict[str, float]:
    """What a uniformly random ranking scores on average, under the names of `RankCounts.metrics`."""
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
    """Sums per bin for calibration (over all N x E probabilities) and confidence filtering (over examples)."""

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
        """Count examples: probabilities that an expert is in the true set, the true experts and their ranks."""
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
        """Expected calibration error (Naeini et al., 2015) of membership probabilities."""
        return float(np.abs(self.bin_probability - self.bin_true).sum() / max(self.bin_count.sum(), 1))

    def precision_by_coverage(self) -> list[dict[str, float]]:
        """From the lowest threshold (all examples) up: threshold, fraction of examples kept, recall@K among them."""
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
