"""Train a predictor, and the counting baselines beside it, on the training problems of a trace."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from profiler.errors import SpecmoeError
from profiler.reader import Trace
from speculation.predictors import TrainingOptions, find_predictor
from speculation.routes import EmptyPartError, Routes, load_routes
from speculation.runs import BASELINES, Run, load_run, save_run
from speculation.tasks import Shape, Task


def train(
    trace: Trace,
    predictor_name: str,
    out: Path,
    *,
    task: Task = Task.NEXT_LAYER,
    horizon: int = 1,
    options: TrainingOptions = TrainingOptions(),  # noqa: B008 - frozen
    on_progress: Callable[[int, int, dict[str, float]], None] = lambda done, total, entry: None,
) -> Run:
    """Fit on the training part of the split, stop early on the validation part, and write the run directory `out`.

    Raises `SpecmoeError` for an unknown predictor or horizon, if `out` is taken, or if no problem is left to train on.
    """
    predictor_class = find_predictor(predictor_name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SpecmoeError(f"{out} exists and is not an empty folder: choose another --out")
    shape = Shape.of(trace.metadata.model, horizon, task)
    train_routes = load_routes(trace, "train")
    validation = _validation(trace)
    began = time.monotonic()
    predictor = predictor_class(shape)
    history = predictor.fit(train_routes, validation, options, on_progress)
    seconds = time.monotonic() - began
    baselines = {}
    for name in BASELINES:
        baselines[name] = find_predictor(name)(shape)
        baselines[name].fit(train_routes, None, options, on_progress)
    facts = {
        "train_seconds": round(seconds, 2),
        "train_problems": train_routes.num_problems,
        "train_tokens": len(train_routes),
        "validation_problems": validation.num_problems if validation else 0,
    }
    save_run(out, predictor, baselines, options, history, facts, trace)
    return load_run(out)


def _validation(trace: Trace) -> Routes | None:
    try:
        return load_routes(trace, "validation")
    except EmptyPartError:
        # Few problems: none fell into the validation part, so there is no early stopping.
        return None
