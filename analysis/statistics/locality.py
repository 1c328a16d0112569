"""Temporal locality within a layer, over the tokens of a problem: repetition at a distance, reuse, similarity of segments."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from math import comb

import numpy as np

from analysis.counts.accumulator import Counts, Floats
from analysis.counts.locality import SEGMENT, ReuseCounts
from analysis.counts.pairs import LeadingPairs
from analysis.statistics.load import normalized

# The control leaves out longer gaps: reuse after so many tokens hardly differs from no reuse.
LONGEST_EXPECTED_GAP = 1 << 20


@dataclass(frozen=True)
class Repetition:
    """Repetition in one dataset (or all): shares per distance and layer `[N, L]`, `nan` where no tokens could be compared.

    first: both tokens have the same strongest expert. first_or_second: the two strongest experts of both tokens have one in
    common. shared: experts in common, divided by K. *_shuffled `[L]`: the same for two tokens drawn at random from this
    dataset, computed exactly from the counts. Chance: 1/E; 1 - C(E-2, 2)/C(E, 2); K/E.

    first is `nan` if the trace does not say which expert is the strongest; so is first_or_second, unless K is 2.
    """

    dataset: str
    compared: int
    first: Floats
    first_or_second: Floats
    shared: Floats
    first_shuffled: Floats
    first_or_second_shuffled: Floats
    shared_shuffled: Floats

    def without_strongest(self, top_k: int) -> Repetition:
        """The same for a trace that does not say which experts are the strongest: what depends on it is `nan`."""
        names = ["first", "first_shuffled"]
        if top_k > 2:
            names += ["first_or_second", "first_or_second_shuffled"]
        return replace(self, **{name: np.full_like(getattr(self, name), np.nan) for name in names})


def repetition(
    same_NL3: Counts, seen_NL: Counts, first_LE: Counts, load_LE: Counts, leading: LeadingPairs | None, top_k: int, dataset: str
) -> Repetition:
    """Repetition from the counts of one or more datasets.

    leading: pairs of the two strongest experts; without them first_or_second_shuffled is `nan`.
    """
    with np.errstate(invalid="ignore"):
        shares = same_NL3 / np.where(seen_NL > 0, seen_NL, np.nan)[..., None]
    first = normalized(first_LE)
    first_shuffled = (first**2).sum(1)
    if top_k == 1:
        either_shuffled = first_shuffled
    elif leading is None:
        either_shuffled = np.full_like(first_shuffled, np.nan)
    else:
        tokens_L = np.maximum(first_LE.sum(1), 1)
        # Two sets of two have 0, 1 or 2 experts in common: P(at least one) = E(number in common) - P(two in common).
        both = ((leading.pairs_LEE / tokens_L[:, None, None]) ** 2).sum((1, 2)) / 2
        either_shuffled = ((leading.members_LE / tokens_L[:, None]) ** 2).sum(1) - both
    return Repetition(
        dataset=dataset,
        compared=int(seen_NL[0].max(initial=0)),
        first=shares[..., 0],
        first_or_second=shares[..., 1],
        shared=shares[..., 2] / top_k,
        first_shuffled=first_shuffled,
        first_or_second_shuffled=np.asarray(either_shuffled),
        shared_shuffled=((load_LE / np.maximum(first_LE.sum(1), 1)[:, None]) ** 2).sum(1) / top_k,
    )


def repetition_chance(experts: int, top_k: int) -> tuple[float, float, float]:
    """`Repetition.first`, `.first_or_second` and `.shared` expected under uniform independent routing."""
    leading = min(2, top_k)
    meet = 1 - comb(experts - leading, leading) / comb(experts, leading)
    return 1 / experts, meet, top_k / experts


@dataclass(frozen=True)
class ReuseStatistics:
    """Reuse of experts per layer. Reuse is counted within a problem; an expert's first use in a problem is a cold use.

    gap_edges `[B+1]`: edges of the buckets [edge, next edge) of gaps, in tokens since the last use. gap_share `[L, B]`:
    share of the reuses in each bucket. gap_shuffled `[L, B]`: its expected value if every token drew its experts from the
    layer's load. median_gap `[L]`: by linear interpolation within its bucket. cold_share `[L]`: cold uses as a share of all
    uses; cold_shuffled: its expected value under the same control.
    between_share `[L, E]`: share of the reuses by the number (0, 1, ...) of other experts used by the tokens in between; this
    is the LRU stack distance with all experts of a token as one access. working_set `[L]`: distinct experts in a segment of
    SEGMENT tokens, divided by E; working_set_shuffled: for tokens drawn from the layer's load. adjacent `[L]`: probability
    that two selections, one from each of two adjacent segments, are of the same expert; adjacent_shuffled: of any two
    selections in the trace.
    """

    gap_edges: Counts
    gap_share: Floats
    gap_shuffled: Floats
    median_gap: Floats
    cold_share: Floats
    cold_shuffled: Floats
    between_share: Floats
    segments: int
    working_set: Floats
    working_set_shuffled: Floats
    adjacent: Floats
    adjacent_shuffled: Floats


def reuse_statistics(counts: ReuseCounts, load_LE: Counts, tokens: int) -> ReuseStatistics:
    """Statistics of reuse. load_LE: selections; tokens: number of tokens in the trace."""
    # Buckets cover every gap that fits into the longest problem, including gaps that never occurred.
    longest = min(max(counts.lengths, default=1), LONGEST_EXPECTED_GAP)
    buckets = max(int(longest).bit_length(), int(np.flatnonzero(counts.gaps.any(0)).max(initial=0)) + 1)
    edges = 1 << np.arange(buckets + 1)
    reused_L, cold_L = counts.gaps.sum(1), counts.cold
    used_LE = load_LE / max(tokens, 1)
    expected, expected_cold = _expected_reuse(counts.lengths, used_LE, edges)
    whole_L = counts.segments[:, 0]
    experts = load_LE.shape[1]
    with np.errstate(invalid="ignore", divide="ignore"):
        return ReuseStatistics(
            gap_edges=edges,
            gap_share=normalized(counts.gaps[:, :buckets]),
            gap_shuffled=normalized(expected),
            median_gap=np.array([_median(gaps, edges) for gaps in counts.gaps[:, :buckets]]),
            cold_share=cold_L / (reused_L + cold_L),
            cold_shuffled=expected_cold / (expected.sum(1) + expected_cold),
            between_share=normalized(counts.between),
            segments=int(whole_L.max(initial=0)),
            working_set=counts.segments[:, 1] / whole_L / experts,
            working_set_shuffled=(1 - (1 - used_LE) ** SEGMENT).mean(1),
            adjacent=counts.segments[:, 3] / counts.segments[:, 4],
            adjacent_shuffled=(normalized(load_LE) ** 2).sum(1),
        )


def _expected_reuse(lengths: Counter[int], used_LE: Floats, edges: Counts) -> tuple[Floats, Floats]:
    """Expected numbers of gaps `[L, B]` and cold uses `[L]` if tokens used each expert independently with probability used_LE.

    A gap of g tokens is a use, g - 1 tokens without a use, and a use. Its probability is used^2 (1 - used)^(g-1) at each of
    the (length - g) positions of a problem.
    """
    longest = min(max(lengths, default=1), int(edges[-1]) - 1, LONGEST_EXPECTED_GAP)
    sizes = np.array(sorted(lengths), dtype=np.int64)
    problems = np.array([lengths[size] for size in sizes.tolist()], dtype=np.int64)
    # Positions at which a gap of g = 1..longest can end, over all problems: the sum of max(length - g, 0).
    gaps_G = np.arange(1, longest + 1)
    longer_G = np.searchsorted(sizes, gaps_G, side="right")
    of_longer, number_longer = (np.append(each[::-1].cumsum()[::-1], 0) for each in (sizes * problems, problems))
    positions_G = of_longer[longer_G] - gaps_G * number_longer[longer_G]
    expected = np.zeros((len(used_LE), len(edges) - 1))
    for layer, used_E in enumerate(used_LE):
        for bucket, (begin, end) in enumerate(pairwise(np.minimum(edges, longest + 1).tolist())):
            for first in range(begin, end, 4096):
                gap_g = np.arange(first, min(first + 4096, end))
                ends_E = positions_G[gap_g - 1] @ (1 - used_E) ** (gap_g - 1)[:, None]
                expected[layer, bucket] += (ends_E * used_E**2).sum()
    cold = [(problems @ (1 - (1 - used_E) ** sizes[:, None])).sum() for used_E in used_LE]
    return expected, np.array(cold)


def _median(counts_B: Counts, edges: Counts) -> float:
    if not counts_B.any():
        return float("nan")
    cumulative = counts_B.cumsum()
    half = cumulative[-1] / 2
    bucket = int(np.searchsorted(cumulative, half))
    into = (half - (cumulative[bucket] - counts_B[bucket])) / counts_B[bucket]
    return float(edges[bucket] + into * (edges[bucket + 1] - 1 - edges[bucket]))
