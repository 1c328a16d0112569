"""Commands over predictors: train, evaluate, predictors."""

from __future__ import annotations

import json
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from analysis.predictions import as_evaluation, table
from profiler.errors import SpecmoeError
from profiler.reader import Trace
from profiler.writer import write_text
from speculation.tasks import Task

app = typer.Typer()
console = Console(highlight=False)
messages = Console(stderr=True, highlight=False)


class Precision(StrEnum):
    """Mixed precision of training."""

    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


class PartName(StrEnum):
    """Parts of the split by name."""

    test = "test"
    validation = "validation"
    train = "train"
    all = "all"


@app.command()
def train(
    trace: Annotated[Path, typer.Argument(help="A trace directory.")],
    out: Annotated[Path, typer.Option(help="The run directory to make.")],
    predictor: Annotated[str, typer.Option(help="See 'specmoe predictors'.")] = "recommended",
    task: Annotated[Task, typer.Option(help="What is predicted from what.")] = Task.NEXT_LAYER,
    horizon: Annotated[int, typer.Option(min=1, help="Layers (next-token: tokens) ahead, 1 to H.")] = 1,
    validation: Annotated[
        Path | None, typer.Option(help="Another trace to stop early on: then all of TRACE is trained on.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a training that was cut off.")] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training problems.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per step, each with all its layers.")] = None,
    epoch_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of an epoch, drawn at random; default: all.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=1e-8)] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0)] = None,
    dropout: Annotated[float | None, typer.Option(min=0, max=0.9)] = None,
    accumulate: Annotated[int | None, typer.Option(min=1, help="Steps per update of the weights.")] = None,
    patience: Annotated[int | None, typer.Option(min=1, help="Epochs without better validation loss before stopping.")] = None,
    precision: Annotated[Precision | None, typer.Option(help="Default: what the device is good at.")] = None,
    max_seconds: Annotated[float | None, typer.Option(min=0, help="Stop after the epoch that exceeds this.")] = None,
    width: Annotated[int | None, typer.Option(min=1, max=8192, help="Of the network's states.")] = None,
    context: Annotated[int | None, typer.Option(min=1, max=256, help="Tokens whose routes it sees in order.")] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
) -> None:
    """Train an expert predictor on the training problems of a trace. Settings that are not given are the predictor's own.

    Example: specmoe train traces/math --predictor recommended --out runs/math
    """
    from speculation.predictors import find_predictor

    given: dict[str, Any] = {
        "epochs": epochs,
        "batch_tokens": batch_tokens,
        "epoch_tokens": epoch_tokens,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "dropout": dropout,
        "accumulate": accumulate,
        "patience": patience,
        "precision": precision.value if precision else None,
        "max_seconds": max_seconds,
        "width": width,
        "context": context,
        "seed": seed,
    }
    options = replace(find_predictor(predictor).defaults, **{name: value for name, value in given.items() if value is not None})
    other = None if validation is None else Trace.open(validation)
    print_run(
        train_with_progress(
            Trace.open(trace), predictor, out, task=task, horizon=horizon, validation=other, options=options, resume=resume
        )
    )


def train_with_progress(trace: Trace, predictor: str, out: Path, **settings: Any) -> Any:
    """`speculation.train.train` with a progress bar, or plain lines where there is no terminal."""
    from speculation.train import train as run

    if not messages.is_terminal:

        def report(done: int, total: int, entry: dict[str, float]) -> None:
            if done == 1 or done % 5 == 0:
                messages.print(f"epoch {done} of {total}: {_losses(entry)}")

        return run(trace, predictor, out, on_progress=report, **settings)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=messages, transient=True, redirect_stdout=False, redirect_stderr=False) as progress:
        bar = progress.add_task(f"training {predictor}", total=None)

        def update(done: int, total: int, entry: dict[str, float]) -> None:
            progress.update(bar, completed=done, total=total, description=f"training {predictor}, {_losses(entry)}")

        return run(trace, predictor, out, on_progress=update, **settings)


def print_run(run: Any) -> None:
    """The end of `train`, for people."""
    shape = run.predictor.shape
    facts = json.loads((run.path / "metrics.json").read_text(encoding="utf-8"))
    typer.echo(
        f"{run.path}: {run.name}, {facts['parameters']:,} parameters, trained in {facts['train_seconds']:.1f} s on "
        f"{facts['train_problems']} problems ({facts['train_tokens']:,} tokens) for {shape.task}, horizon {shape.horizon}"
    )


def _losses(entry: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in entry.items() if name.endswith("loss"))


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run directory made by 'specmoe train'.")],
    trace: Annotated[Path, typer.Option(help="The trace to judge it on.")],
    part: Annotated[PartName, typer.Option(help="Part of the split by problem.")] = PartName.test,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every metric and breakdown here.")] = None,
) -> None:
    """Judge a predictor on held-out problems, beside chance, the baselines and a shuffled control.

    Example: specmoe evaluate runs/math-mlp --trace traces/math --json math-mlp.json
    """
    from speculation.evaluate import evaluate as judge
    from speculation.runs import load_run

    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise SpecmoeError(f"--json {json_file}: no such folder")
    document = judge(load_run(run), Trace.open(trace), part=part.value)
    print_evaluation(document)
    if json_file is not None:
        write_text(json_file, json.dumps(document, indent=1, allow_nan=False) + "\n")


def print_evaluation(document: dict[str, Any]) -> None:
    """One table per horizon, with what the numbers mean."""
    evaluation = as_evaluation(document)
    horizons = len(next(iter(document["results"].values()))["metrics"])
    for horizon in range(1, horizons + 1):
        rows = table(evaluation, horizon)
        shown = Table(
            box=None, title=f"{_predicted(evaluation.task, horizon)}, {escape(document['model'])}", title_justify="left"
        )
        for column in rows[0]:
            shown.add_column(column, justify="left" if column == "predictor" else "right", no_wrap=True)
        for row in rows:
            shown.add_row(*row.values())
        console.print(shown)
    trained_on = document["trained_on"]
    what = f"Not held out (the run was trained on {trained_on} of them)" if trained_on else "Held out"
    part = f"{document['part']} part of a split {document['split']}" if document["part"] != "all" else "the whole trace"
    typer.echo(
        f"{what}: {document['problems']} problems, {document['tokens']:,} tokens; {part}. "
        "In brackets: 95 % interval over problems."
    )
    for caveat in document["caveats"]:
        typer.echo(f"Note: {caveat}")


def _predicted(task: str, horizon: int) -> str:
    if task == Task.NEXT_LAYER:
        return "Experts of the next layer" if horizon == 1 else f"Experts of {horizon} layers ahead"
    if task == Task.NEXT_TOKEN:
        return "Experts of the next token" if horizon == 1 else f"Experts of {horizon} tokens ahead"
    return "Experts of a token, before any of its layers"


@app.command()
def predictors(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List predictors by name.

    Example: specmoe predictors
    """
    from speculation.predictors import predictor_classes

    rows = [
        {"name": name, "tasks": sorted(cls.tasks), "sees": cls.sees, "about": cls.about, "source": cls.source}
        for name, cls in predictor_classes().items()
    ]
    if as_json:
        console.print_json(json.dumps(rows))
        return
    for row in rows:
        typer.echo(f"{row['name']:<20} {row['about']}")
        typer.echo(f"{'':<20} sees {row['sees']}; predicts {', '.join(row['tasks'])}; {row['source']}")
