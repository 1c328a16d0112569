"""Count the routing of a running engine: pure functions of labeled rows, mergeable counts, and a rolling window of them.

Shapes: T rows (tokens), L MoE layers, K experts per token, E experts, S steps (forward passes).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from profiler.live.metrics import (
    BUSIEST,
    ENTROPY,
    MAX_OVER_MEAN,
    MOST_STEP_EXPERTS,
    REPEATED,
    STEP_EXPERTS,
    STEP_KINDS,
    Samples,
)

Counts = npt.NDArray[np.int64]

# Cells of the table of one pass over some steps: steps x layers x experts. 16 MiB.
MAX_CELLS = 1 << 21
# The window moves in this many parts.
PARTS = 12


@dataclass
class RoutingCounts:
    """Counts of some steps, which can be merged. All are int64; `_2` has an entry for each of `STEP_KINDS`.

    tokens: rows, `[]`. load_LE: rows that selected each expert. compared: rows whose previous position was counted, too, `[]`.
    repeated_L: experts that these rows have in common with that position. steps_2: steps. union_2L: distinct experts of each
    step, summed over steps. largest_2L: the same of the step that has the most.
    """

    tokens: Counts
    load_LE: Counts
    compared: Counts
    repeated_L: Counts
    steps_2: Counts
    union_2L: Counts
    largest_2L: Counts

    @classmethod
    def zeros(cls, layers: int, experts: int) -> Self:
        """Counts of nothing."""
        shapes: dict[str, tuple[int, ...]] = {
            "tokens": (),
            "load_LE": (layers, experts),
            "compared": (),
            "repeated_L": (layers,),
            "steps_2": (2,),
            "union_2L": (2, layers),
            "largest_2L": (2, layers),
        }
        return cls(**{name: np.zeros(shape, dtype=np.int64) for name, shape in shapes.items()})

    def add(self, other: Self) -> None:
        """Add the counts of other steps."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            (np.maximum if field.name == "largest_2L" else np.add)(mine, theirs, out=mine)

    def samples(self, samples: Samples, moe_layers: list[int], top_k: int, over: str) -> None:
        """Add the metrics of these counts. Those of layers or kinds of steps that have no tokens are left out.

        moe_layers: decoder layer index of each of the L MoE layers. over: the metrics' label.
        """
        selections_L = self.load_LE.sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            share_LE = self.load_LE / selections_L[:, None]
            samples.add_layers(ENTROPY, moe_layers, entropy_share(share_LE).tolist(), over)
            samples.add_layers(MAX_OVER_MEAN, moe_layers, (share_LE.max(1) * share_LE.shape[1]).tolist(), over)
            samples.add_layers(BUSIEST, moe_layers, share_LE.max(1).tolist(), over)
            samples.add_layers(REPEATED, moe_layers, (self.repeated_L / (self.compared * top_k)).tolist(), over)
            mean_2L = self.union_2L / self.steps_2[:, None]
        for number, kind in enumerate(STEP_KINDS):
            if self.steps_2[number]:
                samples.add_layers(STEP_EXPERTS, moe_layers, mean_2L[number].tolist(), kind, over)
                samples.add_layers(MOST_STEP_EXPERTS, moe_layers, self.largest_2L[number].tolist(), kind, over)


