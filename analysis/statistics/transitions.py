"""Cross-layer patterns: which experts at layer n+k follow an expert at layer n (k = 1: single hop, k > 1: multi-hop).

n and k count MoE layers only. Every pair is of two layers of the same token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import random_table

from analysis.counts.accumulator import Counts, Floats
from analysis.counts.transitions import FOLDS, TransitionCounts
from analysis.statistics.load import entropy, normalized


@dataclass(frozen=True)
class HopStatistics:
    """One hop, from each layer n to n+hop; arrays `[L - hop]`.

    The control "shuffled" permutes the experts of layer n+hop over all tokens of the trace.

    information_bits: mutual information of the strongest experts at n and n+hop, Miller-Madow corrected;
    information_shuffled_bits: of the control.

    *_top1: accuracy of predicting the strongest expert at n+hop. conditional_top1 predicts the expert most frequent after the
    strongest expert at n, counted and evaluated on the same tokens. held_out_top1 is two-fold cross-validated: counted on one
    half of the problems and evaluated on the other. shuffled_top1 is conditional_top1 of the control. marginal_top1 predicts
    the layer's most frequent expert (popularity). Chance is 1/E.

    *_topk: recall of the K experts at n+hop with K predictions from one expert at n, over all K x K pairs: conditional_topk,
    held_out_topk and shuffled_topk as above; marginal_topk predicts the layer's K most used experts. Chance is K/E.

    same_strongest: the strongest experts at n and n+hop have the same index. same_selected: the index of an expert selected at
    n is also selected at n+hop. independent_strongest, independent_selected: their expected values from the loads of both
    layers alone, which is the expectation of the shuffled control. Chance is 1/E and K/E.

    Everything about the strongest experts is `nan` if the trace does not say which they are.
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

    def without_strongest(self) -> HopStatistics:
        """The same for a trace that does not say which experts are the strongest: what depends on it is `nan`."""
        of_strongest = [name for name in vars(self) if name.endswith(("_bits", "_top1", "_strongest"))]
        return replace(self, **{name: np.full_like(getattr(self, name), np.nan) for name in of_strongest})


def hop_statistics(counts: TransitionCounts, hop: int, top_k: int, seed: int = 0) -> HopStatistics:
    """Statistics of hop `hop` (1..H). seed: of the shuffled control."""
    random = np.random.default_rng((seed, hop))
    # One layer at a time: in int64, the tables of all layers would take twice the memory of the counts.
    rows = []
    for layer in range(counts.strongest.shape[2] - hop):
        strongest_FEE, pairs_FEE = (table[:, hop - 1, layer].astype(np.int64) for table in (counts.strongest, counts.pairs))
        rows.append(_statistics_of(strongest_FEE, pairs_FEE, top_k, random))
    return HopStatistics(hop=hop, **{name: np.array([row[name] for row in rows]) for name in rows[0]})


def _statistics_of(strongest_FEE: Counts, pairs_FEE: Counts, top_k: int, random: np.random.Generator) -> dict[str, float]:
    """The fields of `HopStatistics` for one pair of layers."""
    strongest_EE, pairs_EE = strongest_FEE.sum(0), pairs_FEE.sum(0)
    shuffled_EE, shuffled_pairs_EE = shuffled_table(strongest_EE, random), shuffled_table(pairs_EE, random)
    return {
        "information_bits": float(mutual_information(strongest_EE)),
        "information_shuffled_bits": float(mutual_information(shuffled_EE)),
        "conditional_top1": hits(strongest_EE, strongest_EE, 1),
        "held_out_top1": held_out_hits(strongest_FEE, 1),
        "shuffled_top1": hits(shuffled_EE, shuffled_EE, 1),
        "marginal_top1": _marginal_hits(strongest_EE, 1),
        "conditional_topk": hits(pairs_EE, pairs_EE, top_k),
        "held_out_topk": held_out_hits(pairs_FEE, top_k),
        "shuffled_topk": hits(shuffled_pairs_EE, shuffled_pairs_EE, top_k),
        "marginal_topk": _marginal_hits(pairs_EE, top_k),
        "same_strongest": _diagonal(strongest_EE),
        "independent_strongest": _independent_diagonal(strongest_EE),
        "same_selected": _diagonal(pairs_EE) * top_k,
        "independent_selected": _independent_diagonal(pairs_EE) * top_k,
    }


