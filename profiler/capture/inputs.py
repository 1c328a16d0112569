"""What each captured request read: the check that a sequence gets the rows of its own tokens, and of no other request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from profiler.capture.requests import Sequence, read_requests
from profiler.capture.sealing import Source, run_folder, runs_of
from profiler.errors import TraceError
from profiler.trace.stream import INPUTS_LAYOUT, INPUTS_STREAM, gather, read_index


class CapturedInputs:
    """The vocabulary ids that one run's requests read, by request number and position.

    Of a position that was computed more than once, the last one counts, as in the sealed trace: the rows of rejected draft
    tokens, and those from before a preemption, are replaced. Other engines do not record these ids.
    """

    def __init__(self, folder: Path) -> None:
        index = read_index(folder / INPUTS_STREAM)
        keys_N, vocab_N = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32)
        if index is not None:
            if index.layout != INPUTS_LAYOUT:
                raise TraceError(f"{index.path}: its columns are not those of recorded inputs")
            vocab_N = np.empty(len(index.token_ids_N), dtype=np.int32)
            everything = np.arange(len(vocab_N))
            gather(index, everything, {"vocab_ids": vocab_N.reshape(-1, 1, 1)}, everything)
            keys_N = index.problem_ids_N.astype(np.int64) << 32 | index.token_ids_N
            order_N = np.argsort(keys_N, kind="stable")
            order_N = order_N[np.append(np.diff(keys_N[order_N]) > 0, True)]
            keys_N, vocab_N = keys_N[order_N], vocab_N[order_N]
        self._keys_N, self._vocab_N = keys_N, vocab_N

    @property
    def known(self) -> bool:
        """Whether this run has recorded what its requests read."""
        return len(self._keys_N) > 0

    def has_read(self, number: int, token_ids: list[int]) -> bool:
        """Whether request `number` read all of `token_ids` but the last, except for those that came from a prefix cache."""
        last = np.searchsorted(self._keys_N, number << 32 | max(len(token_ids) - 2, 0))
        reached = last < len(self._keys_N) and self._keys_N[last] == number << 32 | max(len(token_ids) - 2, 0)
        return bool(reached) and self.difference(number, token_ids) is None

    def difference(self, number: int, token_ids: list[int]) -> tuple[int, int] | None:
        """The first position at which request `number` read another token than `token_ids`, and that token; None if none did.

        Positions that were not captured, and the last token, which is never read, cannot differ.
        """
        first, end = np.searchsorted(self._keys_N, [number << 32, number << 32 | max(len(token_ids) - 1, 0)])
        positions_T, vocab_T = self._keys_N[first:end] & 0xFFFFFFFF, self._vocab_N[first:end]
        expected_T = np.asarray(token_ids, dtype=np.int32)[positions_T]
        differs = np.flatnonzero((vocab_T != expected_T) & (vocab_T >= 0))
        return None if not len(differs) else (int(positions_T[differs[0]]), int(vocab_T[differs[0]]))


def check_sequences(directory: Path, sequences: Iterable[Sequence]) -> None:
    """Raise `TraceError`, naming the first problem, unless `find_faults` finds nothing."""
    for _, fault in find_faults(directory, sequences):
        raise TraceError(f"{directory}: {fault}; what was captured is kept")


def find_faults(directory: Path, sequences: Iterable[Sequence]) -> Iterator[tuple[Sequence, str]]:
    """The sequences that have no request of their own, with their prompt, which read their tokens; and what is wrong."""
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
            yield from _faults_of_run(run_folder(directory, run), by_run[run])


def _faults_of_run(folder: Path, sequences: list[Sequence]) -> Iterator[tuple[Sequence, str]]:
    prompts = {request.number: request.prompt_token_ids for request in read_requests(folder)}
    inputs = CapturedInputs(folder)
    for sequence in sequences:
        assert sequence.captured_as is not None
        number = sequence.captured_as[1]
        if prompts.get(number, sequence.prompt_token_ids) != sequence.prompt_token_ids:
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
