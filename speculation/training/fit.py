"""Train a predictor, and the counting baselines it is compared with, on the training problems of a trace."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.errors import EmptyPartError, SpecmoeError, UsageError
from profiler.trace.reader import Trace
from profiler.trace.splits import problem_digests, split_key
from speculation.data.groups import RouteGroups
from speculation.data.routes import RouteSource, each_group, load_routes, route_digests
from speculation.data.tasks import Shape, Task
from speculation.predictors.neural.base import NeuralPredictor
from speculation.predictors.neural.training_loop import CHECKPOINTS, fixed_options
from speculation.predictors.options import Progress, TrainingOptions
from speculation.predictors.registry import find_predictor
from speculation.training.runs import (
    BASELINES,
    CONFIG_FILE,
    Run,
    baseline_shape,
    load_run,
    manifest_sha256,
    problems_sha256,
    save_run,
)

Load = Callable[[Trace, str, npt.NDArray[np.uint64] | None], RouteSource]
"""Loads one part of a trace, in one group or in several, without the problems that have one of the digests."""


def train(
    trace: Trace,
    predictor_name: str,
    out: Path,
    *,
    task: Task = Task.NEXT_LAYER,
    horizon: int = 1,
    validation: Trace | None = None,
    without: npt.NDArray[np.uint64] | None = None,
    options: TrainingOptions | None = None,
    resume: bool = False,
    on_progress: Progress = lambda done, total, entry: None,
) -> Run:
    """Train a predictor on the training part of a trace and write the run directory `out`.

    Neural predictors stop early by the loss on the validation part.

    Args:
        trace: The trace to train on.
        predictor_name: A name listed by `specmoe predictors`.
        out: The run directory to write. It must not exist, or be empty.
        task: What the predictor predicts.
        horizon: H, how far ahead it predicts: layers, or tokens for `next-token`.
        validation: Another trace for early stopping. All of `trace` is then used for training, and problems that the two
            traces share are left out of the validation.
        without: Neither train on nor validate with problems of `trace` that have these digests (see `route_digests`).
        options: Training options; None for the predictor's defaults.
        resume: Continue an interrupted training in `out` from its last checkpoint. A finished one is loaded.
        on_progress: Called after every epoch.

    Returns:
        The finished run.

    Raises:
        SpecmoeError: The predictor is unknown, the horizon or an option does not suit it, `out` is not empty, there is nothing
            to resume or something else than this training, no problem is left to train on or is long enough for the horizon,
            or training diverges.

    Example:
        >>> from pathlib import Path
        >>> from profiler import Trace
        >>> from speculation import Task, train
        >>> run = train(Trace.open("traces/math"), "conditional-counts", Path("runs/counts"), task=Task.NEXT_LAYER, horizon=2)
    """
    predictor_class = find_predictor(predictor_name)
    _check_out(out, resume)
    shape = Shape.of(trace.metadata.model, horizon, task)
    predictor = predictor_class(shape)
    options = options or predictor_class.defaults
    if options.router_inputs and not (predictor_class.can_take_router_inputs or predictor_class.needs_router_inputs):
        raise UsageError(f"{predictor_name} does not use router inputs: leave out router_inputs")
    needs = predictor_class.needs_router_inputs or options.router_inputs

    def load(of: Trace, part: str, without: npt.NDArray[np.uint64] | None) -> RouteSource:
        if options.shards_per_group is None:
            return load_routes(of, part, router_inputs=needs, without=without)
        return RouteGroups(of, part, options.shards_per_group, router_inputs=needs, without=without)

    train_routes = load(trace, "train" if validation is None else "all", without)
    _check_targets(train_routes, shape, trace.path)
    shared = 0
    if validation is None:
        found = _validation_part(trace, load, without)
        validation_routes = found if found is not None and _has_targets(found, shape) else None
    else:
        validation_routes, shared = _validation_trace(trace, train_routes, validation, shape, load)
        _check_targets(validation_routes, shape, validation.path)
    trained_on = route_digests(trace, train_routes)
    validated_on, validation_sha256 = None, None
    # Counting predictors have no epochs, and so look at nothing but the training problems.
    if isinstance(predictor, NeuralPredictor) and validation_routes is not None:
        validated_on = problems_sha256(route_digests(validation or trace, validation_routes))
        validation_sha256 = None if validation is None else manifest_sha256(validation)
    if resume and (out / CONFIG_FILE).is_file():
        compared = {
            "predictor": predictor_name,
            "task, horizon or model": shape,
            "trace": manifest_sha256(trace),
            "training options": fixed_options(asdict(options)),
            "training problems": trained_on.tolist(),
            "validation problems": validated_on,
            "validation trace": validation_sha256,
        }
        return _finished(out, compared)
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    try:
        history = predictor.fit(train_routes, validation_routes, options, on_progress, out)
    except SpecmoeError:
        if not any(out.iterdir()):
            out.rmdir()
        raise
    seconds = time.monotonic() - began
    baselines = {}
    for name in BASELINES:
        baselines[name] = find_predictor(name)(baseline_shape(shape))
        baselines[name].fit(train_routes, None, options, on_progress)
    facts: dict[str, Any] = {
        "train_seconds": round(seconds, 2),
        "train_problems": len(train_routes.problem_ids),
        "train_tokens": len(train_routes),
        "validation_problems": len(validation_routes.problem_ids) if validation_routes else 0,
        "shared_problems": shared,
        "validated_on": validated_on,
        "validation_sha256": validation_sha256,
    }
    save_run(out, predictor, baselines, options, history, facts, trace, trained_on)
    return load_run(out)


def _finished(out: Path, compared: dict[str, Any]) -> Run:
    """The finished run in `out`. Raises `SpecmoeError` if it differs from the training that was requested."""
    run = load_run(out)
    found = {
        "predictor": run.name,
        "task, horizon or model": run.predictor.shape,
        "trace": run.trace_sha256,
        "training options": fixed_options(run.options),
        "training problems": run.trained_on.tolist(),
        "validation problems": run.facts.validated_on,
        "validation trace": run.facts.validation_sha256,
    }
    for what, value in compared.items():
        if found[what] != value:
            raise SpecmoeError(f"{out} is a finished run, and its {what} differ from the requested: choose another folder")
    return run


def _check_out(out: Path, resume: bool) -> None:
    is_empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if resume and not is_empty and not (out / CHECKPOINTS).is_dir() and not (out / CONFIG_FILE).is_file():
        raise SpecmoeError(f"{out} has no {CHECKPOINTS}/: nothing to resume")
    if not resume and not is_empty:
        hint = ", or resume its training" if (out / CHECKPOINTS).is_dir() and not (out / CONFIG_FILE).is_file() else ""
        raise SpecmoeError(f"{out} exists and is not an empty folder: choose another folder{hint}")


def _check_targets(routes: RouteSource, shape: Shape, path: Path) -> None:
    """Raise `SpecmoeError` if no problem is long enough to predict anything: its loss would be 0 whatever is predicted."""
    if not _has_targets(routes, shape):
        raise SpecmoeError(
            f"{path}: no problem to train on or to validate with has a token {shape.horizon} after another one, so "
            f"{shape.task} has nothing to predict: choose a smaller horizon, or a trace of longer problems"
        )


def _has_targets(routes: RouteSource, shape: Shape) -> bool:
    if shape.task != Task.NEXT_TOKEN:
        return True
    return any(group.followers_T.max(initial=0) >= shape.horizon for group in each_group(routes))


def _validation_part(trace: Trace, load: Load, without: npt.NDArray[np.uint64] | None) -> RouteSource | None:
    try:
        return load(trace, "validation", without)
    except EmptyPartError:
        # With few problems, none may fall into the validation part: train without early stopping.
        return None


def _validation_trace(
    trace: Trace, train_routes: RouteSource, validation: Trace, shape: Shape, load: Load
) -> tuple[RouteSource, int]:
    """All routes of another trace, except those of problems that are trained on, and the number of these."""
    shape.check(validation.metadata, validation.path, trace.path)
    if split_key(validation) != split_key(trace) or split_key(trace) in {"source key", "problem id"}:
        raise SpecmoeError(
            f"{trace.path} and {validation.path} do not both contain prompts, or the same hash of them: "
            "problems that they share could not be detected"
        )
    trained_on = route_digests(trace, train_routes)
    digests = np.array(list(problem_digests(validation).values()), dtype=np.uint64)
    shared = int(np.isin(digests, trained_on).sum())
    if shared == len(digests):
        raise SpecmoeError(
            f"{validation.path} has no problem that is not in {trace.path}, too: choose another validation trace"
        )
    return load(validation, "all", trained_on), shared
