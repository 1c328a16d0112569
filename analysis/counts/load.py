"""Counts of how often each expert is used, by layer, dataset and phase, and by blocks of problems."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.counts.accumulator import Accumulator, Counts, Floats
from analysis.counts.frames import PHASES, Frame
from analysis.counts.kernels import HALVES, as_input, count_load
from analysis.counts.survey import Axes
from profiler.errors import TraceError

# Limit on the counters of the runs that are counted together.
RUN_BYTES = 32 << 20
NO_WEIGHTS = as_input(np.empty((0, 1, 1), dtype=np.uint16))


class LoadCounts(Accumulator):
    """counts, mass `[Q, 3, L, E]`: selections and sums of weights per dataset, phase (`PHASES`), layer and expert.

    tokens `[Q, 3]`. Sums of float16 weights are exact in float64 up to some 10^8 tokens. blocks: the selections of each
    problem, or block of problems.
    """

    added = ("counts", "mass", "tokens")

    def __init__(self, axes: Axes) -> None:
        shape = (len(axes.datasets), len(PHASES), axes.layers, axes.num_experts)
        self.counts: Counts = np.zeros(shape, dtype=np.int64)
        self.mass: Floats = np.zeros(shape)
        self.tokens: Counts = np.zeros(shape[:2], dtype=np.int64)
        self.blocks = ProblemBlocks(axes)

    def update(self, frame: Frame) -> None:
        """Count a frame, in batches of runs of tokens: with many short problems, one table for all would be large."""
        _, _, layers, experts = self.counts.shape
        problem_T = frame.chunk.problem_ids_T
        run_T = np.cumsum((np.diff(problem_T, prepend=-1) != 0) | (np.diff(frame.phase_T, prepend=-1) != 0)) - 1
        at_a_time = max(1, RUN_BYTES // (layers * experts * 12))
        for first in range(0, int(run_T[-1]) + 1, at_a_time):
            begin, end = np.searchsorted(run_T, [first, first + at_a_time])
            self._update(frame.take(slice(int(begin), int(end))), run_T[begin:end] - first)

    def _update(self, frame: Frame, run_T: npt.NDArray[np.int64]) -> None:
        _, _, layers, experts = self.counts.shape
        runs = int(run_T[-1]) + 1
        counts_RLE = np.zeros((runs, layers, experts), dtype=np.uint32)
        mass_RLE = np.zeros((runs, layers, experts))
        weights = frame.chunk.weights_TLK
        bits = NO_WEIGHTS if weights is None else weights.view(np.uint16)
        count_load(frame.chunk.expert_ids_TLK, bits, HALVES, run_T, counts_RLE, mass_RLE)
        starts_R = np.searchsorted(run_T, np.arange(runs))
        dataset_R, phase_R = frame.dataset_T[starts_R], frame.phase_T[starts_R]
        kind_T = frame.dataset_T * len(PHASES) + frame.phase_T
        self.tokens += np.bincount(kind_T, minlength=self.tokens.size).reshape(self.tokens.shape)
        for dataset, phase in {(int(d), int(p)) for d, p in zip(dataset_R, phase_R, strict=True)}:
            chosen_R = (dataset_R == dataset) & (phase_R == phase)
            self.counts[dataset, phase] += counts_RLE[chosen_R].sum(0, dtype=np.int64)
            self.mass[dataset, phase] += mass_RLE[chosen_R].sum(0)
        self.blocks.add(frame.chunk.problem_ids_T[starts_R], dataset_R, counts_RLE)

    def merge(self, other: LoadCounts) -> None:
        """Add the counts of another part."""
        super().merge(other)
        self.blocks.merge(other.blocks)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The complete state as arrays."""
        return super().state() | self.blocks.state()

    def restore(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Load the arrays of `state`."""
        super().restore(state)
        self.blocks.restore(state)


class ProblemBlocks:
    """Selections `[L, E]` per block of problems, from which bootstrap intervals and permutation controls are drawn.

    problems `[Q]`: number of problems of each dataset. A block is a single problem as long as all fit into memory. Otherwise
    the problems of a dataset whose ids are equal modulo a power of two form one block, and the power is halved until the blocks
    fit. It depends only on the set of problems, so it is the same however the trace was divided into parts.
    """

    MAX_BYTES = 48 << 20

    def __init__(self, axes: Axes) -> None:
        self.shape = (axes.layers, axes.num_experts)
        self._most = max(64, self.MAX_BYTES // self.bytes_of(axes))
        self.modulus = 1 << 31
        self.problems: Counts = np.zeros(len(axes.datasets), dtype=np.int64)
        self._last = -1
        self.counts: dict[tuple[int, int], npt.NDArray[np.uint32]] = {}

    @staticmethod
    def bytes_of(axes: Axes) -> int:
        """Size of one block, including some hundred bytes for its dictionary entry."""
        return 4 * axes.layers * axes.num_experts + 400

    def add(self, problem_ids_R: npt.NDArray[Any], dataset_R: npt.NDArray[Any], counts_RLE: npt.NDArray[np.uint32]) -> None:
        """Add the selections of runs of tokens."""
        is_new_R = np.diff(problem_ids_R.astype(np.int64), prepend=self._last) != 0
        self.problems += np.bincount(dataset_R[is_new_R], minlength=len(self.problems))
        self._last = int(problem_ids_R[-1])
        for problem_id, dataset, counts_LE in zip(problem_ids_R.tolist(), dataset_R.tolist(), counts_RLE, strict=True):
            self._add((dataset, problem_id % self.modulus), counts_LE.copy())
            self._fit()

    def merge(self, other: ProblemBlocks) -> None:
        """Add the blocks of another part."""
        self.problems += other.problems
        self.modulus = min(self.modulus, other.modulus)
        self._fold()
        for (dataset, block), counts_LE in other.counts.items():
            self._add((dataset, block % self.modulus), counts_LE.copy())
            self._fit()

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The complete state as arrays."""
        keys = sorted(self.counts)
        stacked = np.stack([self.counts[key] for key in keys]) if keys else np.empty((0, *self.shape), dtype=np.uint32)
        return {
            "block_keys": np.array(keys, dtype=np.int64).reshape(-1, 2),
            "block_counts": stacked,
            "block_modulus": np.array(self.modulus),
            "block_problems": self.problems,
        }

    def restore(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Load the arrays of `state`."""
        self.modulus = int(state["block_modulus"])
        keys, stacked = state["block_keys"].tolist(), state["block_counts"]
        if (stacked.shape[1:], str(stacked.dtype), len(state["block_problems"])) != (self.shape, "uint32", len(self.problems)):
            raise TraceError(f"stored counts of another analysis: blocks of {stacked.shape[1:]}, expected {self.shape}")
        self.problems = state["block_problems"]
        self.counts = {(dataset, block): counts_LE for (dataset, block), counts_LE in zip(keys, stacked, strict=True)}

    def _add(self, key: tuple[int, int], counts_LE: npt.NDArray[np.uint32]) -> None:
        known = self.counts.get(key)
        if known is None:
            self.counts[key] = counts_LE
        else:
            known += counts_LE

    def _fit(self) -> None:
        while len(self.counts) > self._most and self.modulus > 1:
            self.modulus //= 2
            self._fold()

    def _fold(self) -> None:
        blocks, self.counts = self.counts, {}
        for (dataset, block), counts_LE in blocks.items():
            self._add((dataset, block % self.modulus), counts_LE)


def count_experts(expert_ids_TLK: npt.NDArray[Any], num_experts: int) -> Counts:
    """Selections per layer and expert `[L, E]` of an array of tokens; empty slots (id E) are not counted."""
    counts_1LE = np.zeros((1, expert_ids_TLK.shape[1], num_experts), dtype=np.uint32)
    run_T = np.zeros(len(expert_ids_TLK), dtype=np.int64)
    count_load(as_input(expert_ids_TLK), NO_WEIGHTS, HALVES, run_T, counts_1LE, np.zeros((1, 1, 1)))
    return np.asarray(counts_1LE[0].astype(np.int64))
