"""Collect one shard of a collection on a Volume: skip it if it is finished, resume it if it was started, else collect it.

On the Volume, `RUN/shard-00003/ATTEMPT/` is a trace directory. Every attempt has its own folder, because a preempted container
may still commit its files after another has taken over: no file is ever written by two containers. An attempt with a manifest
is complete; the next attempt continues from one without. A shard of which no problem can be run has no trace, but a file
`skipped.json`.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from pydantic import TypeAdapter, ValidationError

from profiler.capture.options import CaptureOptions
from profiler.collect.collection import Collection, CollectProgress, CollectSummary, summarize
from profiler.collect.collector import TraceCollector
from profiler.collect.usage import Usage
from profiler.engines import EngineOptions, Sampling
from profiler.errors import NothingToRunError, TraceError, counted, first_fault, first_line
from profiler.models.gpus import Gpu, named_gpu
from profiler.plan.estimate import HOST_DOLLARS
from profiler.plan.job import JOB_FILE, CollectJob, read_job, read_shard, shard_datasets
from profiler.trace.merge import Skipped
from profiler.trace.reader import Trace
from profiler.trace.schema import CAPTURE_FOLDER, MANIFEST_FILE, METADATA_FILE
from profiler.trace.writer import write_text

SKIPPED_FILE = "skipped.json"
COMMIT_SECONDS = 10.0
REPORT_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """The outcome of a shard. cached: it was already finished. error: why it has no trace, in one line.

    gaps: why no problem of it can be run, if none can: it is finished, without a trace.
    seconds: container time since its last report, including its start. dollars: the cost of that time.
    """

    shard: int
    cached: bool = False
    error: str | None = None
    gaps: tuple[str, ...] = ()
    attempt: str | None = None
    problems: int = 0
    tokens: int = 0
    rows: int = 0
    bytes: int = 0
    seconds: float = 0.0
    dollars: float = 0.0
    tokens_per_second: float | None = None
    device: str = ""
    usage: Usage | None = None

    def with_cost(self, seconds: float, rate: float) -> ShardReport:
        """The report with the machine's time and its cost, at `rate` dollars per hour."""
        return replace(self, seconds=seconds, dollars=seconds * rate / 3600)


def shard_folder(run: Path, shard: int) -> Path:
    """The folder that holds the attempts at a shard."""
    return run / f"shard-{shard:05d}"


def finished_attempt(run: Path, job: CollectJob, shard: int) -> Path | None:
    """The first attempt that is a complete trace of the shard's problems, or None. Incomplete attempts are ignored."""
    for manifest in sorted(shard_folder(run, shard).glob(f"*/{MANIFEST_FILE}")):
        if holds_shard(manifest.parent, job, shard):
            return manifest.parent
    return None


def skipped_shard(content: str, where: object) -> Skipped:
    """What `skipped.json` says of a shard. Raises `TraceError`, naming `where`, if it is not such a file."""
    try:
        return TypeAdapter(Skipped).validate_json(content)
    except ValidationError as error:
        raise TraceError(f"{where} does not say which problems were skipped: {first_fault(error)}") from error


def find_skipped(run: Path, shard: int) -> Skipped | None:
    """Why no problem of a shard can be run, if an attempt found that; None otherwise."""
    path = shard_folder(run, shard) / SKIPPED_FILE
    return skipped_shard(path.read_text(encoding="utf-8"), path) if path.is_file() else None


def all_skipped(shards: Iterable[Skipped]) -> Skipped:
    """Shards without a trace, together."""
    found = list(shards)
    return Skipped(sum(one.problems for one in found), tuple(line for one in found for line in one.gaps))


def finished_parts(volume: Path, source: str) -> tuple[CollectJob, list[Path], Skipped]:
    """The job of the run in the folder `source` of a mounted Volume, and the trace folders of its shards, in order.

    Also returns what is known of shards without a trace, of which no problem can be run. Raises `TraceError` if the run does
    not exist, if a shard is not finished, or if none has a trace.
    """
    folder = volume / source
    if not (folder / JOB_FILE).is_file():
        raise TraceError(f"no run or trace {source} on the Volume; 'modal volume ls NAME' lists its content")
    job = read_job((folder / JOB_FILE).read_bytes(), f"{source}/{JOB_FILE}")
    parts = [finished_attempt(folder, job, shard) for shard in range(job.num_shards)]
    found = [part for part in parts if part is not None]
    without = [find_skipped(folder, shard) for shard, part in enumerate(parts) if part is None]
    skipped = [one for one in without if one is not None]
    if len(found) + len(skipped) < job.num_shards:
        finished = len(found) + len(skipped)
        raise TraceError(f"{finished} of {job.num_shards} shards of {source} are finished: collect the others first")
    if not found:
        raise TraceError(f"no problem of {source} can be run; {skipped[0].gaps[0]}")
    return job, found, all_skipped(skipped)


def holds_shard(folder: Path, job: CollectJob, shard: int) -> bool:
    """Whether a folder is a complete trace of a shard's problems: all but those that could not be run."""
    try:
        trace = Trace.open(folder)
        ids = trace.problems.column("problem_id").to_pylist()
    except TraceError:
        return False
    wanted = range(job.shards[shard], job.shards[shard + 1])
    skipped = trace.metadata.capture.get("skipped_problems", 0)
    return len(set(ids)) == len(ids) == len(wanted) - skipped and set(ids) <= set(wanted)


