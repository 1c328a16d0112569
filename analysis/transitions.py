"""Cross-layer patterns: which experts at layer n+k follow an expert at layer n (k = 1: single hop, k > 1: multi-hop).

Layers count MoE layers only. Rows of a token are paired with rows of the same token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from analysis.load import Counts, Floats, entropy
from profiler.schema import RoutingChunk


class TransitionCounts:
    """Mergeable counts for hops 1..H; entry [k-1, n] pairs layer n with layer n+k and is zero where n+k is past the end.

    pairs `[H, L, E, E]`: tokens for which expert i is selected at n and expert j at n+k, over all K x K pairs.
    strongest `[H, L, E, E]`: the same for the experts of largest weight only, one pair per token.
    The strongest experts themselves are kept (one or two bytes per token and layer), because the control permutes tokens
    over the whole trace: `shuffled_counts`.
    """

    def __init__(self, layers: int, num_experts: int, hops: int) -> None:
        shape = (hops, layers, num_experts, num_experts)
        self.pairs: Counts = np.zeros(shape, dtype=np.int64)
        self.strongest: Counts = np.zeros(shape, dtype=np.int64)
        self.tokens = 0
        self._strongest_ids: list[npt.NDArray[Any]] = []

    def update(self, chunk: RoutingChunk) -> None:
        """Count one chunk."""
        hops, layers, experts, _ = self.pairs.shape
        ids_TLK = chunk.expert_ids_TLK.astype(np.int64)
        self._strongest_ids.append(chunk.expert_ids_TLK[:, :, 0].copy())
        for hop in range(1, hops + 1):
            for layer in range(layers - hop):
                here_TK, there_TK = ids_TLK[:, layer], ids_TLK[:, layer + hop]
                at = hop - 1, layer
                self.pairs[at] += _count(here_TK[:, :, None], there_TK[:, None, :], experts)
                self.strongest[at] += _count(here_TK[:, 0], there_TK[:, 0], experts)
        self.tokens += len(chunk)

    def merge(self, other: Self) -> None:
        """Add the counts of another part of the same trace."""
        self.pairs += other.pairs
        self.strongest += other.strongest
        self.tokens += other.tokens
        self._strongest_ids += other._strongest_ids

    def shuffled_counts(self, hop: int, seed: int) -> Counts:
        """As `strongest` for one hop `[L - hop, E, E]`, with the tokens at the later layer permuted over the whole trace.

        It keeps the loads of both layers and destroys the link.
        """
        _, layers, experts, _ = self.pairs.shape
        ids_TL = np.concatenate(self._strongest_ids)
        random = np.random.default_rng((seed, hop))
        return np.stack(
            [
                _count(ids_TL[:, layer].astype(np.int64), random.permutation(ids_TL[:, layer + hop]), experts)
                for layer in range(layers - hop)
            ]
        )


@dataclass(frozen=True)
class HopStatistics:
    """One hop, from each layer n to n+hop; arrays over the L - hop starting layers.

    information_bits: mutual information of the strongest experts at n and n+hop, Miller-Madow corrected.
    information_shuffled_bits: the same on permuted tokens; what remains of the estimator's bias and noise.
    conditional_top1: how often the most frequent strongest expert at n+hop, given the strongest at n, is right, on the
    same tokens that were counted. marginal_top1: the same without knowing n (popularity). Chance is 1/E.
    same_expert: how often the strongest expert has the same index at n and n+hop.
    """

    hop: int
    information_bits: Floats
    information_shuffled_bits: Floats
    conditional_top1: Floats
    marginal_top1: Floats
    same_expert: Floats


def hop_statistics(counts: TransitionCounts, hop: int, seed: int = 0) -> HopStatistics:
    """Statistics of hop `hop` (1..H). seed: for the shuffled control."""
    layers = counts.strongest.shape[1] - hop
    strongest_NEE = counts.strongest[hop - 1, :layers]
    total = max(counts.tokens, 1)
    return HopStatistics(
        hop=hop,
        information_bits=mutual_information(strongest_NEE),
        information_shuffled_bits=mutual_information(counts.shuffled_counts(hop, seed)),
        conditional_top1=strongest_NEE.max(2).sum(1) / total,
        marginal_top1=strongest_NEE.sum(1).max(1) / total,
        same_expert=np.trace(strongest_NEE, axis1=1, axis2=2) / total,
    )


def transition_probabilities(pair_counts: Counts) -> Floats:
    """P(expert j at layer n+k | expert i at layer n) from pair counts `[..., E, E]`: rows sum to 1, or 0 if i is unused.

    With K > 1 it is the chance that a random one of the K selected experts at n+k is j, given that i is selected at n.
    """
    rows = pair_counts.sum(-1, keepdims=True)
    return np.asarray(np.divide(pair_counts, rows, out=np.zeros(pair_counts.shape), where=rows > 0))


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


def _count(here: npt.NDArray[Any], there: npt.NDArray[Any], experts: int) -> Counts:
    """How often each pair occurs `[E, E]`; empty slots (id E) make no pair."""
    ids = experts + 1
    counts = np.bincount((here * ids + there).reshape(-1), minlength=ids * ids).reshape(ids, ids)
    return counts[:experts, :experts]
