"""Commands over predictors: train, evaluate, predictors."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from analysis.documents.evaluation import Evaluation, table
from profiler.errors import SpecmoeError
from profiler.trace.reader import Trace
from profiler.trace.writer import write_text
from speculation.data.tasks import Shape, Task

if TYPE_CHECKING:
    from speculation.evaluation.leaderboard import Row

app = typer.Typer()
console = Console(highlight=False)
messages = Console(stderr=True, highlight=False)
# Between two lines of progress where there is no terminal.
SAY_SECONDS = 10.0
# gpt-oss-20b, for which sizes are told.
SIZED = Shape(layers=24, experts=32, top_k=4, horizon=1)


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
    adaptive_context: Annotated[
        bool, typer.Option("--adaptive-context", help="All of it only where the routing is uncertain, else two tokens.")
    ] = False,
    shared_layers: Annotated[bool, typer.Option("--shared-layers", help="One head for all layers, not one each.")] = False,
    router_inputs: Annotated[
        bool, typer.Option("--router-inputs", help="Look at the router inputs too (mlp, hybrid, transformer).")
    ] = False,
    shards_per_group: Annotated[
        int | None, typer.Option(min=1, help="Hold so many routing files at a time in memory; default: the whole trace.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    push: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Then upload the run to the Hugging Face hub as a model.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: make the model private.")] = False,
) -> None:
    """Train an expert predictor on the training problems of a trace. Settings that are not given are the predictor's own.

    Example: specmoe train traces/math --predictor recommended --out runs/math
    """
    from speculation.predictors.registry import find_predictor

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
        "adaptive_context": adaptive_context,
        "shared_layers": shared_layers,
        "router_inputs": router_inputs,
        "shards_per_group": shards_per_group,
        "seed": seed,
    }
    options = replace(find_predictor(predictor).defaults, **{name: value for name, value in given.items() if value is not None})
    other = None if validation is None else Trace.open(validation)
    if private and push is None:
        raise typer.BadParameter("goes with --push", param_hint="--private")
    print_run(
        train_with_progress(
            Trace.open(trace), predictor, out, task=task, horizon=horizon, validation=other, options=options, resume=resume
        )
    )
    if push is not None:
        from speculation.training.card import push_run

        typer.echo(push_run(out, push, private=private))


def wait_passively() -> None:
    """Have threads that wait for each other sleep instead of spin, if PyTorch is not loaded yet.

    OpenMP spins by default: as soon as another process takes a core, a step takes several times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def train_with_progress(trace: Trace, predictor: str, out: Path, **settings: Any) -> Any:
    """`speculation.training.fit.train` with a progress bar, or plain lines where there is no terminal."""
    wait_passively()
    from speculation.training.fit import train as run

    if not messages.is_terminal:
        messages.print(f"training {predictor} on {trace.path}")
        said = [time.monotonic()]

        def report(done: int, total: int, entry: dict[str, float]) -> None:
            if done == 1 or time.monotonic() - said[0] > SAY_SECONDS or done == total:
                said[0] = time.monotonic()
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
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories made by 'specmoe train'.")],
    trace: Annotated[Path, typer.Option(help="The trace to judge it on.")],
    part: Annotated[PartName, typer.Option(help="Part of the split by problem.")] = PartName.test,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every metric and breakdown of a run here.")] = None,
    leaderboard: Annotated[
        Path | None, typer.Option(help="A folder for the runs side by side: a table (.md, .csv), a plot (.html), all metrics.")
    ] = None,
) -> None:
    """Judge predictors on held-out problems, beside chance, the baselines and a shuffled control.

    Example: specmoe evaluate runs/math-mlp --trace traces/math --json math-mlp.json

    Example: specmoe evaluate runs/* --trace traces/math --leaderboard boards/math
    """
    from speculation.evaluation.evaluate import evaluate as judge
    from speculation.evaluation.leaderboard import write_leaderboard
    from speculation.training.runs import load_run

    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise SpecmoeError(f"--json {json_file}: no such folder")
    if json_file is not None and len(runs) > 1:
        raise SpecmoeError("--json is for one run: for several, --leaderboard writes leaderboard.json")
    opened_runs = [load_run(run) for run in runs]
    opened = Trace.open(trace)
    documents: list[Evaluation] = []
    judged: set[Any] = set()
    for loaded in opened_runs:
        # Baselines of the same training problems and horizon are the same.
        fitted_on = (loaded.trace_sha256, loaded.trained_on.tobytes(), loaded.predictor.shape)
        documents.append(judge(loaded, opened, part=part.value, with_baselines=leaderboard is None or fitted_on not in judged))
        judged.add(fitted_on)
        if leaderboard is None:
            print_evaluation(documents[-1])
        else:
            messages.print(f"judged {escape(str(loaded.path))}")
    if json_file is not None:
        write_text(json_file, documents[0].to_json())
    if leaderboard is not None:
        print_leaderboard(write_leaderboard(documents, leaderboard), documents[0])
        typer.echo(f"{leaderboard}: leaderboard.md, .csv, .json, .html")


