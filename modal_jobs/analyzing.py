"""Analyze a trace where it is stored: each part is counted independently, and the counts are merged.

On the Volume, `SOURCE/analysis-HASH/` stores the counts in one file per part, so that no part is counted twice.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

from analysis.counts.counting import COUNTS_VERSION, TraceCounts, axes_of, count_trace
from analysis.counts.frames import EVERY_PROBLEM
from analysis.counts.survey import Axes, Survey, survey_trace
from analysis.statistics.compute import Source
from modal_jobs.shards import finished_parts
from profiler.errors import TraceError
from profiler.trace.merge import Skipped, merged_metadata
from profiler.trace.plausibility import doubts
from profiler.trace.reader import Trace
from profiler.trace.schema import MANIFEST_FILE, Metadata
from profiler.trace.writer import sha256_of


@dataclass(frozen=True)
class Part:
    """Problems `first` to `end` - 1 of the trace in a folder of the Volume."""

    folder: str
    first: int
    end: int

    @property
    def problems(self) -> range:
        """The ids of its problems."""
        return range(self.first, self.end)


@dataclass(frozen=True, kw_only=True)
class AnalysisJob:
    """What to count, and where.

    source: folder of the run or trace on the Volume. key: hash of the content of all parts and of how they are counted.
    metadata: of the whole trace, as JSON. caveats: of all parts.
    """

    source: str
    key: str
    parts: tuple[Part, ...]
    axes: Axes
    metadata: str
    caveats: tuple[str, ...]

    def stored(self, number: int) -> str:
        """The path of a part's counts on the Volume."""
        return f"{self.source}/analysis-{self.key}/part-{number:05d}.npz"

    def described(self) -> Source:
        """A description of what was analyzed, for the statistics."""
        return Source(self.source, Metadata.model_validate_json(self.metadata), self.caveats)


def plan_analysis(volume: Path, source: str, *, pieces: int, hops: int | None) -> AnalysisJob:
    """Read the tables of the run or trace in the folder `source` of a mounted Volume, and decide what to count.

    pieces: number of parts that a trace is split into; the parts of a run are its shards.
    Raises `TraceError`, also if shards are missing.
    """
    folder = volume / source
    skipped = Skipped()
    if (folder / MANIFEST_FILE).is_file():
        traces = [Trace.open(folder)]
        metadata = traces[0].metadata
        parts = [Part(source, span.start, span.stop) for span in traces[0].spans(pieces)]
    else:
        job, folders, skipped = finished_parts(volume, source)
        traces = [Trace.open(path) for path in folders]
        metadata = merged_metadata(traces, {"run_id": job.run_id}, skipped)
        parts = [Part(str(path.relative_to(volume)), EVERY_PROBLEM.start, EVERY_PROBLEM.stop) for path in folders]
    survey = Survey()
    for trace in traces:
        survey.merge(survey_trace(trace))
    axes = axes_of(traces[0], survey, hops)
    hashes = [sha256_of(trace.path / MANIFEST_FILE) for trace in traces]
    settled = json.dumps([COUNTS_VERSION, hashes, [asdict(part) for part in parts], asdict(axes)], sort_keys=True)
    return AnalysisJob(
        source=source,
        key=hashlib.sha256(settled.encode()).hexdigest()[:12],
        parts=tuple(parts),
        axes=axes,
        metadata=metadata.model_dump_json(),
        caveats=_distinct(caveat for trace in traces for caveat in (*trace.caveats(), *doubts(trace))),
    )


def _distinct(caveats: Iterable[str]) -> tuple[str, ...]:
    """The first of those lines that say the same of several shards, which may differ in percentages."""
    found: dict[str, str] = {}
    for caveat in caveats:
        found.setdefault(re.sub(r"\d+%", "%", caveat), caveat)
    return tuple(found.values())


def count_part(volume: Path, job: AnalysisJob, number: int) -> bool:
    """Count a part and store the counts on the mounted Volume. Returns whether they had been stored before."""
    path = volume / job.stored(number)
    if path.is_file():
        return True
    part = job.parts[number]
    trace = Trace.open(volume / part.folder)
    counts = count_trace(trace, axes=job.axes, problems=part.problems)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A preempted container may still be writing.
    temporary = path.with_name(f"{path.name}.{uuid4().hex}")
    temporary.write_bytes(counts.save())
    temporary.rename(path)
    return False


def merge_counts(job: AnalysisJob, stored: Iterable[bytes]) -> TraceCounts:
    """Merge the counts of all parts, with one part in memory at a time.

    Raises `TraceError` if stored counts are not readable or do not belong to the job.
    """
    total: TraceCounts | None = None
    for number, content in enumerate(stored):
        try:
            counts = TraceCounts.restored(job.axes, content)
        except TraceError as error:
            raise TraceError(f"{job.stored(number)}: {error}; 'modal volume rm' it and run again") from error
        if total is None:
            total = counts
        else:
            total.merge(counts)
    if total is None:
        raise TraceError(f"{job.source} has no parts")
    return total
