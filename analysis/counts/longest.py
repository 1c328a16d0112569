"""The routing of one problem, kept as it is: the longest one of a trace."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from analysis.counts.accumulator import Accumulator
from analysis.counts.frames import PHASES, Frame
from analysis.counts.survey import Axes
from profiler.errors import TraceError
from profiler.trace.schema import expert_dtype

# The first tokens of a problem that are kept: 4 MB with 60 layers and 8 experts per token.
MAX_TOKENS = 4096


class ProblemRoute(NamedTuple):
    """A problem's first MAX_TOKENS recorded tokens.

    number: its id, -1 for no problem. tokens: all its recorded tokens. positions_T: of the kept tokens in the sequence.
    phase_T: indices into `PHASES`. expert_ids_TLK: strongest first; E for empty slots.
    """

    number: int
    tokens: int
    positions_T: npt.NDArray[np.int32]
    phase_T: npt.NDArray[np.int8]
    expert_ids_TLK: npt.NDArray[Any]

    def with_tokens_of(self, frame: Frame) -> ProblemRoute:
        """The route continued by the tokens of a frame, all of this problem."""
        room = max(0, MAX_TOKENS - len(self.positions_T))
        return ProblemRoute(
            self.number,
            self.tokens + len(frame),
            np.concatenate([self.positions_T, frame.chunk.token_ids_T[:room].astype(np.int32)]),
            np.concatenate([self.phase_T, frame.phase_T[:room].astype(np.int8)]),
            np.concatenate([self.expert_ids_TLK, frame.chunk.expert_ids_TLK[:room]]),
        )

    def is_longer_than(self, other: ProblemRoute) -> bool:
        """Whether it has more tokens, or as many and the lower id, so that the longest does not depend on the order."""
        return (self.tokens, -self.number) > (other.tokens, -other.number)


class LongestProblem(Accumulator):
    """The route of the longest problem; of several as long, the one with the lowest id."""

    def __init__(self, axes: Axes) -> None:
        self._shape, self._experts = (axes.layers, axes.top_k), axes.num_experts
        self.route = self._current = self._empty(-1)

    def update(self, frame: Frame) -> None:
        """Keep the tokens of a frame, problem by problem."""
        problem_T = frame.chunk.problem_ids_T
        starts = [0, *(np.flatnonzero(np.diff(problem_T)) + 1).tolist(), len(frame)]
        for start, end in pairwise(starts):
            number = int(problem_T[start])
            if number != self._current.number:
                self.close()
                self._current = self._empty(number)
            self._current = self._current.with_tokens_of(frame.take(slice(start, end)))

    def close(self) -> None:
        """Finish the last problem."""
        if self._current.is_longer_than(self.route):
            self.route = self._current
        self._current = self._empty(-1)

    def merge(self, other: LongestProblem) -> None:
        """Keep the longer of both problems."""
        if other.route.is_longer_than(self.route):
            self.route = other.route

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The complete state as arrays."""
        route = self.route
        return {
            "problem": np.array([route.number, route.tokens], dtype=np.int64),
            "positions": route.positions_T,
            "phases": route.phase_T,
            "expert_ids": route.expert_ids_TLK,
        }

    def restore(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Load the arrays of `state`. Raises `TraceError` if they are not a route with these axes."""
        problem, positions_T, phase_T, ids_TLK = (state[name] for name in ("problem", "positions", "phases", "expert_ids"))
        tokens = len(positions_T)
        shapes = problem.shape, positions_T.shape, phase_T.shape, ids_TLK.shape, ids_TLK.dtype
        expected = (2,), (tokens,), (tokens,), (tokens, *self._shape), self._empty(-1).expert_ids_TLK.dtype
        is_known = not tokens or (ids_TLK.max() <= self._experts and phase_T.min() >= 0 and phase_T.max() < len(PHASES))
        if shapes != expected or tokens > MAX_TOKENS or not is_known:
            raise TraceError(f"stored counts of another analysis: a problem of shape {ids_TLK.shape}, expected {expected[3]}")
        self.route = ProblemRoute(int(problem[0]), int(problem[1]), positions_T, phase_T, ids_TLK)

    def _empty(self, number: int) -> ProblemRoute:
        no_ids = np.empty((0, *self._shape), dtype=expert_dtype(self._experts + 1))
        return ProblemRoute(number, 0, np.empty(0, np.int32), np.empty(0, np.int8), no_ids)
