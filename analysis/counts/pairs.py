"""Counts of the experts that a token uses together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.counts.accumulator import Accumulator, Counts
from analysis.counts.frames import Frame
from analysis.counts.kernels import as_input, count_pairs, hash_sets
from analysis.counts.survey import Axes

# Hashes kept per layer: counts are exact up to this many sets, with 1/sqrt(16382) = 0.8 % standard error beyond.
SKETCH = 1 << 14
LEADING_BYTES = 32 << 20
# Cells of the pair tables; beyond this (48 layers of 512 experts, say) pairs are not counted.
MAX_CELLS = 8_000_000


@dataclass(frozen=True)
class LeadingPairs:
    """pairs_LEE: tokens whose two strongest experts are this pair; symmetric. members_LE: tokens with the expert among them."""

    pairs_LEE: Counts
    members_LE: Counts


class PairCounts(Accumulator):
    """together `[L, E, E]`: tokens that use both experts; leading: tokens whose two strongest experts they are, by dataset.

    Both are symmetric, with zeros on the diagonal. Distinct sets are counted by a k-minimum-values sketch of their hashes
    (Bar-Yossef et al., 2002), which does not depend on the order of the sets or on how the trace is divided into parts.
    """

    added = ("one_way", "leading_one_way", "tokens")

    def __init__(self, axes: Axes) -> None:
        self.fits = axes.layers * axes.num_experts**2 <= MAX_CELLS
        shape = (axes.layers, axes.num_experts + 1, axes.num_experts + 1) if self.fits else (axes.layers, 1, 1)
        # Each pair once, in the order of its weights, with a row and a column for empty slots.
        self.one_way: Counts = np.zeros(shape, dtype=np.uint32)
        # If the tables by dataset would be too large, all datasets share one.
        self.by_dataset = len(axes.datasets) * shape[0] * shape[1] ** 2 * 4 <= LEADING_BYTES
        self.leading_one_way: Counts = np.zeros((len(axes.datasets) if self.by_dataset else 1, *shape), dtype=np.uint32)
        self.tokens: Counts = np.zeros(1, dtype=np.int64)
        self.sketches: list[npt.NDArray[np.uint64]] = [np.empty(0, dtype=np.uint64) for _ in range(axes.layers)]
        self._experts, self._top_k, self._datasets = axes.num_experts, axes.top_k, len(axes.datasets)

    @property
    def together(self) -> Counts:
        """All pairs, symmetric `[L, E, E]`."""
        one_way = self.one_way[:, :-1, :-1].astype(np.int64)
        return np.asarray(one_way + one_way.transpose(0, 2, 1))

    def leading(self, datasets: list[int]) -> LeadingPairs | None:
        """Pairs of the two strongest experts in some datasets; None if they were not counted, or not by dataset."""
        if not self.fits:
            return None
        if not self.by_dataset:
            if len(datasets) < self._datasets:
                return None
            datasets = [0]
        one_way = self.leading_one_way[datasets].sum(0, dtype=np.int64)
        both_ways = one_way + one_way.transpose(0, 2, 1)
        return LeadingPairs(both_ways[:, :-1, :-1], both_ways.sum(2)[:, :-1])

    def update(self, frame: Frame) -> None:
        """Count a frame."""
        ids_TLK = frame.chunk.expert_ids_TLK
        if self._top_k > 1 and self.fits:
            dataset_T = frame.dataset_T if self.by_dataset else as_input(np.zeros_like(frame.dataset_T))
            count_pairs(ids_TLK, dataset_T, self.one_way, self.leading_one_way)
        self.tokens += len(frame)
        hashes_TL = hash_sets(ids_TLK, self._experts)
        for layer, sketch in enumerate(self.sketches):
            hashes_T = hashes_TL[:, layer]
            if len(sketch) == SKETCH:
                hashes_T = hashes_T[hashes_T < sketch[-1]]
            self.sketches[layer] = _smallest(sketch, hashes_T)

    def merge(self, other: PairCounts) -> None:
        """Add the counts of another part."""
        super().merge(other)
        self.sketches = [_smallest(a, b) for a, b in zip(self.sketches, other.sketches, strict=True)]

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The complete state as arrays."""
        lengths = np.array([len(sketch) for sketch in self.sketches])
        return super().state() | {"sketch_lengths": lengths, "sketches": np.concatenate(self.sketches)}

    def restore(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Load the arrays of `state`."""
        super().restore(state)
        self.sketches = np.split(state["sketches"], np.cumsum(state["sketch_lengths"])[:-1])


def _smallest(first: npt.NDArray[np.uint64], second: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The SKETCH smallest distinct values, ascending."""
    values = np.sort(np.concatenate([first, second]))
    is_new = np.ones(len(values), dtype=np.bool_)
    is_new[1:] = values[1:] != values[:-1]
    return np.asarray(values[is_new][:SKETCH])
