"""Counts over the tokens of a problem: repetition at a distance, and reuse of experts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.counts.accumulator import Accumulator, Counts
from analysis.counts.frames import Frame
from analysis.counts.kernels import as_bits, as_input, count_repetition, count_reuse, end_segment
from analysis.counts.survey import Axes

DISTANCES = (1, 2, 3, 4, 8, 16, 32, 64)
SEGMENT = 32
GAP_BUCKETS = 32


class RepetitionCounts(Accumulator):
    """Comparison of each token with the tokens `DISTANCES` earlier in the same problem, by dataset.

    same `[Q, N, L, 3]`: first choice repeated; first or second choice repeated, as in Mixtral's Table 5 (the two strongest
    experts of both tokens have one in common); number of experts in common. seen `[Q, N, L]`: number of comparisons. first
    `[Q, L, E + 1]`: first choices, from which, with pairs and load, the values expected for random tokens are computed.
    """

    added = ("same", "seen", "first")

    def __init__(self, axes: Axes) -> None:
        shape = (len(axes.datasets), len(DISTANCES), axes.layers)
        self.same: Counts = np.zeros((*shape, 3), dtype=np.int64)
        self.seen: Counts = np.zeros(shape, dtype=np.int64)
        self.first: Counts = np.zeros((len(axes.datasets), axes.layers, axes.num_experts + 1), dtype=np.int64)
        # The last tokens of earlier frames: ids, problem, position and dataset.
        self._before: list[npt.NDArray[Any]] = []

    def update(self, frame: Frame) -> None:
        """Count a frame."""
        ids_TLK = frame.chunk.expert_ids_TLK
        experts = self.first.shape[2] - 1
        for dataset in np.unique(frame.dataset_T).tolist():
            first_TL = ids_TLK[frame.dataset_T == dataset, :, 0]
            for layer in range(first_TL.shape[1]):
                self.first[dataset, layer] += np.bincount(first_TL[:, layer], minlength=experts + 1)
        columns: list[npt.NDArray[Any]] = [ids_TLK, frame.chunk.problem_ids_T, frame.chunk.token_ids_T, frame.dataset_T]
        skip = 0
        if self._before:
            skip = len(self._before[0])
            columns = [as_input(np.concatenate(both)) for both in zip(self._before, columns, strict=True)]
        ids_TLK, problem_T, position_T, dataset_T = columns
        bits = [as_bits(ids_TLK, most, experts) for most in (ids_TLK.shape[2], 2)]
        count_repetition(
            ids_TLK, *bits, problem_T, position_T, dataset_T, skip, np.array(DISTANCES), experts, self.same, self.seen
        )
        self._before = [column[-max(DISTANCES) :].copy() for column in columns]


class ReuseCounts(Accumulator):
    """Uses of experts after an earlier use in the same problem and layer; see `kernels.count_reuse`.

    gaps `[L, 32]`, between `[L, E]`, cold `[L]`, segments `[L, 5]`. lengths: number of problems by number of recorded tokens.
    """

    added = ("gaps", "between", "cold", "segments")

    def __init__(self, axes: Axes) -> None:
        shape = (axes.layers, axes.num_experts)
        self.gaps: Counts = np.zeros((axes.layers, GAP_BUCKETS), dtype=np.int64)
        self.between: Counts = np.zeros(shape, dtype=np.int64)
        self.cold: Counts = np.zeros(axes.layers, dtype=np.int64)
        self.segments: Counts = np.zeros((axes.layers, 5), dtype=np.int64)
        self.lengths: Counter[int] = Counter()
        self._state = np.array([SEGMENT, -1, 0, 0, 0, 0, 0, 0], dtype=np.int64)
        self._last = np.full(shape, -1, dtype=np.int64)
        self._current, self._previous = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)

    def update(self, frame: Frame) -> None:
        """Count a frame."""
        chunk = frame.chunk
        lengths_T = np.zeros(len(chunk), dtype=np.int64)
        count_reuse(
            chunk.expert_ids_TLK,
            chunk.problem_ids_T,
            chunk.token_ids_T,
            self._state,
            self._last,
            self._current,
            self._previous,
            self.gaps,
            self.between,
            self.cold,
            lengths_T,
            self.segments,
        )
        self.lengths.update(lengths_T[lengths_T > 0].tolist())

    def close(self) -> None:
        """Finish the last problem."""
        if self._state[1] >= 0:
            self.lengths[int(self._state[7])] += 1
            end_segment(self._state, self._current, self._previous, self.segments)
        self._state[1] = -1

    def merge(self, other: ReuseCounts) -> None:
        """Add the counts of another part."""
        super().merge(other)
        self.lengths.update(other.lengths)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The complete state as arrays."""
        return super().state() | {"lengths": np.array(sorted(self.lengths.items()), dtype=np.int64).reshape(-1, 2)}

    def restore(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Load the arrays of `state`."""
        super().restore(state)
        self.lengths = Counter(dict(state["lengths"].tolist()))