def hits(test_EE: Counts, train_EE: Counts, guesses: int) -> float:
    """Share of the pairs in `test_EE` whose later expert is among the `guesses` most frequent ones of its row in `train_EE`.

    Ties, and rows without counts in `train_EE`, are decided by the layer's totals.
    """
    # A share is at most 1, so half of it only breaks ties between counts.
    guessed = np.argpartition(-(train_EE + normalized(train_EE.sum(0)) / 2), guesses - 1, axis=1)[:, :guesses]
    return float(np.take_along_axis(test_EE, guessed, 1).sum() / max(test_EE.sum(), 1))


def held_out_hits(counts_FEE: Counts, guesses: int) -> float:
    """`hits` by two-fold cross-validation: each fold is evaluated with the counts of the other; `nan` if a fold is empty."""
    totals_F = counts_FEE.sum((1, 2))
    if totals_F.min() == 0:
        return float("nan")
    right = sum(hits(counts_FEE[f], counts_FEE[1 - f], guesses) * totals_F[f] for f in range(FOLDS))
    return float(right / totals_F.sum())


def shuffled_table(counts_EE: Counts, random: np.random.Generator) -> Counts:
    """A random table with the same margins, distributed as if the later experts were permuted over all pairs (Patefield, 1981).

    It keeps the loads of both layers and removes the dependence between them, without needing the tokens themselves.
    """
    # With one expert there is only one such table, which SciPy's algorithm does not handle.
    if not counts_EE.any() or counts_EE.shape[0] == 1:
        return counts_EE
    drawn = random_table(counts_EE.sum(1), counts_EE.sum(0)).rvs(1, method="patefield", random_state=random)[0]
    return np.asarray(drawn, dtype=np.int64)


def transition_probabilities(pair_counts: Counts) -> Floats:
    """P(expert j at layer n+k | expert i at layer n) from pair counts `[..., E, E]`: rows sum to 1, or to 0 if i is unused.

    With K > 1 it is the probability that one of the K experts at n+k, picked at random, is j, given that i is selected at n.
    """
    return normalized(pair_counts)


def mutual_information(joint_counts: Counts) -> Floats:
    """Mutual information in bits from joint counts `[..., E, E]`, with the Miller-Madow bias correction (Miller, 1955).

    The correction subtracts (m_xy - m_x - m_y + 1) / (2 N ln 2), where m are the numbers of non-empty cells and margins.
    """
    total = joint_counts.sum((-2, -1), keepdims=True)
    joint = joint_counts / np.maximum(total, 1)
    plug_in = entropy(joint.sum(-1)) + entropy(joint.sum(-2)) - entropy(joint.reshape(*joint.shape[:-2], -1))
    cells = (joint_counts > 0).sum((-2, -1))
    rows, columns = (joint_counts.sum(-1) > 0).sum(-1), (joint_counts.sum(-2) > 0).sum(-1)
    bias = (cells - rows - columns + 1) / (2 * np.maximum(total[..., 0, 0], 1) * np.log(2))
    return np.asarray(plug_in - bias, dtype=np.float64)


def _marginal_hits(counts_EE: Counts, guesses: int) -> float:
    return float(np.sort(normalized(counts_EE.sum(0)))[-guesses:].sum())


def _diagonal(counts_EE: Counts) -> float:
    return float(np.trace(counts_EE) / max(counts_EE.sum(), 1))


def _independent_diagonal(counts_EE: Counts) -> float:
    return float((normalized(counts_EE.sum(1)) * normalized(counts_EE.sum(0))).sum())
