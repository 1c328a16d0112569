"""What the studies of predictors share: subsets of training problems, runs that are trained once, and their results as rows."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.documents.csv_text import csv_text
from analysis.documents.evaluation import CONTROL, Evaluation
from profiler.errors import SpecmoeError, counted
from profiler.trace.reader import Trace
from profiler.trace.splits import all_digests, part_of_digest, split_key
from profiler.trace.writer import write_text
from speculation.data.tasks import Task
from speculation.evaluation.evaluate import evaluate
from speculation.predictors.neural.training_loop import CHECKPOINTS
from speculation.predictors.options import TrainingOptions
from speculation.predictors.registry import find_predictor
from speculation.training.fit import train
from speculation.training.runs import CONFIG_FILE, Run

Digests = npt.NDArray[np.uint64]
"""Digests that identify problems `[P]`, ascending and without repeats: problems with the same prompt have the same digest."""

# Training options that these studies offer at the command line.
OPTIONS = ("epochs", "epoch_tokens", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every study: predictors, what they predict, and how they are trained."""
    parser.add_argument("trace", type=Path, help="trains on its training part, stops early by its validation part")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and the results; finished runs are kept")
    parser.add_argument(
        "--predictor", action="append", required=True, help="a name that 'specmoe predictors' lists; repeatable"
    )
    parser.add_argument("--task", type=Task, choices=[task for task in Task if task.predicts_experts], default=Task.NEXT_LAYER)
    parser.add_argument("--on", type=Path, help="evaluate on this trace instead of the test part of the first")
    for name in OPTIONS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="default: the predictor's own")


def study_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of every study: `trace`, `predictors` with their options, `out`, `other` and `task`."""
    given = {name: getattr(arguments, name) for name in OPTIONS if getattr(arguments, name) is not None}
    return {
        "trace": Trace.open(arguments.trace),
        "predictors": {name: replace(find_predictor(name).defaults, **given) for name in arguments.predictor},
        "out": arguments.out,
        "other": None if arguments.on is None else Trace.open(arguments.on),
        "task": arguments.task,
    }


def heading(rows: list[dict[str, Any]], k_name: str) -> str:
    """The line above the tables of a study: what their numbers are."""
    return f"\n{k_name} with its 95 % interval over problems; chance {rows[0]['chance']:.3f}"


def digests_of(trace: Trace, problem_ids: Iterable[int] | None = None, part: str = "all") -> Digests:
    """The digests of some problems of a trace, or of all, as far as they are in a part of its split."""
    digests = all_digests(trace)
    chosen = digests.values() if problem_ids is None else (digests[number] for number in problem_ids)
    return np.unique(np.array([each for each in chosen if part in {"all", part_of_digest(each)}], dtype=np.uint64))


def first_by_hash(digests: Digests, share: float) -> Digests:
    """The share (0 to 1) of problems with the lowest digests, at least one: smaller shares are subsets of larger ones."""
    return digests[: max(1, ceil(round(share * len(digests), 6)))]


def trained(
    trace: Trace, predictor: str, out: Path, *, task: Task, options: TrainingOptions, train_on: Digests, validate_on: Digests
) -> Run:
    """The run in `out`, trained on some training problems of `trace`: loaded if it is finished, resumed if it was interrupted.

    Raises:
        SpecmoeError: The run in `out` is of another trace, predictor, task, options, or of other problems to train on or to
            validate with.
    """
    is_resumed = (out / CHECKPOINTS).is_dir() or (out / CONFIG_FILE).is_file()
    if out.exists() and not is_resumed:
        # It was interrupted before its first checkpoint.
        shutil.rmtree(out)
    without = np.setdiff1d(digests_of(trace), np.union1d(train_on, validate_on))
    return train(trace, predictor, out, task=task, without=without, options=options, resume=is_resumed)


def without_early_stopping(run: Run) -> str:
    """A remark, to be appended to what is printed of a run: that there were no problems for early stopping; else empty."""
    epochs = len(run.facts.history)
    # Counting predictors have no epochs.
    if not epochs or run.facts.validation_problems:
        return ""
    return f"; without early stopping ({counted(epochs, 'epoch')}), for lack of validation problems"


def held_out(run: Run, trace: Trace, part: str, evaluate_on: Digests) -> Evaluation:
    """Evaluate a run on some problems of one part of a trace.

    Raises:
        SpecmoeError: The run was trained on one of these problems.
    """
    document = evaluate(run, trace, part=part, without=np.setdiff1d(digests_of(trace), evaluate_on))
    if document.trained_on:
        raise SpecmoeError(
            f"{run.path} was trained on {document.trained_on} of {counted(document.problems, 'problem')} to evaluate on"
        )
    return document


def unseen_problems(trace: Trace, other: Trace | None) -> tuple[Trace, str, Digests]:
    """Where to evaluate: the test part of `trace`, or all problems of `other` that `trace` does not have.

    Returns:
        The trace, the part of its split, and the problems.

    Raises:
        SpecmoeError: Problems of the two traces cannot be compared, or `other` has no problem of its own.
    """
    if other is None:
        return trace, "test", digests_of(trace, part="test")
    keys = {split_key(trace), split_key(other)}
    if len(keys) > 1 or keys & {"source key", "problem id"}:
        raise SpecmoeError(
            f"{trace.path} and {other.path} do not both contain prompts, or the same hash of them: problems that they share "
            "could not be left out"
        )
    unseen = np.setdiff1d(digests_of(other), digests_of(trace))
    if not len(unseen):
        raise SpecmoeError(f"all problems of {other.path} are also in {trace.path}: choose another trace to evaluate on")
    return other, "all", unseen


def result_rows(document: Evaluation, run: Run, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for the run and one for each of its baselines, which were fitted on the same problems; one step ahead.

    facts: further columns, which come first.
    """
    k_name = document.recall_at_k_name
    mass = k_name.replace("recall", "mass")
    rows = []
    for name, result in document.results.items():
        if name.endswith(CONTROL):
            continue
        metrics, (low, high) = result.metrics["h=1"], result.intervals["h=1"][k_name]
        control = document.results.get(f"{name}, {CONTROL}")
        rows.append(
            facts
            | {
                "predictor": name,
                "train_problems": run.facts.train_problems,
                "train_tokens": run.facts.train_tokens,
                "validation_problems": run.facts.validation_problems,
                "problems": document.problems,
                "tokens": document.tokens,
                k_name: metrics[k_name],
                "low": low,
                "high": high,
                "exact": metrics["exact"],
                mass: metrics.get(mass),
                "calibration_error": result.calibration["h=1"].error,
                "control": None if control is None else control.metrics["h=1"][k_name],
                "chance": document.chance[k_name],
                "epochs": len(run.facts.history) if name == document.predictor else 0,
                "train_seconds": run.facts.train_seconds if name == document.predictor else None,
            }
        )
    return rows


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows of the same columns as CSV."""
    write_text(path, csv_text([list(rows[0]), *(list(row.values()) for row in rows)]))


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def shown(row: dict[str, Any], k_name: str) -> str:
    """recall@K of a row, with its 95 % interval."""
    return f"{row[k_name]:.3f} ({row['low']:.3f}-{row['high']:.3f})"