def collect_shard(
    run: Path,
    job: CollectJob,
    shard: int,
    collector: TraceCollector,
    *,
    commit: Callable[[], None],
    say: Callable[[str], None],
    spent: Callable[[], float] = lambda: 0.0,
) -> ShardReport:
    """Collect a complete trace of the shard in the folder `run` (which has the job's files), unless there is one.

    commit: makes written files visible to other machines; called every 10 s, so that little is lost if this machine fails.
    say: reports progress. spent: the cost of this machine so far, in dollars. Raises `SpecmoeError` if collection fails.
    """
    folder = shard_folder(run, shard)
    skipped = find_skipped(run, shard)
    if skipped is not None:
        return ShardReport(shard=shard, cached=True, gaps=skipped.gaps)
    done = finished_attempt(run, job, shard)
    if done is not None:
        return _report(summarize(Trace.open(done), resumed=0, usage=Usage()), shard, job, cached=True)
    problems = read_shard(run, job, shard)
    attempt = folder / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid4().hex[:8]}"
    resumed = _continue_from(folder, attempt)
    collection = Collection(
        problems=problems,
        datasets=shard_datasets(job, problems),
        sampling=Sampling(temperature=job.temperature, top_p=job.top_p, seed=job.seed),
        recipe=job.recipe,
        # Machines cannot share the run's token budget, because they do not communicate: each gets an equal part.
        hidden_tokens=-(-job.hidden_tokens // job.num_shards),
        out=attempt,
        resume=True,
    )
    try:
        with _committing(commit, say), _reporting(collector, f"shard {shard + 1} of {job.num_shards}", say, spent):
            try:
                summary = collector.collect(collection)
            except TraceError as error:
                if not resumed:
                    raise
                # Resuming only saves time: if the earlier attempt is unusable, start over.
                say(f"shard {shard + 1}: starting over, because its earlier attempt cannot be resumed ({error})")
                shutil.rmtree(attempt)
                summary = collector.collect(replace(collection, out=attempt))
    except NothingToRunError as error:
        # The other shards are a trace without this one.
        skipped = Skipped(error.problems, tuple(error.gaps))
        write_text(folder / SKIPPED_FILE, json.dumps(asdict(skipped)))
        commit()
        return ShardReport(shard=shard, gaps=skipped.gaps)
    commit()
    return _report(summary, shard, job)


def start_collector(job: CollectJob, revision: str | None, *, say: Callable[[str], None]) -> TraceCollector:
    """A collector for the job, with its engine started. revision: commit of the weights. Raises `SpecmoeError`."""
    collector = TraceCollector(
        job.model,
        engine=job.engine,
        precision=job.precision,
        revision=revision,
        engine_options=EngineOptions(
            dtype=job.dtype,
            moe_backend=job.moe_backend,
            max_length=job.max_length,
            seed=job.seed,
            capture=CaptureOptions(logits=job.logits, hidden_layers=tuple(job.hidden_layers)),
        ),
        on_stage=say,
    )
    collector.start()
    return collector


def dollars_per_hour(device: str, asked: Gpu) -> float:
    """The price of the machine: with its actual GPU if the device name identifies it, else with the requested GPU."""
    found = named_gpu(device)
    price = asked.dollars_per_hour if found is None or found.dollars_per_hour is None else found.dollars_per_hour
    return (price or 0.0) + HOST_DOLLARS


def _continue_from(folder: Path, attempt: Path) -> bool:
    """Copy the files of the earlier attempt that got furthest. Returns whether there is one.

    Nothing is removed, because another machine may still be working there.
    """
    begun = [path for path in folder.glob("*/") if (path / METADATA_FILE).is_file() and (path / CAPTURE_FOLDER).is_dir()]
    if not begun:
        return False
    furthest = max(begun, key=lambda path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))
    attempt.mkdir(parents=True)
    shutil.copyfile(furthest / METADATA_FILE, attempt / METADATA_FILE)
    shutil.copytree(furthest / CAPTURE_FOLDER, attempt / CAPTURE_FOLDER)
    return True


@contextmanager
def _committing(commit: Callable[[], None], say: Callable[[str], None]) -> Iterator[None]:
    """Commit every `COMMIT_SECONDS`, and once more when the block exits, even with an error."""
    done = threading.Event()

    def work() -> None:
        while not done.wait(COMMIT_SECONDS):
            try:
                commit()
            except Exception as error:  # any error of the Volume's client: the next commit may succeed
                say(f"recorded files could not be committed: {first_line(error)}")

    thread = threading.Thread(target=work, name="specmoe-commit", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        commit()


@contextmanager
def _reporting(collector: TraceCollector, name: str, say: Callable[[str], None], spent: Callable[[], float]) -> Iterator[None]:
    """Make the collector report its progress every `REPORT_SECONDS`."""
    last = -REPORT_SECONDS

    def progress(now: CollectProgress) -> None:
        nonlocal last
        if now.problems < now.total and now.seconds < last + REPORT_SECONDS:
            return
        last = now.seconds
        speed = f", {now.tokens / now.seconds:,.0f} tokens/s" if now.tokens else ""
        say(
            f"{name}: {now.problems} of {counted(now.total, 'problem')}{speed}, {now.usage}, about ${spent():.2f} on this "
            "machine"
        )

    before = collector.on_progress, collector.on_stage
    collector.on_progress = progress
    collector.on_stage = lambda text: say(f"{name}: {text}")
    try:
        yield
    finally:
        collector.on_progress, collector.on_stage = before


def _report(summary: CollectSummary, shard: int, job: CollectJob, *, cached: bool = False) -> ShardReport:
    return ShardReport(
        shard=shard,
        cached=cached,
        attempt=summary.trace.name,
        problems=summary.problems,
        tokens=summary.prompt_tokens + summary.output_tokens,
        rows=summary.rows,
        bytes=summary.bytes,
        tokens_per_second=None if cached else summary.tokens_per_second,
        device=Trace.open(summary.trace).metadata.capture.get("device", "unknown"),
        usage=None if cached else summary.usage,
    )
