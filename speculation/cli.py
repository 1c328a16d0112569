"""The commands `train`, `evaluate` and `predictors`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from analysis.documents.evaluation import Evaluation
from profiler.errors import SpecmoeError, UsageError, counted
from profiler.trace.reader import Trace
from profiler.trace.writer import write_text
from speculation.data.tasks import Shape, Task
from speculation.evaluation_tables import print_evaluation, print_leaderboard

app = typer.Typer()
console = Console(highlight=False)
messages = Console(stderr=True, highlight=False)
# Between two lines of progress in a file or a pipe.
PROGRESS_SECONDS = 10.0
# gpt-oss-20b: `specmoe predictors` lists the parameters that a predictor for it has.
REFERENCE_SHAPE = Shape(layers=24, experts=32, top_k=4, horizon=1)


class Precision(StrEnum):
    """Mixed precision for training."""

    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


class PartName(StrEnum):
    """Parts of the split by problem."""

    test = "test"
    validation = "validation"
    train = "train"
    all = "all"


@app.command()
def train(
    trace: Annotated[Path, typer.Argument(help="A trace directory.")],
    out: Annotated[Path, typer.Option(help="The run directory to create.")],
    predictor: Annotated[
        str | None,
        typer.Option(
            help="Name of the predictor to train; 'specmoe predictors' lists them. Default: recommended; reuse for that task."
        ),
    ] = None,
    task: Annotated[
        Task,
        typer.Option(
            help="What to predict. next-layer: a token's experts at the next layers, after each layer. next-token: the experts "
            "of the next tokens at all layers. whole-path: a token's experts at all layers, before its first. reuse: how soon "
            "each expert is used again, from which a cache decides what to keep."
        ),
    ] = Task.NEXT_LAYER,
    horizon: Annotated[
        int, typer.Option(min=1, help="How many layers ahead to predict (next-token: tokens; whole-path, reuse: 1).")
    ] = 1,
    validation: Annotated[
        Path | None,
        typer.Option(
            help="Another trace for early stopping; all of TRACE is then used for training, and problems of both are left out "
            "of the other. Default: TRACE's validation part."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume an interrupted training in --out; a finished one is left as it is.")
    ] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="Maximum number of epochs.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per training step, each with all its layers.")] = None,
    epoch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens per epoch, drawn at random. Default: all training tokens.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(min=1e-8, help="Peak learning rate, after warm-up.")] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0, help="Weight decay of AdamW.")] = None,
    dropout: Annotated[float | None, typer.Option(min=0, max=0.9, help="Dropout probability.")] = None,
    accumulate: Annotated[
        int | None, typer.Option(min=1, help="Gradient accumulation: training steps per update of the weights.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many epochs without a lower validation loss.")
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Mixed precision. Default: bf16 if the device computes in it, else no.")
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(min=0, help="Time limit in seconds: training stops after the epoch that exceeds it.")
    ] = None,
    width: Annotated[int | None, typer.Option(min=1, max=8192, help="Hidden size of the network.")] = None,
    context: Annotated[
        int | None, typer.Option(min=1, max=256, help="How many tokens' routes the network reads in order.")
    ] = None,
    adaptive_context: Annotated[
        bool,
        typer.Option(
            "--adaptive-context", help="Read the whole context only where the routing is uncertain, elsewhere two tokens."
        ),
    ] = False,
    shared_layers: Annotated[
        bool, typer.Option("--shared-layers", help="Share one output head among all layers, instead of one per layer.")
    ] = False,
    router_inputs: Annotated[
        bool, typer.Option("--router-inputs", help="Also read recorded router inputs (mlp, hybrid, transformer).")
    ] = False,
    shards_per_group: Annotated[
        int | None,
        typer.Option(min=1, help="Load this many routing files into memory at a time. Default: the whole trace at once."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Random seed.")] = None,
    push: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Upload the finished run to the Hugging Face hub as a model.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the uploaded model private (with --push).")] = False,
    push_texts: Annotated[
        bool,
        typer.Option(
            "--push-texts",
            help="Allow --push to upload texts of training problems (token ids and routes), which runs of recommended and "
            "reuse contain.",
        ),
    ] = False,
) -> None:
    """Train an expert predictor on the training problems of a trace.

    Training settings that are left out take the predictor's own defaults.

    Example: specmoe train traces/math --predictor recommended --out runs/math
    """
    from speculation.predictors.registry import find_predictor
    from speculation.training.runs import CONFIG_FILE

    predictor = predictor or ("recommended" if task.predicts_experts else "reuse")
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
    for flag, is_given in (("--private", private), ("--push-texts", push_texts)):
        if is_given and push is None:
            raise typer.BadParameter("needs --push", param_hint=flag)
    has_texts = find_predictor(predictor).keeps_training_texts()
    if push is not None and has_texts and not push_texts:
        # Before hours of training, not after them.
        raise typer.BadParameter(
            f"a run of {predictor} contains texts of its training problems (token ids and routes): add --push-texts to upload "
            f"them, or train {predictor}-small, which keeps none",
            param_hint="--push",
        )
    is_finished = resume and (out / CONFIG_FILE).is_file()
    run = train_with_progress(
        Trace.open(trace), predictor, out, task=task, horizon=horizon, validation=other, options=options, resume=resume
    )
    if is_finished:
        typer.echo(f"{out} is already finished")
    print_run(run)
    if push is not None:
        from speculation.training.push import push_run

        if has_texts:
            typer.echo(f"Uploading to {push}, with texts of training problems (token ids and routes)")
        typer.echo(push_run(run, push, private=private, with_texts=push_texts))


def wait_passively() -> None:
    """Make OpenMP's waiting threads sleep instead of spin. It takes effect only before PyTorch is imported.

    OpenMP spins by default: as soon as another process takes a core, a step takes several times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def train_with_progress(trace: Trace, predictor: str, out: Path, **settings: Any) -> Any:
    """Run `speculation.training.fit.train` with a progress bar, or with plain lines in a file or a pipe."""
    wait_passively()
    from speculation.training.fit import train as run

    if not messages.is_terminal:
        messages.print(f"training {predictor} on {trace.path}")
        last_printed = [time.monotonic()]

        def report(done: int, total: int, entry: dict[str, float]) -> None:
            if done == 1 or time.monotonic() - last_printed[0] > PROGRESS_SECONDS or done == total:
                last_printed[0] = time.monotonic()
                messages.print(f"epoch {done} of {total}: {_losses(entry)}")

        return run(trace, predictor, out, on_progress=report, **settings)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=messages, transient=True, redirect_stdout=False, redirect_stderr=False) as progress:
        bar = progress.add_task(f"training {predictor}", total=None)

        def update(done: int, total: int, entry: dict[str, float]) -> None:
            progress.update(bar, completed=done, total=total, description=f"training {predictor}, {_losses(entry)}")

        return run(trace, predictor, out, on_progress=update, **settings)