def entropy_share(share_LE: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The entropy of each row divided by log2(E): 1 for even load; `nan` for a row of `nan`. With one expert, 1."""
    experts = share_LE.shape[1]
    logs = np.log2(share_LE, where=share_LE > 0, out=np.zeros_like(share_LE))
    # Adding 0.0 turns the -0.0 of a certain outcome into 0.0.
    bits_L = -(share_LE * logs).sum(1) + 0.0
    return np.asarray(bits_L / np.log2(experts) if experts > 1 else bits_L + 1)


class RowCounter:
    """Counts labeled rows, batch after batch. It remembers the last row of each running request.

    Args:
        layers: L.
        experts: E.
        top_k: K.
    """

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        self._shape = layers, experts
        self._last_numbers_R: npt.NDArray[np.int32] = np.empty(0, dtype=np.int32)
        self._last_positions_R: npt.NDArray[np.int32] = np.empty(0, dtype=np.int32)
        # Joined with the ids of any integer type, it takes theirs.
        self._last_ids_RLK: npt.NDArray[Any] = np.empty((0, layers, top_k), dtype=np.int8)

    def count(
        self,
        numbers_T: npt.NDArray[np.int32],
        positions_T: npt.NDArray[np.int32],
        ids_TLK: npt.NDArray[np.integer[Any]],
        rows_S: Counts,
        is_decode_S: npt.NDArray[np.bool_],
    ) -> RoutingCounts:
        """Count the rows of consecutive steps.

        Args:
            numbers_T: The request of each row; -1 if it is unknown.
            positions_T: The position of each row in its sequence.
            ids_TLK: Selected experts, 0 to E - 1.
            rows_S: Rows of each step, above 0.
            is_decode_S: Whether each sequence has one row in the step.
        """
        counts = RoutingCounts.zeros(*self._shape)
        counts.tokens += len(ids_TLK)
        self._count_load(counts, ids_TLK, rows_S, is_decode_S)
        self._count_repeats(counts, numbers_T, positions_T, ids_TLK)
        return counts

    def forget(self, finished: list[int]) -> None:
        """Free the last rows of requests that have no rows any more."""
        if finished:
            self._keep(
                ~np.isin(self._last_numbers_R, finished), self._last_numbers_R, self._last_positions_R, self._last_ids_RLK
            )

    def _count_load(
        self, counts: RoutingCounts, ids_TLK: npt.NDArray[Any], rows_S: Counts, is_decode_S: npt.NDArray[np.bool_]
    ) -> None:
        layers, experts = self._shape
        at_once = max(1, MAX_CELLS // (layers * experts))
        ends_S = np.cumsum(rows_S)
        for first in range(0, len(rows_S), at_once):
            of_steps = slice(first, first + at_once)
            rows_s = rows_S[of_steps]
            begin = int(ends_S[first] - rows_S[first])
            ids_tLK = ids_TLK[begin : begin + int(rows_s.sum())]
            step_t = np.repeat(np.arange(len(rows_s)), rows_s)
            cells_tLK = (step_t[:, None] * layers + np.arange(layers))[:, :, None] * experts + ids_tLK
            size = len(rows_s) * layers * experts
            counts_sLE = np.bincount(cells_tLK.reshape(-1), minlength=size).reshape(len(rows_s), layers, experts)
            counts.load_LE += counts_sLE.sum(0)
            union_sL = np.count_nonzero(counts_sLE, axis=2)
            for kind, is_kind_s in enumerate((is_decode_S[of_steps], ~is_decode_S[of_steps])):
                counts.steps_2[kind] += is_kind_s.sum()
                counts.union_2L[kind] += union_sL[is_kind_s].sum(0)
                np.maximum(counts.largest_2L[kind], union_sL[is_kind_s].max(0, initial=0), out=counts.largest_2L[kind])

    def _count_repeats(
        self,
        counts: RoutingCounts,
        numbers_T: npt.NDArray[np.int32],
        positions_T: npt.NDArray[np.int32],
        ids_TLK: npt.NDArray[Any],
    ) -> None:
        numbers_N = np.concatenate([self._last_numbers_R, numbers_T])
        positions_N = np.concatenate([self._last_positions_R, positions_T])
        # A stable sort keeps each request's rows in the order in which they were computed.
        order_N = np.argsort(numbers_N, kind="stable")
        numbers_N, positions_N = numbers_N[order_N], positions_N[order_N]
        ids_NLK = np.concatenate([self._last_ids_RLK, ids_TLK])[order_N]
        is_next_n = (numbers_N[1:] == numbers_N[:-1]) & (positions_N[1:] == positions_N[:-1] + 1) & (numbers_N[1:] >= 0)
        now_nLK, before_nLK = ids_NLK[1:][is_next_n], ids_NLK[:-1][is_next_n]
        counts.compared += len(now_nLK)
        top_k = ids_NLK.shape[2]
        for mine in range(top_k):
            for other in range(top_k):
                counts.repeated_L += np.count_nonzero(now_nLK[:, :, mine] == before_nLK[:, :, other], axis=0)
        is_last_N = np.append(numbers_N[1:] != numbers_N[:-1], True)
        self._keep(is_last_N & (numbers_N >= 0), numbers_N, positions_N, ids_NLK)

    def _keep(
        self,
        is_kept_N: npt.NDArray[np.bool_],
        numbers_N: npt.NDArray[np.int32],
        positions_N: npt.NDArray[np.int32],
        ids_NLK: npt.NDArray[Any],
    ) -> None:
        self._last_numbers_R, self._last_positions_R = numbers_N[is_kept_N], positions_N[is_kept_N]
        self._last_ids_RLK = ids_NLK[is_kept_N]


class RollingCounts:
    """Counts of the last seconds. The window moves in `PARTS` parts, so it covers between 11/12 and all of `seconds`.

    Args:
        layers, experts: L and E.
        seconds: Length of the window.
    """

    def __init__(self, layers: int, experts: int, seconds: float) -> None:
        self._shape = layers, experts
        self._part_seconds = seconds / PARTS
        self._parts: deque[tuple[int, RoutingCounts]] = deque()

    def add(self, counts: RoutingCounts, now: float) -> None:
        """Add counts at a time, in seconds on a clock that never goes back."""
        part = self._expire(now)
        if not self._parts or self._parts[-1][0] != part:
            self._parts.append((part, RoutingCounts.zeros(*self._shape)))
        self._parts[-1][1].add(counts)

    def total(self, now: float) -> RoutingCounts:
        """The counts of the window that ends now."""
        self._expire(now)
        total = RoutingCounts.zeros(*self._shape)
        for _, counts in self._parts:
            total.add(counts)
        return total

    def _expire(self, now: float) -> int:
        part = int(now // self._part_seconds)
        while self._parts and self._parts[0][0] <= part - PARTS:
            self._parts.popleft()
        return part
