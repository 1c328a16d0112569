"""Metrics of expert prediction, computed from the ranks that a predictor gives to the true experts.

Counts are summed over examples and only then divided, so the counts of parts can be added before a ratio is taken. There are N
examples, E experts, and K true experts per example. Rank 0 is the expert with the highest score.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import comb
from typing import Any, Self

import numba
import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]

FIXED_M = (1, 3, 5, 10, 20)
CONFIDENCE_BINS = 20
# Points of a budget curve: all m from K to E for small models, for others so many that grow by a constant factor and these
# multiples of K.
BUDGET_POINTS = 33
BUDGET_FACTORS = (1.5, 2, 3, 4)
BOOTSTRAP_SAMPLES = 1000
BOOTSTRAP_DRAWS_AT_ONCE = 1 << 17

DEFINITIONS = {
    "recall@m": "sum over examples of |top-m predicted ∩ true| / sum of K",
    "top-1": "the strongest true expert is the first prediction",
    "hit@m": "the strongest true expert is among the top m",
    "mass@m": "share of the routing weight of the true experts that falls on those among the top m",
    "exact": "the top K are the true set",
    "any": "at least one of the top K is true",
    "coverage@m": "all K true experts are among the top m",
    "chance": "expected value for a uniformly random ranking",
    "budget": "recall@m, coverage@m and mass@m for m from K to E: what is covered if the m most likely experts are fetched",
    "calibration": "all N x E predicted probabilities in 20 equal bins: mean prediction and observed frequency of each bin; "
    "error: mean |predicted - observed| over the bins, weighted by count (expected calibration error). Most probabilities are "
    "close to 0, so a small error is easy: compare it with that of popularity",
    "breakdowns": "by_phase and other groups (of the predicted token), precision_by_coverage: for horizon 1 only",
    "intervals": "95 % bootstrap intervals: problems resampled with replacement 1,000 times",
    "precision_by_coverage": "for thresholds of confidence (mean probability of the top K): the fraction of examples at or "
    "above the threshold, and their recall@K",
}


def definitions(top_k: int, *, has_weights: bool) -> dict[str, str]:
    """The definitions of what `RankCounts` and `ConfidenceCounts` report, see there."""
    unknown = set() if has_weights else {"mass@m", *(("top-1", "hit@m") if top_k > 1 else ())}
    return {name: text for name, text in DEFINITIONS.items() if name not in unknown}


def true_ranks(scores_NE: npt.NDArray[np.floating[Any]], true_NK: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Ranks `[N, K]` of the true experts `true_NK` among the scores `[N, E]`; equal scores rank by expert id.

    Example:
        >>> true_ranks(np.array([[0.1, 0.7, 0.2]]), np.array([[1, 0]])).tolist()
        [[0, 2]]
    """
    ranks_NK = np.empty(true_NK.shape, dtype=np.int64)
    # One type and layout of the experts: numba compiles a function for each.
    _count_better(np.ascontiguousarray(scores_NE), np.ascontiguousarray(true_NK, dtype=np.int64), ranks_NK)
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

    Args:
        num_experts: E.
        top_k: K.
        groups: G.
        has_weights: Whether the routing weights of the true experts are known. Without them, neither the strongest expert nor
            `mass@m` is known: these metrics are then absent. With K = 1, the only expert is the strongest.

    Attributes:
        examples: `[G]`, number of examples.
        every: Ranks of all true experts.
        strongest: Ranks of the true expert with the largest routing weight.
        best: Ranks of the best-ranked true expert.
        worst: Ranks of the worst-ranked true expert.
        mass: Sums of the routing weights of all true experts by rank, float64.
    """

    def __init__(self, num_experts: int, top_k: int, groups: int = 1, *, has_weights: bool = True) -> None:
        self.num_experts, self.top_k, self.has_weights = num_experts, top_k, has_weights
        self.examples: Counts = np.zeros(groups, dtype=np.int64)
        self.every, self.strongest, self.best, self.worst = (np.zeros((groups, num_experts), dtype=np.int64) for _ in range(4))
        self.mass = np.zeros((groups, num_experts))

    def add(
        self,
        ranks_NK: npt.NDArray[np.int64],
        weights_NK: npt.NDArray[np.floating[Any]] | None = None,
        group_N: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Count examples.

        Args:
            ranks_NK: Ranks from `true_ranks`, those of the strongest true expert first.
            weights_NK: Routing weights of the true experts; None if the weights are unknown.
            group_N: The group of each example; None for group 0.

        Raises:
            ValueError: Weights are missing or given although `has_weights` says otherwise.
        """
        if (weights_NK is not None) != self.has_weights:
            raise ValueError(
                f"has_weights is {self.has_weights}: expected weights_NK {'' if self.has_weights else 'not '}to be given"
            )
        group_N = np.zeros(len(ranks_NK), dtype=np.int64) if group_N is None else group_N
        self.examples += np.bincount(group_N, minlength=len(self.examples))

        def histogram(ranks_NJ: npt.NDArray[np.int64], weights_NJ: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
            cells = (group_N[:, None] * self.num_experts + ranks_NJ).reshape(-1)
            counts = np.bincount(cells, None if weights_NJ is None else weights_NJ.reshape(-1), self.every.size)
            return counts.reshape(self.every.shape)

        self.every += histogram(ranks_NK)
        self.strongest += histogram(ranks_NK[:, :1])
        self.best += histogram(ranks_NK.min(1, keepdims=True))
        self.worst += histogram(ranks_NK.max(1, keepdims=True))
        if weights_NK is not None:
            self.mass += histogram(ranks_NK, weights_NK.astype(np.float64))

    def merge(self, other: Self) -> None:
        """Add the counts of other examples."""
        for name in ("examples", "every", "strongest", "best", "worst", "mass"):
            getattr(self, name).__iadd__(getattr(other, name))

    def metrics(self, group: int | None = None) -> dict[str, float]:
        """All metrics by name, such as `recall@2`, for one group or for all together; empty without examples."""
        n, k, all_m = self._examples(group), self.top_k, evaluated_m(self.num_experts, self.top_k)
        if not n:
            return {}
        every, strongest, best, worst, mass = self._totals(group)
        result = {f"recall@{m}": float(every[:m].sum() / (n * k)) for m in all_m}
        if self.has_weights or k == 1:
            result["top-1"] = float(strongest[0] / n)
            result |= {f"hit@{m}": float(strongest[:m].sum() / n) for m in all_m}
        if mass.sum() > 0:
            result |= {f"mass@{m}": float(mass[:m].sum() / mass.sum()) for m in all_m}
        result["exact"] = float(worst[:k].sum() / n)
        result["any"] = float(best[:k].sum() / n)
        result |= {f"coverage@{m}": float(worst[:m].sum() / n) for m in all_m if m >= k}
        return result

    def budget(self, group: int | None = None) -> list[dict[str, float | None]]:
        """The budget curve: `m` from K to E, with `recall`, `coverage` and `mass` at each; empty without examples.

        mass: None without weights.
        """
        n = self._examples(group)
        if not n:
            return []
        every, _, _, worst, mass = self._totals(group)
        return [
            {
                "m": m,
                "recall": float(every[:m].sum() / (n * self.top_k)),
                "coverage": float(worst[:m].sum() / n),
                "mass": float(mass[:m].sum() / mass.sum()) if mass.sum() > 0 else None,
            }
            for m in budget_m(self.num_experts, self.top_k)
        ]

    def _examples(self, group: int | None) -> int:
        return int(self.examples.sum() if group is None else self.examples[group])

    def _totals(self, group: int | None) -> tuple[npt.NDArray[Any], ...]:
        """`every`, `strongest`, `best`, `worst` and `mass` `[E]` of one group, or of all together."""
        tables = (self.every, self.strongest, self.best, self.worst, self.mass)
        return tuple(table.sum(0) if group is None else table[group] for table in tables)


def evaluated_m(num_experts: int, top_k: int) -> list[int]:
    """The m for which metrics are reported: K, K+2, K+4, 2K, 1, 3, 5, 10 and 20, as far as they do not exceed E."""
    return sorted({m for m in (top_k, top_k + 2, top_k + 4, 2 * top_k, *FIXED_M) if m <= num_experts})


def budget_m(num_experts: int, top_k: int) -> list[int]:
    """The m of a budget curve, from K to E, ascending: all of them or, for large models, some tens."""
    if num_experts - top_k < BUDGET_POINTS:
        return list(range(top_k, num_experts + 1))
    multiples = {round(top_k * factor) for factor in BUDGET_FACTORS}
    growing = np.geomspace(top_k, num_experts, BUDGET_POINTS).round().astype(np.int64).tolist()
    return sorted({*growing, *(m for m in multiples if m < num_experts)})


def chance(num_experts: int, top_k: int, *, has_weights: bool = True) -> dict[str, float]:
    """Expected metrics of a uniformly random ranking, with the names of `RankCounts.metrics`."""
    e, k, all_m = num_experts, top_k, evaluated_m(num_experts, top_k)
    result = {f"recall@{m}": m / e for m in all_m}
    if has_weights or k == 1:
        result["top-1"] = 1 / e
        result |= {f"hit@{m}": m / e for m in all_m}
    if has_weights:
        result |= {f"mass@{m}": m / e for m in all_m}
    result["exact"] = 1 / comb(e, k)
    result["any"] = 1 - comb(e - k, k) / comb(e, k)
    result |= {f"coverage@{m}": comb(e - k, m - k) / comb(e, m) for m in all_m if m >= k}
    return result


class ProblemSums:
    """Sums over the examples of each of P problems, from which intervals are bootstrapped.

    Args:
        top_k: K.
        problems: P.
        has_weights: As for `RankCounts`.

    Attributes:
        names: The S metrics: recall@K, exact and, where they are known, top-1 and mass@K.
        found: Their numerators `[S, P]`.
        possible: Their denominators `[S, P]`.
    """

    def __init__(self, top_k: int, problems: int, *, has_weights: bool = True) -> None:
        self.top_k = top_k
        optional = (("top-1",) if has_weights or top_k == 1 else ()) + ((f"mass@{top_k}",) if has_weights else ())
        self.names = (f"recall@{top_k}", "exact", *optional)
        self.found, self.possible = np.zeros((len(self.names), problems)), np.zeros((len(self.names), problems))

    def add(
        self,
        ranks_NK: npt.NDArray[np.int64],
        weights_NK: npt.NDArray[np.floating[Any]] | None,
        problem_N: npt.NDArray[np.int64],
    ) -> None:
        """Add examples: ranks and weights as for `RankCounts.add`, and the problem of each, 0 to P - 1."""
        is_found_NK = ranks_NK < self.top_k
        found = {self.names[0]: is_found_NK.mean(1), "exact": is_found_NK.all(1), "top-1": ranks_NK[:, 0] == 0}
        possible = {}
        if weights_NK is not None:
            wide_NK = weights_NK.astype(np.float64)
            found[f"mass@{self.top_k}"] = (wide_NK * is_found_NK).sum(1)
            possible[f"mass@{self.top_k}"] = wide_NK.sum(1)
        for row, name in enumerate(self.names):
            self.found[row] += np.bincount(problem_N, found[name], self.found.shape[1])
            self.possible[row] += np.bincount(problem_N, possible.get(name), self.found.shape[1])

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % intervals by metric: the bootstrap resamples the problems that have examples, with replacement.

        A metric without any example has none.
        """
        found = {}
        for name, found_P, possible_P in zip(self.names, self.found, self.possible, strict=True):
            has_examples_P = possible_P > 0
            problems = int(has_examples_P.sum())
            if not problems:
                continue
            sums_2P = np.stack([found_P[has_examples_P], possible_P[has_examples_P]])
            drawn_2B = np.concatenate([sums_2P[:, drawn_NP].sum(2) for drawn_NP in _bootstrap_samples(problems)], axis=1)
            low, high = np.quantile(drawn_2B[0] / drawn_2B[1], [0.025, 0.975]).tolist()
            found[name] = (low, high)
        return found


def _bootstrap_samples(problems: int) -> Iterator[npt.NDArray[np.int64]]:
    """The problems of each bootstrap sample, in arrays `[N, P]` of some samples each: the same samples for every metric."""
    random = np.random.default_rng(0)
    at_once = max(1, BOOTSTRAP_DRAWS_AT_ONCE // problems)
    for first in range(0, BOOTSTRAP_SAMPLES, at_once):
        yield random.integers(problems, size=(min(at_once, BOOTSTRAP_SAMPLES - first), problems))


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

    def reliability(self) -> list[dict[str, float]]:
        """For each bin of probability that is not empty: the mean `predicted`, the `observed` frequency, and the `count`."""
        return [
            {
                "predicted": float(self.bin_probability[number] / count),
                "observed": float(self.bin_true[number] / count),
                "count": int(count),
            }
            for number, count in enumerate(self.bin_count)
            if count
        ]

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
