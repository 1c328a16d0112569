"""Counts of the experts that follow each expert, one to several layers later."""

from __future__ import annotations

import numpy as np

from analysis.counts.accumulator import Accumulator, Counts
from analysis.counts.frames import Frame
from analysis.counts.kernels import count_transitions
from analysis.counts.survey import Axes

FOLDS = 2


class TransitionCounts(Accumulator):
    """Counts for hops 1..H; entry [f, k-1, n] pairs layer n with layer n+k and is zero if n+k is past the last layer.

    pairs `[F, H, L, E, E]`: tokens that select expert i at n and expert j at n+k, over all K x K pairs. strongest
    `[F, H, L, E, E]`: the same for the strongest experts only, one pair per token. F: the two folds of problems. uint32 holds
    4 x 10^9 tokens in half the memory of int64.
    """

    added = ("all_pairs", "all_strongest")

    def __init__(self, axes: Axes) -> None:
        shape = (FOLDS, axes.hops, axes.layers, axes.num_experts + 1, axes.num_experts + 1)
        # With a row and a column for empty slots.
        self.all_pairs: Counts = np.zeros(shape, dtype=np.uint32)
        self.all_strongest: Counts = np.zeros(shape, dtype=np.uint32)

    @property
    def pairs(self) -> Counts:
        """Pairs of selected experts, without empty slots."""
        return self.all_pairs[..., :-1, :-1]

    @property
    def strongest(self) -> Counts:
        """Pairs of strongest experts, without empty slots."""
        return self.all_strongest[..., :-1, :-1]

    def update(self, frame: Frame) -> None:
        """Count a frame."""
        count_transitions(frame.chunk.expert_ids_TLK, frame.fold_T, self.all_pairs, self.all_strongest)


def transition_bytes(layers: int, experts: int, hops: int) -> int:
    """Size of the tables of `TransitionCounts` in bytes."""
    return 2 * FOLDS * hops * layers * (experts + 1) ** 2 * 4
