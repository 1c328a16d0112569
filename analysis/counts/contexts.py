"""Counts of the experts selected in simple contexts, such as the strongest expert at the previous layer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from analysis.counts.accumulator import Accumulator, Counts
from analysis.counts.frames import Frame
from analysis.counts.kernels import as_input, count_in_context
from analysis.counts.survey import Axes
from analysis.counts.transitions import FOLDS

# Limit on the tables of one context; contexts that need more are left out.
CONTEXT_BYTES = 128 << 20

NO_CONTEXT = "nothing (popularity)"
PREVIOUS_LAYER = "strongest at the layer before"
TWO_LAYERS = "strongest at the two layers before"
TWO_OF_LAYER = "two strongest at the layer before"
PREVIOUS_TOKEN = "strongest of the token before, same layer"
TWO_OF_TOKEN = "two strongest of the token before, same layer"
LAYER_AND_TOKEN = "strongest at the layer before, and of the token before"
TOKEN = "the token itself"


class ContextCounts(Accumulator):
    """For each context: selected, strongest `[F, L, C, E + 1]` uint32, by fold of the problems, layer and value of the context.

    The last column counts empty slots.
    """

    def __init__(self, axes: Axes) -> None:
        experts = axes.num_experts
        sizes = {NO_CONTEXT: 1}
        if 2 * FOLDS * axes.layers * experts**2 * 4 <= CONTEXT_BYTES:
            sizes |= {PREVIOUS_LAYER: experts, PREVIOUS_TOKEN: experts}
        if axes.vocabulary:
            sizes[TOKEN] = len(axes.vocabulary) + 1
        pairs = [TWO_LAYERS, LAYER_AND_TOKEN]
        if axes.top_k > 1:
            pairs += [TWO_OF_LAYER, TWO_OF_TOKEN]
        if 2 * FOLDS * axes.layers * experts**3 * 4 <= CONTEXT_BYTES // len(pairs):
            sizes |= dict.fromkeys(pairs, experts**2)
        self.selected: dict[str, Counts] = {
            name: np.zeros((FOLDS, axes.layers, size, experts + 1), dtype=np.uint32) for name, size in sizes.items()
        }
        self.strongest: dict[str, Counts] = {name: np.zeros_like(counts) for name, counts in self.selected.items()}
        self._experts, self._top_k = experts, axes.top_k
        self._before: Frame | None = None

    def update(self, frame: Frame) -> None:
        """Count a frame."""
        for name, context_TL in self._contexts(frame).items():
            if name in self.selected:
                selected, strongest = self.selected[name], self.strongest[name]
                count_in_context(frame.chunk.expert_ids_TLK, frame.fold_T, as_input(context_TL), selected, strongest)
        self._before = frame.take(slice(-1, None))

    def tables(self) -> dict[str, npt.NDArray[np.uint32]]:
        """All tables of all contexts."""
        kinds = {"selected": self.selected, "strongest": self.strongest}
        return {f"{kind}: {name}": counts for kind, tables in kinds.items() for name, counts in tables.items()}

    def _contexts(self, frame: Frame) -> dict[str, npt.NDArray[np.int32]]:
        """The value of each context for each token and layer `[T, L]`; -1 where it is unknown."""
        chunk, experts = frame.chunk, self._experts
        strongest_TL = chunk.expert_ids_TLK[:, :, 0].astype(np.int32)
        strongest_TL[strongest_TL >= experts] = -1
        above_TL = _shifted(strongest_TL)
        earlier_TL = self._earlier(frame, strongest_TL, 0)
        contexts = {
            NO_CONTEXT: np.zeros_like(strongest_TL),
            PREVIOUS_LAYER: above_TL,
            TWO_LAYERS: _combined(above_TL, _shifted(above_TL), experts),
            PREVIOUS_TOKEN: earlier_TL,
            LAYER_AND_TOKEN: _combined(above_TL, earlier_TL, experts),
            TOKEN: np.broadcast_to(frame.vocab_T[:, None], strongest_TL.shape),
        }
        if self._top_k > 1:
            second_TL = chunk.expert_ids_TLK[:, :, 1].astype(np.int32)
            second_TL[second_TL >= experts] = -1
            contexts[TWO_OF_LAYER] = _combined(above_TL, _shifted(second_TL), experts)
            contexts[TWO_OF_TOKEN] = _combined(earlier_TL, self._earlier(frame, second_TL, 1), experts)
        return contexts

    def _earlier(self, frame: Frame, values_TL: npt.NDArray[np.int32], rank: int) -> npt.NDArray[np.int32]:
        """`values_TL` of the previous token; -1 at a problem's first token and after a gap."""
        problem_T, position_T = frame.chunk.problem_ids_T, frame.chunk.token_ids_T
        follows_T = np.zeros(len(frame), dtype=np.bool_)
        follows_T[1:] = (np.diff(problem_T) == 0) & (np.diff(position_T) == 1)
        earlier_TL = np.full_like(values_TL, -1)
        earlier_TL[1:] = values_TL[:-1]
        if self._before is not None:
            before = self._before.chunk
            if before.problem_ids_T[0] == problem_T[0] and before.token_ids_T[0] + 1 == position_T[0]:
                follows_T[0] = True
                values_L = before.expert_ids_TLK[0, :, rank].astype(np.int32)
                earlier_TL[0] = np.where(values_L < self._experts, values_L, -1)
        earlier_TL[~follows_T] = -1
        return earlier_TL


def _shifted(values_TL: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """The values of the previous layer; -1 at the first."""
    shifted = np.full_like(values_TL, -1)
    shifted[:, 1:] = values_TL[:, :-1]
    return shifted


def _combined(first: npt.NDArray[np.int32], second: npt.NDArray[np.int32], size: int) -> npt.NDArray[np.int32]:
    return np.where((first >= 0) & (second >= 0), first * size + second, -1).astype(np.int32)
