"""Train a predictor where the trace is stored: on a Volume that holds a collected run's shards or an uploaded trace."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from analysis.documents.evaluation import EVALUATION_FILE
from modal_jobs.shards import finished_parts
from profiler.errors import SpecmoeError, counted
from profiler.trace.merge import merge_traces
from profiler.trace.reader import Trace
from profiler.trace.schema import MANIFEST_FILE, Manifest, ManifestEntry
from profiler.trace.writer import sha256_of, write_text
from speculation.data.tasks import Task
from speculation.evaluation.evaluate import evaluate
from speculation.predictors.options import TrainingOptions
from speculation.training.fit import train


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What to train, and on which data. source: folder on the Volume of a run (with its shards) or of a trace."""

    source: str
    predictor: str
    task: Task
    horizon: int
    options: TrainingOptions

    @property
    def name(self) -> str:
        """The name of the result on the Volume. Equal jobs have equal names, so that no job is trained twice."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.source}/trained/{self.predictor}-{digest[:10]}"


def open_source(volume: Path, source: str, work: Path) -> Trace:
    """The trace in the folder `source` of a mounted Volume. The shards of a run are merged into a trace in `work`.

    Raises `TraceError` if the run or trace does not exist, or if shards are missing.
    """
    folder = volume / source
    if (folder / MANIFEST_FILE).is_file():
        return Trace.open(folder)
    job, parts, skipped = finished_parts(volume, source)
    merged = work / source
    if not merged.exists():
        merge_traces(parts, merged, about={"run_id": job.run_id}, skipped=skipped)
    return Trace.open(merged)


def train_on_volume(volume: Path, job: TrainJob, work: Path, *, say: Callable[[str], None]) -> Path:
    """Train and evaluate a predictor. Returns the folder on the Volume: a run directory with its evaluation and a manifest.

    A finished job is not run again. Raises `SpecmoeError`.
    """
    done = volume / job.name
    if (done / MANIFEST_FILE).is_file():
        say(f"{job.name} was already trained")
        return done
    trace = open_source(volume, job.source, work)
    say(f"{job.source}: {counted(trace.problems.num_rows, 'problem')}, {trace.num_rows:,} routing rows")
    result = work / job.name
    shutil.rmtree(result, ignore_errors=True)

    def progress(epoch: int, epochs: int, entry: dict[str, float]) -> None:
        losses = ", ".join(f"{name} {value:.4f}" for name, value in entry.items() if name.endswith("loss"))
        say(f"epoch {epoch} of {epochs}: {losses}")

    run = train(trace, job.predictor, result, task=job.task, horizon=job.horizon, options=job.options, on_progress=progress)
    try:
        evaluation = evaluate(run, trace)
    except SpecmoeError as error:
        # There are too few problems for a test part; the run can still be used on another trace.
        say(f"not evaluated: {error}")
    else:
        write_text(result / EVALUATION_FILE, evaluation.to_json())
    files = {
        path.relative_to(result).as_posix(): ManifestEntry(rows=0, bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in sorted(result.rglob("*"))
        if path.is_file()
    }
    shutil.copytree(result, done, dirs_exist_ok=True)
    write_text(done / MANIFEST_FILE, Manifest(files=files).model_dump_json(indent=1) + "\n")
    return done
