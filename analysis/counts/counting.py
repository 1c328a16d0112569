"""One pass over a trace that counts everything: on the cores of this machine, or part by part on several machines."""

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
from analysis.counts.longest import LongestProblem
from analysis.counts.pairs import PairCounts
from analysis.counts.survey import EVERYTHING, Axes, Choice, Survey, make_axes, survey_trace
from analysis.counts.transitions import TransitionCounts, transition_bytes
from analysis.counts.weights import MarginCounts, WeightCounts, add_margins
from profiler.errors import TraceError
from profiler.trace.reader import Trace

# Limit on the tables of all threads together, unless a single thread needs more.
TABLE_BYTES = 320 << 20
# Limit on the transition tables, the largest ones, of one thread.
MAX_TRANSITION_BYTES = 100 << 20
DEFAULT_HOPS = 8
# A thread starts with empty tables and ends with adding them up, which takes as long as counting a row for every so many bytes.
BYTES_PER_ROW = 400
MIN_ROWS_PER_THREAD = 100_000
# Version of the stored counts; raise it with every change of a kernel, so that counts of different meanings are never merged.
COUNTS_VERSION = 2
# Stored counts are mostly zeros and compress well, so the uncompressed size is checked before they are unpacked.
MAX_STORED_BYTES = 2 << 30

Progress = Callable[[int], None]
"""Called with the number of tokens counted since the last call."""


class TraceCounts:
    """All counts of an analysis: of one trace, of a part of it, or of parts merged.

    Counts of different problems with the same axes can be merged, in any order. `count_trace` creates them, and
    `analysis.statistics.compute.make_statistics` computes statistics from them.

    Attributes:
        axes: What the rows and columns of the tables stand for.
        load: Selections and routing weights per expert, by dataset and phase, and by block of problems.
        transitions: Pairs of experts at layers n and n+k.
        pairs: Pairs of experts used together by a token.
        repetition: Comparisons of each token with earlier tokens of its problem.
        reuse: Gaps between the uses of an expert within a problem.
        contexts: Experts selected in simple contexts.
        weights: Histograms of routing weights by rank.
        margins: Histograms of the margin between router logits.
        longest: The routing of the longest problem, as it was recorded.

    Example:
        >>> from profiler import Trace
        >>> from analysis import count_trace
        >>> trace = Trace.open("traces/math")  # doctest: +SKIP
        >>> first = count_trace(trace, problems=range(0, 100))  # doctest: +SKIP
        >>> first.merge(count_trace(trace, axes=first.axes, problems=range(100, 200)))  # doctest: +SKIP
    """

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
        self.longest = LongestProblem(axes)

    @property
    def parts(self) -> dict[str, Accumulator]:
        """All accumulators by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Accumulator)}

    def count(
        self,
        trace: Trace,
        problems: range = EVERY_PROBLEM,
        facts: ProblemFacts | None = None,
        on_progress: Progress = lambda tokens: None,
    ) -> None:
        """Add the routing rows of a trace.

        Args:
            trace: The trace to read.
            problems: Range of problem ids to count; others are skipped.
            facts: `problem_facts` of the trace, if already computed.
            on_progress: Called with the number of tokens counted since the last call.

        Raises:
            TraceError: Rows break the format of a trace.
        """
        parts = self.parts.values()
        for frame in read_frames(trace, self.axes, problems, facts):
            for part in parts:
                part.update(frame)
            on_progress(len(frame))
        for part in parts:
            part.close()

    def count_logits(self, trace: Trace, facts: ProblemFacts, problems: range = EVERY_PROBLEM) -> None:
        """Add the margins of router logits, if the trace has `logits/`, of the problems with ids in a range."""
        left_out = facts.ids_P[facts.dataset_P < 0]

        def chosen(ids_N: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
            return (ids_N >= problems.start) & (ids_N < problems.stop) & ~np.isin(ids_N, left_out)

        add_margins(trace, self.margins, chosen)

    def merge(self, other: TraceCounts) -> None:
        """Add the counts of other problems, which must have been counted with the same axes."""
        for name, part in self.parts.items():
            part.merge(other.parts[name])

    def save(self) -> bytes:
        """The counts as a compressed NumPy archive, for `restored`."""
        arrays: dict[str, Any] = {
            f"{name}/{key}": array for name, part in self.parts.items() for key, array in part.state().items()
        }
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()

    @classmethod
    def restored(cls, axes: Axes, stored: bytes) -> TraceCounts:
        """Load counts stored by `save`.

        Args:
            axes: The axes with which they were counted.
            stored: The archive that `save` returned; it is not trusted, and nothing in it is unpickled.

        Returns:
            The counts.

        Raises:
            TraceError: The archive is not readable, larger than 2 GiB, or holds counts with other axes.
        """
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
    """The axes of the tables for `trace`. hops: L - 1 at most; None for as many as memory allows, up to DEFAULT_HOPS.

    Raises `TraceError` if the tables for that many hops would not fit into memory.
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
            + (f"choose at most {room} hops" if room else "even one hop does not fit: leave the number of hops out")
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
    """Count a trace in one pass, with its problems distributed over threads.

    Threads run in parallel, as the compiled loops and the decoding of Parquet release the GIL.

    Args:
        trace: The trace to count.
        hops: Longest distance between layers, in MoE layers; L - 1 at most. None for as many as memory allows, up to 8. Ignored
            if `axes` is given.
        choice: Which problems to count, and the column of `problems.parquet` whose values are the domains. Ignored if `axes` is
            given.
        axes: Axes of the tables, for counts that will be merged with others. None to derive them from the trace (`axes_of`).
        problems: Range of problem ids to count; others are skipped.
        workers: Number of threads. None for one per core, as far as their tables fit into 320 MiB and each has enough rows.
        on_progress: Called with the number of tokens counted since the last call, from one thread at a time.

    Returns:
        The counts, which do not depend on the number of threads.

    Raises:
        TraceError: A file breaks the format, a column that `choice` names is missing, or the tables for this many hops would
            not fit into memory.

    Example:
        >>> from profiler import Trace
        >>> counts = count_trace(Trace.open("traces/math"), hops=1)  # doctest: +SKIP
        >>> counts.transitions.pairs.sum(0)[0, 0]  # pairs of experts at the first two MoE layers `[E, E]`  # doctest: +SKIP
    """
    axes = axes or axes_of(trace, survey_trace(trace, choice), hops, choice)
    facts = problem_facts(trace, axes)
    total = TraceCounts(axes)
    total.count_logits(trace, facts, problems)
    if workers is None:
        blocks = min(ProblemBlocks.MAX_BYTES, len(facts.ids_P) * ProblemBlocks.bytes_of(axes))
        workers = _workers(_bytes(total), blocks, trace.num_rows)
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


def _workers(table_bytes: int, block_bytes: int, rows: int) -> int:
    """Number of threads: their tables must fit into memory, and each must have rows enough to pay for its tables."""
    enough = max(MIN_ROWS_PER_THREAD, table_bytes // BYTES_PER_ROW)
    return max(1, min(_cores(), TABLE_BYTES // (table_bytes + block_bytes), rows // enough))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _bytes(counts: TraceCounts) -> int:
    """Size of one thread's tables."""
    return sum(array.nbytes for part in counts.parts.values() for array in part.state().values())
