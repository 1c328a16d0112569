"""One pass over a trace that counts everything: on the cores of this machine, or a part at a time elsewhere."""

from __future__ import annotations

import io
import os
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.counts.accumulator import Accumulator
from analysis.counts.contexts import ContextCounts
from analysis.counts.frames import EVERY_PROBLEM, ProblemFacts, problem_facts, read_frames
from analysis.counts.load import LoadCounts, ProblemBlocks
from analysis.counts.locality import RepetitionCounts, ReuseCounts
from analysis.counts.pairs import PairCounts
from analysis.counts.survey import EVERYTHING, Axes, Choice, Survey, make_axes, survey_trace
from analysis.counts.transitions import TransitionCounts, transition_bytes
from analysis.counts.weights import MarginCounts, WeightCounts, add_margins
from profiler.errors import TraceError
from profiler.trace.reader import Trace

# All threads' tables together, unless one thread alone needs more.
TABLE_BYTES = 320 << 20
# The largest tables that one thread may need.
MAX_TRANSITION_BYTES = 100 << 20
DEFAULT_HOPS = 8
# Of what the stored counts mean: to be raised with every change of a kernel.
COUNTS_VERSION = 1
# Stored counts are mostly zeros: bounded here before they are unpacked.
MAX_STORED_BYTES = 2 << 30

Progress = Callable[[int], None]
"""Called with the number of tokens that were counted since the last call."""


class TraceCounts:
    """Every accumulator of one analysis."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.load = LoadCounts(axes)
        self.transitions = TransitionCounts(axes)
        self.pairs = PairCounts(axes)
        self.repetition = RepetitionCounts(axes)
        self.reuse = ReuseCounts(axes)
        self.contexts = ContextCounts(axes)
        self.weights = WeightCounts(axes)
        self.margins = MarginCounts(axes)

    @property
    def parts(self) -> dict[str, Accumulator]:
        """All of them by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Accumulator)}

    def count(
        self,
        trace: Trace,
        problems: range = EVERY_PROBLEM,
        facts: ProblemFacts | None = None,
        on_progress: Progress = lambda tokens: None,
    ) -> None:
        """Count the problems of `trace` with ids in a range. Raises `TraceError` on rows that break the format."""
        parts = self.parts.values()
        for frame in read_frames(trace, self.axes, problems, facts):
            for part in parts:
                part.update(frame)
            on_progress(len(frame))
        for part in parts:
            part.close()

    def count_logits(self, trace: Trace, facts: ProblemFacts, problems: range = EVERY_PROBLEM) -> None:
        """Count `logits/`, if the trace has them, of the same problems."""
        left_out = facts.ids_P[facts.dataset_P < 0]

        def chosen(ids_N: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
            return (ids_N >= problems.start) & (ids_N < problems.stop) & ~np.isin(ids_N, left_out)

        add_margins(trace, self.margins, chosen)

    def merge(self, other: TraceCounts) -> None:
        """Add the counts of other problems."""
        for name, part in self.parts.items():
            part.merge(other.parts[name])

    def save(self) -> bytes:
        """As a compressed NumPy archive, for `restored`."""
        arrays: dict[str, Any] = {
            f"{name}/{key}": array for name, part in self.parts.items() for key, array in part.state().items()
        }
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()

    @classmethod
    def restored(cls, axes: Axes, stored: bytes) -> TraceCounts:
        """What `save` made for the same axes. Raises `TraceError` if it is something else."""
        counts = cls(axes)
        try:
            with zipfile.ZipFile(io.BytesIO(stored)) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > MAX_STORED_BYTES:
                    raise TraceError(f"stored counts are larger than {MAX_STORED_BYTES >> 30} GiB")
            with np.load(io.BytesIO(stored), allow_pickle=False) as archive:
                arrays: dict[str, npt.NDArray[Any]] = {name: archive[name] for name in archive.files}
            for name, part in counts.parts.items():
                part.restore({key.removeprefix(f"{name}/"): arrays[key] for key in arrays if key.startswith(f"{name}/")})
        except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
            raise TraceError(f"stored counts are not readable: {error}") from error
        return counts


def axes_of(trace: Trace, survey: Survey, hops: int | None = None, choice: Choice = EVERYTHING) -> Axes:
    """The axes of the tables for `trace`. hops: at most L - 1; None for as many as DEFAULT_HOPS and memory allow.

    Raises `TraceError` if the tables for that many hops would not fit.
    """
    model = trace.metadata.model
    layers, experts = len(model.moe_layers), model.num_experts
    room = MAX_TRANSITION_BYTES // transition_bytes(layers, experts, 1)
    if hops is None:
        hops = min(DEFAULT_HOPS, room)
    hops = min(hops, layers - 1)
    if hops > room:
        raise TraceError(
            f"{trace.path}: {hops} hops over {layers} layers of {experts} experts need more than "
            f"{MAX_TRANSITION_BYTES >> 20} MiB of counters; "
            + (f"choose at most {room} --hops" if room else "transitions cannot be counted: leave --hops out")
        )
    return make_axes(survey, model, hops=hops, has_weights=trace.metadata.record.weights, choice=choice)


def count_trace(
    trace: Trace,
    *,
    hops: int | None = None,
    choice: Choice = EVERYTHING,
    axes: Axes | None = None,
    problems: range = EVERY_PROBLEM,
    workers: int | None = None,
    on_progress: Progress = lambda tokens: None,
) -> TraceCounts:
    """Count a trace, its problems spread over threads: the loops and the decoding release the interpreter's lock.

    axes: of the tables, instead of `axes_of` with these hops and this choice; problems: only those with ids in this range.
    workers: None for one per core, as far as their tables fit. on_progress is called from one thread at a time.
    """
    axes = axes or axes_of(trace, survey_trace(trace, choice), hops, choice)
    facts = problem_facts(trace, axes)
    total = TraceCounts(axes)
    total.count_logits(trace, facts, problems)
    if workers is None:
        blocks = min(ProblemBlocks.MAX_BYTES, len(facts.ids_P) * ProblemBlocks.bytes_of(axes))
        workers = max(1, min(_cores(), TABLE_BYTES // (_bytes(total) + blocks)))
    spans = trace.spans(workers) if workers > 1 else [EVERY_PROBLEM]
    chosen = [range(max(span.start, problems.start), min(span.stop, problems.stop)) for span in spans]
    chosen = [span for span in chosen if span]
    if len(chosen) < 2:
        total.count(trace, problems, facts, on_progress)
        return total
    lock = threading.Lock()

    def count(span: range) -> None:
        def progress(tokens: int) -> None:
            with lock:
                on_progress(tokens)

        part = TraceCounts(axes)
        part.count(Trace.open(trace.path, allow_incomplete=True), span, facts, progress)
        with lock:
            total.merge(part)

    with ThreadPoolExecutor(len(chosen)) as pool:
        for done in [pool.submit(count, span) for span in chosen]:
            done.result()
    return total


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _bytes(counts: TraceCounts) -> int:
    """Of one thread's tables."""
    return sum(array.nbytes for part in counts.parts.values() for array in part.state().values())
