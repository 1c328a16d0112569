"""What each captured request read: the check that a sequence gets the rows of its own tokens, and of no other request."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from profiler.capture.requests import Sequence, iterate_requests
from profiler.capture.sealing import Source, run_folder, runs_of
from profiler.errors import TraceError
from profiler.trace.stream import INPUTS_LAYOUT, INPUTS_STREAM, read_blocks


class CapturedInputs:
    """The vocabulary ids that one run's requests read, by request number and position: 8 bytes per captured token.

    Of a position that was computed more than once, the last one counts, as in the sealed trace: the rows of rejected draft
    tokens, and those from before a preemption, are replaced. Other engines do not record these ids.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / INPUTS_STREAM
        counts: Counter[int] = Counter()
        for numbers_T, _, _ in read_blocks(self._path, INPUTS_LAYOUT):
            numbers, rows = np.unique(numbers_T, return_counts=True)
            counts.update(dict(zip(numbers.tolist(), rows.tolist(), strict=True)))
        # Request numbers `[R]`, and where the rows of each begin. They are placed by request, not sorted: that takes no copy.
        self._numbers_R = np.array(sorted(counts), dtype=np.int32)
        self._starts_R = np.cumsum([0, *(counts[number] for number in self._numbers_R.tolist())])
        self._positions_N = np.empty(self._starts_R[-1], dtype=np.int32)
        self._vocab_N = np.empty(self._starts_R[-1], dtype=np.int32)
        self._place_rows()

    def _place_rows(self) -> None:
        """Copy each request's rows, in the order in which they were written, to its part of the arrays."""
        free_R = self._starts_R[:-1].copy()
        for numbers_T, positions_T, values in read_blocks(self._path, INPUTS_LAYOUT):
            order_T = np.argsort(numbers_T, kind="stable")
            numbers, starts, counts = np.unique(numbers_T[order_T], return_index=True, return_counts=True)
            here = np.searchsorted(self._numbers_R, numbers)
            at_T = np.arange(len(order_T)) + np.repeat(free_R[here] - starts, counts)
            self._positions_N[at_T] = positions_T[order_T]
            self._vocab_N[at_T] = values["vocab_ids"].reshape(-1)[order_T]
            free_R[here] += counts

    @property
    def known(self) -> bool:
        """Whether this run has recorded what its requests read."""
        return len(self._vocab_N) > 0

    def _part(self, number: int) -> slice:
        """Where the rows of a request are, in the order in which they were written."""
        at = int(np.searchsorted(self._numbers_R, number))
        if at == len(self._numbers_R) or self._numbers_R[at] != number:
            return slice(0, 0)
        return slice(int(self._starts_R[at]), int(self._starts_R[at + 1]))

    def _of(self, number: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """The positions of a request that were captured `[T]`, ascending and distinct, and the vocabulary ids read there."""
        mine = self._part(number)
        positions_T, vocab_T = self._positions_N[mine], self._vocab_N[mine]
        if (np.diff(positions_T) <= 0).any():
            order_T = np.argsort(positions_T, kind="stable")
            # The sort is stable: among equal positions, the last was computed last.
            order_T = order_T[np.append(np.diff(positions_T[order_T]) > 0, True)]
            positions_T, vocab_T = positions_T[order_T], vocab_T[order_T]
        return positions_T, vocab_T

    def has_read(self, number: int, token_ids: list[int]) -> bool:
        """Whether request `number` read all of `token_ids` but the last, except for those that came from a prefix cache.

        A draft token that was rejected does not count, also if it was the last one that the request read at its position.
        """
        last = max(len(token_ids) - 2, 0)
        positions_T = self._positions_N[self._part(number)]
        at_T = np.flatnonzero(positions_T == last)
        # When a draft token has been rejected, the position of an earlier one is computed again.
        reached = len(at_T) > 0 and bool((positions_T[at_T[-1] :] >= last).all())
        return reached and self.difference(number, token_ids) is None

    def difference(self, number: int, token_ids: list[int], *, last: bool = False) -> tuple[int, int] | None:
        """The first position at which request `number` read another token than `token_ids`, and that token; None if none did.

        Positions that were not captured cannot differ. The last token is compared only with `last`: an engine that schedules
        ahead reads it, but at its position may also be a draft token that was rejected.
        """
        positions_T, vocab_T = self._of(number)
        end = int(np.searchsorted(positions_T, max(len(token_ids) - (not last), 0)))
        positions_T, vocab_T = positions_T[:end], vocab_T[:end]
        expected_T = np.asarray(token_ids, dtype=np.int32)[positions_T]
        differs = np.flatnonzero((vocab_T != expected_T) & (vocab_T >= 0))
        return None if not len(differs) else (int(positions_T[differs[0]]), int(vocab_T[differs[0]]))


def check_sequences(directory: Path, sequences: Iterable[Sequence], inputs: dict[int, CapturedInputs] | None = None) -> None:
    """Raise `TraceError`, naming the first problem, unless `find_faults` finds nothing."""
    for _, fault in find_faults(directory, sequences, inputs):
        raise TraceError(f"{directory}: {fault}; what was captured is kept")


def find_faults(
    directory: Path, sequences: Iterable[Sequence], inputs: dict[int, CapturedInputs] | None = None
) -> Iterator[tuple[Sequence, str]]:
    """The sequences that have no request of their own, with their prompt, which read their tokens; and what is wrong.

    inputs: what the requests of a run read, by run, as far as it was read before.
    """
    sources: dict[Source, int] = {}
    by_run: dict[int, list[Sequence]] = {}
    for sequence in sequences:
        if sequence.captured_as is None:
            continue
        other = sources.setdefault(sequence.captured_as, sequence.problem_id)
        if other != sequence.problem_id:
            yield (
                sequence,
                (
                    f"problems {other} and {sequence.problem_id} have the same captured request: "
                    "each request can be the routing of one problem only"
                ),
            )
        by_run.setdefault(sequence.captured_as[0], []).append(sequence)
    for run in runs_of(directory):
        if run in by_run:
            folder = run_folder(directory, run)
            known = None if inputs is None else inputs.get(run)
            yield from _faults_of_run(folder, by_run[run], CapturedInputs(folder) if known is None else known)


def _faults_of_run(folder: Path, sequences: list[Sequence], inputs: CapturedInputs) -> Iterator[tuple[Sequence, str]]:
    by_number: defaultdict[int, list[Sequence]] = defaultdict(list)
    for sequence in sequences:
        assert sequence.captured_as is not None
        by_number[sequence.captured_as[1]].append(sequence)
    # One request in memory at a time: token ids as Python objects take far more memory than what was read.
    mistaken = {
        sequence.problem_id
        for request in iterate_requests(folder)
        for sequence in by_number.get(request.number, [])
        if sequence.prompt_token_ids != request.prompt_token_ids
    }
    for number, sequence in ((number, sequence) for number, found in by_number.items() for sequence in found):
        if sequence.problem_id in mistaken:
            yield (
                sequence,
                f"problem {sequence.problem_id} has another prompt than its request {number} of {folder.name}",
            )
            continue
        found = inputs.difference(number, sequence.prompt_token_ids + sequence.output_token_ids)
        if found is not None:
            position, vocab_id = found
            yield (
                sequence,
                (
                    f"problem {sequence.problem_id}: its request {number} of {folder.name} read token {vocab_id} at position "
                    f"{position}, expected {(sequence.prompt_token_ids + sequence.output_token_ids)[position]}"
                ),
            )