def print_run(run: Any) -> None:
    """Print a summary of a trained run."""
    shape, facts = run.predictor.shape, run.facts
    typer.echo(
        f"{run.path}: {run.name}, {facts.parameters:,} parameters, trained in {facts.train_seconds:.1f} s on "
        f"{counted(facts.train_problems, 'problem')} ({facts.train_tokens:,} tokens) for {shape.task}, horizon {shape.horizon}"
    )
    if facts.history and not facts.validation_problems:
        typer.echo(f"No early stopping, because there are no validation problems: {counted(len(facts.history), 'epoch')}")
    if facts.shared_problems:
        typer.echo(f"{counted(facts.shared_problems, 'problem')} left out of the validation trace, because training uses them")


def _losses(entry: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in entry.items() if name.endswith("loss"))


@app.command()
def evaluate(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories that 'specmoe train' wrote.")],
    trace: Annotated[Path, typer.Option(help="The trace to evaluate on.")],
    part: Annotated[PartName, typer.Option(help="Which problems to evaluate on: a part of the split.")] = PartName.test,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="Write all metrics and breakdowns to this file, and the predictions of some problems token by token, which "
            "'specmoe analyze --evaluation' shows (a single run only).",
        ),
    ] = None,
    leaderboard: Annotated[
        Path | None,
        typer.Option(
            help="Write a comparison of all runs to this folder: tables (.md, .csv), plots (.html) and all metrics (.json). "
            "Runs that differ in their seed only are also summarized."
        ),
    ] = None,
) -> None:
    """Evaluate trained predictors on held-out problems.

    The results are compared with chance, with the baselines and with a shuffled control. For a trace without routing weights,
    metrics that depend on them, or on which expert is the strongest, are left out.

    Example: specmoe evaluate runs/math-mlp --trace traces/math --json math-mlp.json

    Example: specmoe evaluate runs/* --trace traces/math --leaderboard boards/math
    """
    from speculation.evaluation.evaluate import evaluate as evaluate_run
    from speculation.evaluation.leaderboard import write_leaderboard
    from speculation.evaluation.leaderboard_rows import seed_summaries
    from speculation.training.runs import load_run

    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise SpecmoeError(f"--json {json_file}: no such folder")
    if json_file is not None and len(runs) > 1:
        raise UsageError("--json is for one run: use --leaderboard for several, it writes leaderboard.json")
    opened_runs = [load_run(run) for run in runs]
    opened = Trace.open(trace)
    documents: list[Evaluation] = []
    evaluated_baselines: set[Any] = set()
    for loaded in opened_runs:
        with_baselines = leaderboard is None or loaded.baselines_from not in evaluated_baselines
        documents.append(
            evaluate_run(loaded, opened, part=part.value, with_baselines=with_baselines, with_sample=json_file is not None)
        )
        evaluated_baselines.add(loaded.baselines_from)
        if leaderboard is None:
            print_evaluation(documents[-1])
        else:
            messages.print(f"evaluated {escape(str(loaded.path))}")
    if json_file is not None:
        write_text(json_file, documents[0].to_json())
    if leaderboard is not None:
        print_leaderboard(write_leaderboard(documents, leaderboard), documents[0], seed_summaries(documents))
        typer.echo(f"{leaderboard}: leaderboard.md, .csv, .json, .html; metrics.csv, budget.csv, reliability.csv")


@app.command()
def predictors(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List the predictors: what each one is, what it conditions on, which tasks it has, and how large it is.

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
            "parameters": cls.parameters_for(_reference_shape(cls.tasks)),
        }
        for name, cls in predictor_classes().items()
    ]
    if as_json:
        console.print_json(json.dumps(rows))
        return
    for row in rows:
        shape = _reference_shape(row["tasks"])
        ahead = "one layer ahead" if shape.task == Task.NEXT_LAYER else shape.task
        reference = f"{counted(shape.layers, 'MoE layer')} of {shape.experts} experts, top-{shape.top_k}, {ahead}"
        typer.echo(f"{row['name']:<20} {row['about']}")
        typer.echo(f"{'':<20} sees {row['sees']}; predicts {', '.join(row['tasks'])}; {row['source']}")
        size = "depends on the data" if row["parameters"] is None else f"{row['parameters']:,} for {reference}"
        typer.echo(f"{'':<20} parameters: {size}")


def _reference_shape(tasks: Collection[Task]) -> Shape:
    """The shape for which predictors are compared in size: one layer ahead, or the first task of those that predict others."""
    return replace(REFERENCE_SHAPE, task=Task.NEXT_LAYER if Task.NEXT_LAYER in tasks else min(tasks))
