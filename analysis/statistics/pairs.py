"""Experts that a token uses together within a layer: pairs compared with independence, and the number of distinct sets."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np
import numpy.typing as npt

from analysis.counts.accumulator import Counts, Floats
from analysis.counts.pairs import SKETCH, PairCounts


@dataclass(frozen=True)
class PairStatistics:
    """Statistics per layer `[L]`, and pairs `[L, E, E]`, symmetric with a zero diagonal.

    lift_LEE: pairs counted, divided by the pairs expected if no expert preferred another (`expected_pairs`).
    unique_sets `[L]`: number of distinct sets; above 16,384 it is an estimate with 0.8 % standard error. possible_sets: E
    choose K. even_sets: expected number of distinct sets of the same number of tokens if every set were equally likely.
    top_pair `[L, 2]`, top_lift `[L]`: the pair with the largest lift, among the pairs expected at least 25 times; lift 0
    without such pairs. shuffled_top_lift `[L]`: the largest lift among the same number of pairs, drawn without preferences.
    """

    counts_LEE: Counts
    lift_LEE: Floats
    unique_sets: Floats
    possible_sets: int
    even_sets: float
    top_pair: Counts
    top_lift: Floats
    shuffled_top_lift: Floats


# A pair expected less often has a noisy lift: at 25, its relative standard error is a fifth.
MIN_EXPECTED = 25
ITERATIONS = 200


def pair_statistics(counts: PairCounts, top_k: int, seed: int = 0) -> PairStatistics | None:
    """Statistics of the pairs; None for K = 1, which has no pairs, and if there were too many experts to count pairs."""
    if top_k < 2 or not counts.fits:
        return None
    together = counts.together
    experts = together.shape[1]
    expected = expected_pairs(together.sum(2))
    lift = np.divide(together, expected, out=np.zeros_like(expected), where=expected > 0)
    best, top_lift = _largest(lift, expected)
    random = np.random.default_rng(seed)
    shuffled_top_lift = np.zeros(len(together))
    for layer, expected_EE in enumerate(expected):
        shuffled = np.divide(
            drawn_pairs(expected_EE, random), expected_EE, out=np.zeros_like(expected_EE), where=expected_EE > 0
        )
        shuffled_top_lift[layer] = _largest(shuffled[None], expected_EE[None])[1][0]
    possible, tokens = comb(experts, top_k), int(counts.tokens[0])
    return PairStatistics(
        counts_LEE=together,
        lift_LEE=lift.astype(np.float32),
        unique_sets=np.array(
            [min(estimate_distinct(sketch), tokens, possible) for sketch in counts.sketches], dtype=np.float64
        ),
        possible_sets=possible,
        # possible * (1 - (1 - 1/possible)^tokens), without cancellation; beyond 2^52 sets none is expected to occur twice.
        even_sets=tokens
        if possible > 1 << 52
        else -possible * np.expm1(tokens * np.log1p(-1 / possible))
        if possible > 1
        else 1,
        top_pair=np.stack(np.unravel_index(best, (experts, experts)), axis=1),
        top_lift=top_lift,
        shuffled_top_lift=shuffled_top_lift,
    )


def _largest(lift: Floats, expected: Floats) -> tuple[Counts, Floats]:
    """Index in `[E * E]` and value of the largest lift of each layer, among pairs that are expected often enough."""
    enough = np.where(expected >= MIN_EXPECTED, lift, 0).reshape(len(lift), -1)
    best = enough.argmax(1)
    return best, np.take_along_axis(enough, best[:, None], 1)[:, 0]


def drawn_pairs(expected_EE: Floats, random: np.random.Generator) -> Counts:
    """Draw the expected number of pairs without preferences; symmetric."""
    upper = np.triu(expected_EE)
    total = upper.sum()
    if total == 0:
        return np.zeros(expected_EE.shape, dtype=np.int64)
    drawn = random.multinomial(round(total), (upper / total).ravel()).reshape(upper.shape)
    return np.asarray(drawn + drawn.T)


def expected_pairs(in_pairs_LE: Counts) -> Floats:
    """Pairs of experts i and j `[..., E, E]` expected if no expert preferred another; symmetric.

    in_pairs_LE: number of pairs that each expert is in `[..., E]`. The result is proportional to a_i a_j off the diagonal, zero
    on it, and has the given row sums: quasi-independence (Goodman, 1968). The a are found by iteration. With even load all
    pairs are equally likely. If one expert is in more than half of the pairs, the row sums are only approximated.
    """
    sums = in_pairs_LE.astype(np.float64)
    a = np.sqrt(sums)
    for _ in range(ITERATIONS):
        others = a.sum(-1, keepdims=True) - a
        # The square root damps an oscillation between two solutions.
        a = np.sqrt(a * np.divide(sums, others, out=np.zeros_like(sums), where=others > 0))
    expected = a[..., :, None] * a[..., None, :]
    diagonal = np.arange(a.shape[-1])
    expected[..., diagonal, diagonal] = 0
    return np.asarray(expected)


def estimate_distinct(sketch: npt.NDArray[np.uint64]) -> float:
    """Number of distinct values: exact while the sketch holds all hashes, else (k - 1) / (k-th smallest hash in [0, 1))."""
    if len(sketch) < SKETCH:
        return float(len(sketch))
    return (len(sketch) - 1) / (float(sketch[-1]) / 2.0**64)
