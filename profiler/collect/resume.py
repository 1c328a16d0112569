"""Resume an interrupted collection: check its settings, and find the problems that need not run again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.capture.inputs import find_faults
from profiler.capture.requests import Sequence, read_completed
from profiler.capture.sealing import captured_positions, run_folder, runs_of
from profiler.datasets.problems import Problem
from profiler.errors import TraceError
from profiler.trace.schema import Metadata, comparable_capture
from profiler.trace.stream import HIDDEN_STREAM, ROUTING_STREAM


def check_settings(before: Metadata, now: dict[str, Any], out: Path) -> None:
    """Raise `TraceError`, naming the first difference, if the collection in `out` was started with other settings."""

    def compare(old: Any, new: Any, name: str) -> None:
        if isinstance(old, dict) and isinstance(new, dict):
            for key in new:
                compare(old.get(key), new[key], f"{name}.{key}" if name else key)
        elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            for number, (before, after) in enumerate(zip(old, new, strict=True)):
                compare(before, after, f"{name}[{number}]")
        elif old != new:
            raise TraceError(
                f"{out} was started with {name} {old!r}, now it is {new!r}: resume with the arguments of the first run"
            )

    compare(before.model_dump(mode="json") | {"capture": comparable_capture(before)}, now, "")


def finished_problems(out: Path, problems: dict[int, Problem]) -> dict[int, Sequence]:
    """The problems that earlier runs finished, by id: their output is known, and all their positions were captured.

    Problems whose captured request read other tokens are not among them: they run again. Raises `TraceError` if a finished
    problem differs from the one that now has its id.
    """
    finished = {}
    for run in runs_of(out):
        positions = captured_positions(run_folder(out, run))
        for problem_id, sequence in read_completed(out, run).items():
            if problem_id not in problems or sequence.prompt != problems[problem_id].prompt:
                raise TraceError(
                    f"{out}: problem {problem_id} has another prompt than before: the dataset has changed; choose a new folder"
                )
            if _is_captured(sequence, positions):
                finished[problem_id] = sequence
    for sequence, _ in find_faults(out, list(finished.values())):
        finished.pop(sequence.problem_id, None)
    return finished


def hidden_tokens_used(out: Path, finished: dict[int, Sequence]) -> int:
    """Number of tokens of the finished problems whose router inputs earlier runs recorded."""
    recorded = {run: captured_positions(run_folder(out, run)).get(HIDDEN_STREAM, {}) for run in runs_of(out)}
    sources = [sequence.captured_as for sequence in finished.values() if sequence.captured_as is not None]
    return sum(len(recorded[run].get(number, ())) for run, number in sources)


def _is_captured(sequence: Sequence, positions: dict[str, dict[int, npt.NDArray[np.int32]]]) -> bool:
    """Whether the streams of its run hold every routed position of the sequence."""
    if sequence.captured_as is None or ROUTING_STREAM not in positions:
        return False
    wanted = np.arange(sequence.cached_tokens, sequence.tokens - 1)
    for stream, by_number in positions.items():
        found = by_number.get(sequence.captured_as[1])
        # Router inputs are recorded for some problems only, but for those at all positions.
        if found is None and stream == HIDDEN_STREAM:
            continue
        if found is None or not np.isin(wanted, found).all():
            return False
    return True
