"""Train expert predictors on a rented GPU, on a run that was collected there or on a local trace.

    modal run modal_jobs/train.py --run-id RUN --out runs/mine
    modal run modal_jobs/train.py --trace traces/math --out runs/math

The work is in `modal_jobs.training`.
"""

# No `from __future__ import annotations` here, as in collect.py.

from dataclasses import replace
from pathlib import Path
from typing import Any

import modal

from analysis.documents.evaluation import EVALUATION_FILE, read_evaluation
from modal_jobs.download import fetch_trace
from modal_jobs.image import CACHE, TRACE_VOLUME, TRACES, cache_volume, trace_volume, train_image
from modal_jobs.running import one_line_errors, say
from modal_jobs.training import TrainJob, train_on_volume
from modal_jobs.uploading import upload_trace
from profiler.errors import SpecmoeError, first_line
from profiler.models.gpus import find_gpu
from profiler.trace.reader import Trace
from profiler.trace.schema import MANIFEST_FILE
from speculation.data.tasks import Task
from speculation.predictors.registry import find_predictor

DEFAULT_GPU = "A10"

app = modal.App("specmoe-train")


@app.function(
    image=train_image(),
    gpu=DEFAULT_GPU,
    volumes={CACHE: cache_volume, TRACES: trace_volume},
    timeout=24 * 60 * 60,
    retries=modal.Retries(max_retries=2, initial_delay=1.0),
)
def train(job: TrainJob, volume: str) -> str:
    """Train on the mounted Volume `volume`. Returns an error message of one line, empty without an error."""
    try:
        train_on_volume(Path(TRACES), job, Path("/tmp/specmoe"), say=say)
    except SpecmoeError as error:
        return first_line(error)
    modal.Volume.from_name(volume).commit()
    return ""


@app.local_entrypoint()
def main(
    run_id: str | None = None,
    trace: str | None = None,
    predictor: str = "recommended",
    task: str = Task.NEXT_LAYER.value,
    out: str | None = None,
    horizon: int = 1,
    epochs: int | None = None,
    batch_tokens: int | None = None,
    learning_rate: float | None = None,
    patience: int | None = None,
    seed: int | None = None,
    gpu: str = DEFAULT_GPU,
    volume: str = TRACE_VOLUME,
) -> None:
    """Train a predictor on a run or a local trace, and download it."""
    with one_line_errors("train"):
        find_gpu(gpu, rented=True)
        defaults = find_predictor(predictor).defaults
        if task not in set(Task):
            raise SpecmoeError(f"unknown task {task!r}: expected one of {', '.join(Task)}")
        if (run_id is None) == (trace is None):
            raise SpecmoeError("expected either --run-id, of a collected run, or --trace, a local trace folder")
        target = Path(out or f"runs/{predictor}")
        if target.exists():
            raise SpecmoeError(f"{target} exists: choose another --out")
        store = trace_volume if volume == TRACE_VOLUME else modal.Volume.from_name(volume).hydrate()
        source = run_id if run_id is not None else upload_trace(store, Trace.open(str(trace)))
        given: dict[str, Any] = {
            "epochs": epochs,
            "batch_tokens": batch_tokens,
            "learning_rate": learning_rate,
            "patience": patience,
            "seed": seed,
        }
        options = replace(defaults, **{name: value for name, value in given.items() if value is not None})
        job = TrainJob(source=str(source), predictor=predictor, task=Task(task), horizon=horizon, options=options)
        remote = train.with_options(gpu=gpu, volumes={CACHE: cache_volume, TRACES: store})
        refusal = remote.remote(job, volume)
        if refusal:
            raise SpecmoeError(refusal)
        # An earlier download of another job may have left files there: `fetch_trace` removes them.
        building = target.with_name(target.name + ".part")
        fetched = fetch_trace(store, job.name, building)
        (building / MANIFEST_FILE).unlink()
        building.rename(target)
        print(f"{target}: {fetched / 1e6:.1f} MB downloaded and verified")
        _print_evaluation(target)


def _print_evaluation(run: Path) -> None:
    from speculation.evaluation_tables import print_evaluation

    if (run / EVALUATION_FILE).is_file():
        print_evaluation(read_evaluation(run))
