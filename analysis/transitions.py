"""Cross-layer patterns: which experts at layer n+k follow an expert at layer n (k = 1: single hop, k > 1: multi-hop).

Layers count MoE layers only. Rows of a token are paired with rows of the same token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import random_table

from analysis.accumulator import Accumulator, Counts, Floats
from analysis.frames import Frame
from analysis.kernels import count_transitions
from analysis.load import entropy, normalized
from analysis.survey import Axes

FOLDS = 2


class TransitionCounts(Accumulator):
    """Counts for hops 1..H; entry [f, k-1, n] pairs layer n with layer n+k and is zero where n+k is past the end.

    pairs `[F, H, L, E, E]`: tokens for which expert i is selected at n and expert j at n+k, over all K x K pairs.
    strongest `[F, H, L, E, E]`: the same for the experts of largest weight only, one pair per token. F: the two folds of
    problems. uint32 holds 4 x 10^9 tokens, and halves the memory.
    """

    added = ("all_pairs", "all_strongest")

    def __init__(self, axes: Axes) -> None:
        shape = (FOLDS, axes.hops, axes.layers, axes.num_experts + 1, axes.num_experts + 1)
        # With a row and a column for empty slots.
        self.all_pairs: Counts = np.zeros(shape, dtype=np.uint32)
        self.all_strongest: Counts = np.zeros(shape, dtype=np.uint32)

    @property
    def pairs(self) -> Counts:
        """Without empty slots."""
        return self.all_pairs[..., :-1, :-1]

    @property
    def strongest(self) -> Counts:
        """Without empty slots."""
        return self.all_strongest[..., :-1, :-1]

    def update(self, frame: Frame) -> None:
        """Count a frame."""
        count_transitions(frame.chunk.expert_ids_TLK, frame.fold_T, self.all_pairs, self.all_strongest)


def transition_bytes(layers: int, experts: int, hops: int) -> int:
    """Size of the tables of `TransitionCounts`."""
    return 2 * FOLDS * hops * layers * (experts + 1) ** 2 * 4


@dataclass(frozen=True)
class HopStatistics:
    """One hop, from each layer n to n+hop; arrays `[L - hop]`. "shuffled": layer n+hop's tokens permuted over the whole trace.

    information_bits: mutual information of the strongest experts at n and n+hop, Miller-Madow corrected; and shuffled.

    top1: how often the strongest expert at n+hop is guessed right: conditional_top1, by the most frequent one given the
    strongest at n; held_out_top1, the same where each half of the problems judges what the other half says; shuffled_top1;
    marginal_top1, by the layer's most frequent (popularity); chance is 1/E. topk: which fraction of the experts at n+hop are
    among K guesses, given one of the experts at n, over all K x K pairs: conditional_topk, held_out_topk, shuffled_topk;
    marginal_topk: the layer's K most used; chance is K/E. same_strongest: the strongest expert has the same index at n and
    n+hop; same_selected: an expert at n has the index of one at n+hop. independent_strongest, independent_selected: what the
    loads of both layers alone give (the shuffled control's expectation). Chance is 1/E and K/E.
    """

    hop: int
    information_bits: Floats
    information_shuffled_bits: Floats
    conditional_top1: Floats
    held_out_top1: Floats
    shuffled_top1: Floats
    marginal_top1: Floats
    conditional_topk: Floats
    held_out_topk: Floats
    shuffled_topk: Floats
    marginal_topk: Floats
    same_strongest: Floats
    independent_strongest: Floats
    same_selected: Floats
    independent_selected: Floats


def hop_statistics(counts: TransitionCounts, hop: int, top_k: int, seed: int = 0) -> HopStatistics:
    """Statistics of hop `hop` (1..H). seed: for the shuffled control."""
    layers = counts.strongest.shape[2] - hop
    strongest_FNEE = counts.strongest[:, hop - 1, :layers].astype(np.int64)
    pairs_FNEE = counts.pairs[:, hop - 1, :layers].astype(np.int64)
    strongest_NEE, pairs_NEE = strongest_FNEE.sum(0), pairs_FNEE.sum(0)
    random = np.random.default_rng((seed, hop))
    shuffled_NEE = shuffled_table(strongest_NEE, random)
    shuffled_pairs_NEE = shuffled_table(pairs_NEE, random)
    return HopStatistics(
        hop=hop,
        information_bits=mutual_information(strongest_NEE),
        information_shuffled_bits=mutual_information(shuffled_NEE),
        conditional_top1=hits(strongest_NEE, strongest_NEE, 1),
        held_out_top1=held_out_hits(strongest_FNEE, 1),
        shuffled_top1=hits(shuffled_NEE, shuffled_NEE, 1),
        marginal_top1=_marginal_hits(strongest_NEE, 1),
        conditional_topk=hits(pairs_NEE, pairs_NEE, top_k),
        held_out_topk=held_out_hits(pairs_FNEE, top_k),
        shuffled_topk=hits(shuffled_pairs_NEE, shuffled_pairs_NEE, top_k),
        marginal_topk=_marginal_hits(pairs_NEE, top_k),
        same_strongest=_diagonal(strongest_NEE),
        independent_strongest=_independent_diagonal(strongest_NEE),
        same_selected=_diagonal(pairs_NEE) * top_k,
        independent_selected=_independent_diagonal(pairs_NEE) * top_k,
    )


def hits(judged_NEE: Counts, said_NEE: Counts, guesses: int) -> Floats:
    """Share of the pairs in `judged` whose later expert is among the `guesses` most frequent ones of its row in `said`, `[N]`.

    Equal counts, and rows that `said` knows nothing of, go by the layer's totals.
    """
    marginal_N1E = normalized(said_NEE.sum(-2))[:, None]
    # A share is at most 1, so halved it decides between equal counts only.
    guessed = np.argpartition(-(said_NEE + marginal_N1E / 2), guesses - 1, axis=-1)[..., :guesses]
    right_N = np.take_along_axis(judged_NEE, guessed, -1).sum((-2, -1))
    return np.asarray(right_N / np.maximum(judged_NEE.sum((-2, -1)), 1), dtype=np.float64)


def held_out_hits(counts_FNEE: Counts, guesses: int) -> Floats:
    """`hits` where each of the two folds is judged by what the other says; `nan` where a fold has nothing."""
    totals_FN = counts_FNEE.sum((-2, -1))
    right_N = sum(hits(counts_FNEE[f], counts_FNEE[1 - f], guesses) * totals_FN[f] for f in range(FOLDS))
    return np.asarray(np.where(totals_FN.min(0) > 0, right_N / np.maximum(totals_FN.sum(0), 1), np.nan))


def shuffled_table(counts_NEE: Counts, random: np.random.Generator) -> Counts:
    """Tables of the same margins, drawn as if the later experts were permuted over all pairs (Patefield, 1981).

    It keeps the loads of both layers and destroys the link, without the tokens themselves.
    """
    return np.stack(
        [
            random_table(table.sum(1), table.sum(0)).rvs(1, method="patefield", random_state=random)[0]
            if table.any()
            else table
            for table in counts_NEE
        ]
    )


def transition_probabilities(pair_counts: Counts) -> Floats:
    """P(expert j at layer n+k | expert i at layer n) from pair counts `[..., E, E]`: rows sum to 1, or 0 if i is unused.

    With K > 1 it is the chance that a random one of the K selected experts at n+k is j, given that i is selected at n.
    """
    return normalized(pair_counts)


def mutual_information(joint_counts: Counts) -> Floats:
    """Mutual information in bits from joint counts `[..., E, E]`, with the Miller-Madow bias correction (Miller, 1955).

    The correction subtracts (m_xy - m_x - m_y + 1) / (2 N ln 2), m being the number of non-empty cells and margins.
    """
    total = joint_counts.sum((-2, -1), keepdims=True)
    joint = joint_counts / np.maximum(total, 1)
    plug_in = entropy(joint.sum(-1)) + entropy(joint.sum(-2)) - entropy(joint.reshape(*joint.shape[:-2], -1))
    cells = (joint_counts > 0).sum((-2, -1))
    rows, columns = (joint_counts.sum(-1) > 0).sum(-1), (joint_counts.sum(-2) > 0).sum(-1)
    bias = (cells - rows - columns + 1) / (2 * np.maximum(total[..., 0, 0], 1) * np.log(2))
    return np.asarray(plug_in - bias, dtype=np.float64)


def _marginal_hits(counts_NEE: Counts, guesses: int) -> Floats:
    shares_NE = normalized(counts_NEE.sum(-2))
    return np.asarray(np.sort(shares_NE, axis=-1)[:, -guesses:].sum(-1))


def _diagonal(counts_NEE: Counts) -> Floats:
    return np.asarray(np.trace(counts_NEE, axis1=-2, axis2=-1) / np.maximum(counts_NEE.sum((-2, -1)), 1))


def _independent_diagonal(counts_NEE: Counts) -> Floats:
    return np.asarray((normalized(counts_NEE.sum(-1)) * normalized(counts_NEE.sum(-2))).sum(-1))