def print_evaluation(evaluation: Evaluation) -> None:
    """One table per horizon, with what the numbers mean."""
    horizons = len(next(iter(evaluation.results.values())).metrics)
    for horizon in range(1, horizons + 1):
        rows = table(evaluation, horizon)
        shown = Table(
            box=None, title=f"{_predicted(evaluation.task, horizon)}, {escape(evaluation.model)}", title_justify="left"
        )
        for column in rows[0]:
            shown.add_column(column, justify="left" if column == "predictor" else "right", no_wrap=True)
        for row in rows:
            shown.add_row(*row.values())
        console.print(shown)
    trained_on = evaluation.trained_on
    what = f"Not held out (the run was trained on {trained_on} of them)" if trained_on else "Held out"
    part = f"{evaluation.part} part of a split {evaluation.split}" if evaluation.part != "all" else "the whole trace"
    typer.echo(
        f"{what}: {evaluation.problems} problems, {evaluation.tokens:,} tokens; {part}. "
        "In brackets: 95 % interval over problems."
    )
    for line in _apart(evaluation):
        typer.echo(line)
    for caveat in evaluation.caveats:
        typer.echo(f"Note: {caveat}")


def _apart(evaluation: Evaluation) -> list[str]:
    """The predictor with and without the problems of each kind that the trace tells apart, such as looping answers."""
    result = evaluation.results[evaluation.predictor]
    k_name = result.recall_at_k_name
    lines = []
    for name, groups in result.groupings.items():
        if set(groups) == {"false", "true"} and all(groups.values()):
            without, only = (f"{groups[side][k_name]:.3f} (exact {groups[side]['exact']:.3f})" for side in ("false", "true"))
            lines.append(f"{evaluation.predictor}, {k_name}: {without} without {name} problems, {only} on these.")
    return lines


def print_leaderboard(rows: list[Row], document: Evaluation) -> None:
    """The table of `speculation.evaluation.leaderboard`, for people."""
    k_name = document.recall_at_k_name
    title = f"{document.task}, {escape(document.model)}; {document.problems} problems, {document.tokens:,} tokens"
    shown = Table(box=None, title=title, title_justify="left")
    for column in ("run", "h", k_name, "exact", "control", "parameters", "µs"):
        shown.add_column(column, justify="left" if column == "run" else "right", no_wrap=True)
    shown.add_row("chance", "", f"{document.chance[k_name]:.3f}", f"{document.chance['exact']:.3f}", "", "", "")
    for row in rows:
        shown.add_row(
            escape(row.run),
            str(row.horizon),
            f"{row.recall:.3f} ({row.low:.3f}-{row.high:.3f})",
            f"{row.exact:.3f}",
            "" if row.control is None else f"{row.control:.3f}",
            "" if row.parameters is None else f"{row.parameters:,}",
            "" if row.microseconds_per_prediction is None else f"{row.microseconds_per_prediction:,.0f}",
        )
    console.print(shown)


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
    from speculation.predictors.registry import predictor_classes

    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "tasks": sorted(cls.tasks),
            "sees": cls.sees,
            "about": cls.about,
            "source": cls.source,
            "parameters": cls.parameters_for(SIZED),
        }
        for name, cls in predictor_classes().items()
    ]
    if as_json:
        console.print_json(json.dumps(rows))
        return
    for row in rows:
        typer.echo(f"{row['name']:<20} {row['about']}")
        typer.echo(f"{'':<20} sees {row['sees']}; predicts {', '.join(row['tasks'])}; {row['source']}")
        size = "as many as the data needs" if row["parameters"] is None else f"{row['parameters']:,}"
        typer.echo(
            f"{'':<20} parameters: {size} for {SIZED.layers} layers of {SIZED.experts} experts, top-{SIZED.top_k}, h = 1"
        )
