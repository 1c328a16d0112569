"""Commands that create, convert and show traces: collect, plan, convert, formats, inspect."""

from __future__ import annotations

import json
import os
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from profiler.capture.metadata import describe_kernels
from profiler.collect.options import LocalOptions, RentedOptions
from profiler.errors import SpecmoeError, TraceError, UsageError, counted, missing_extra, printable
from profiler.terminal import console, print_rows
from profiler.terminal_options import switch, typer_command
from profiler.trace.reader import Trace
from profiler.trace.schema import MAX_EXPERTS

if TYPE_CHECKING:
    from profiler.collect.collection import CollectProgress, CollectSummary

app = typer.Typer()
messages = Console(stderr=True, highlight=False)

# Exit code of a shell command that SIGINT ended: 128 + 2.
INTERRUPTED = 130


def run_app(app: typer.Typer, name: str) -> None:
    """Run a command line and exit: 0 on success, 2 on wrong usage, 130 if interrupted, else 1. An error is one line."""
    command = typer.main.get_command(app)
    try:
        result = command.main(args=sys.argv[1:] or ["--help"], prog_name=name, standalone_mode=False)
    except typer.TyperException as error:
        _fail(name, error.format_message(), error.exit_code)
    except (SpecmoeError, OSError) as error:
        _fail(name, str(error), 2 if isinstance(error, UsageError) else 1)
    except ModuleNotFoundError as error:
        _fail(name, missing_extra(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        _fail(name, "interrupted", INTERRUPTED)
    except Exception as error:
        # A bug, or an input broken in an unforeseen way: still one line, which says how to see the traceback.
        if os.environ.get("SPECMOE_TRACEBACK") == "1":
            raise
        _fail(name, f"unexpected {type(error).__name__}: {error} (set SPECMOE_TRACEBACK=1 to see the traceback)", 1)
    else:
        code = result if isinstance(result, int) else 0
        if code == INTERRUPTED:
            _fail(name, "interrupted", INTERRUPTED)
        sys.exit(code)


def _fail(name: str, text: str, code: int) -> None:
    print(f"{name}: {printable(' '.join(text.split()))}", file=sys.stderr)
    sys.exit(code)


AS_JSON = switch("as_json", "--json", "Print the result as JSON.")


@app.command()
@typer_command(LocalOptions, AS_JSON)
def collect(options: LocalOptions, *, as_json: bool) -> None:
    """Run a model over a dataset and record which experts each token uses.

    Example: specmoe collect --model demo --dataset demo-math --num-problems 20 --out traces/math
    """
    if options.load_in_8bit and options.load_in_4bit:
        raise typer.BadParameter("choose one of --load-in-8bit and --load-in-4bit")
    summary = collect_with_progress(options)
    if as_json:
        console.print_json(summary.model_dump_json())
    else:
        print_summary(summary)


@app.command()
@typer_command(RentedOptions, AS_JSON)
def plan(options: RentedOptions, *, as_json: bool) -> None:
    """Show what 'modal run modal_jobs/collect.py' would run with these arguments, on which GPUs, with estimated time and cost.

    Needs no account.

    Example: specmoe plan --model mixtral-8x7b --dataset gsm8k --num-problems 1000
    """
    from profiler.plan.job import make_plan

    planned = make_plan(options, may_guess=True)
    if as_json:
        console.print_json(json.dumps(planned.document()))
    else:
        typer.echo("\n".join(planned.lines()))


def collect_with_progress(options: LocalOptions) -> CollectSummary:
    """`profiler.collect.job.collect` with a progress bar, or with plain lines if standard error is not a terminal."""
    from profiler.collect.job import collect as run

    if not messages.is_terminal:

        def report(progress: CollectProgress) -> None:
            if progress.problems in {max(1, round(share / 4 * progress.total)) for share in range(1, 5)}:
                messages.print(f"{progress.problems} of {counted(progress.total, 'problem')}, {progress.usage}")

        return run(options, on_stage=lambda text: messages.print(f"{text} ..."), on_progress=report)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[usage]}"),
    )
    # A duplicate of the descriptor: while vLLM starts, standard error is redirected to vLLM's log.
    terminal = Console(file=os.fdopen(os.dup(sys.stderr.fileno()), "w"), highlight=False)
    with Progress(*columns, console=terminal, transient=True, redirect_stdout=False, redirect_stderr=False) as progress:
        task = progress.add_task("checking", total=None, usage="")
        return run(
            options,
            on_stage=lambda text: progress.update(task, description=text),
            on_progress=lambda now: progress.update(task, completed=now.problems, total=now.total, usage=str(now.usage)),
        )


def print_summary(summary: CollectSummary) -> None:
    """Print the summary of a collection as text."""
    typer.echo(
        f"{summary.trace}: {counted(summary.problems, 'problem')}, {summary.prompt_tokens:,} prompt and "
        f"{summary.output_tokens:,} generated tokens, {summary.rows:,} routing rows, {_size(summary.bytes)}"
    )
    if summary.resumed < summary.problems:
        speed = summary.tokens_per_second
        typer.echo(
            f"{summary.engine}: started in {summary.start_seconds:.1f} s, ran {summary.generate_seconds:.1f} s, "
            + (
                f"{speed:,.0f} tokens/s"
                if speed is not None
                else f"{counted(summary.resumed, 'problem')} finished by earlier runs"
            )
        )
    for line in describe_kernels(summary.moe_kernels):
        typer.echo(line)
    typer.echo(str(summary.usage))
    if len(summary.by_dataset) > 1:
        parts = (
            f"{name} {counted(problems, 'problem')}, {tokens:,} tokens"
            for name, (problems, tokens) in summary.by_dataset.items()
        )
        typer.echo("; ".join(parts))
    tokens = summary.prompt_tokens + summary.output_tokens
    if summary.target_tokens is not None and tokens < summary.target_tokens:
        typer.echo(
            f"{tokens:,} of {summary.target_tokens:,} tokens: outputs ended early, or the datasets have no more problems"
        )
    if summary.truncated_problems:
        typer.echo(f"{counted(summary.truncated_problems, 'prompt')} cut off at the end, because of the limit on tokens")
    if summary.skipped_problems:
        typer.echo(f"{counted(summary.skipped_problems, 'problem')} skipped: 'specmoe inspect' says why")


class IdenticalRunsChoice(StrEnum):
    """What `convert` does with long runs of tokens that have the same route."""

    auto = "auto"
    drop = "drop"
    keep = "keep"


class ConvertTo(StrEnum):
    """Output formats of `convert`."""

    trace = "trace"
    jsonl = "jsonl"
    hub_folder = "hub-folder"


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A trace, or the recording of another tool (see --from).")],
    target: Annotated[Path, typer.Argument(help="The trace directory, file or folder to create.")],
    to: Annotated[ConvertTo, typer.Option(help="trace: from any format. jsonl, hub-folder: from a trace.")] = ConvertTo.trace,
    format_name: Annotated[
        str | None, typer.Option("--from", metavar="FORMAT", help="See 'specmoe formats'; default: detected.")
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="Name of the model, if the source does not record it; 'specmoe models' lists those whose facts are known."
        ),
    ] = "unknown",
    num_experts: Annotated[
        int | None, typer.Option(min=1, max=MAX_EXPERTS, help="Experts per layer, if the source does not record it.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="A-B,C", help="Import only these layers; tokens need no rows at others.")
    ] = None,
    drop_incomplete: Annotated[
        bool, typer.Option("--drop-incomplete", help="Drop tokens with fewer than K experts instead of keeping empty slots.")
    ] = False,
    identical_runs: Annotated[
        IdenticalRunsChoice,
        typer.Option(
            help="Long runs of tokens with the same route, such as an engine's warm-up. auto: drop those with the same "
            "weights. drop: drop all. keep: keep all."
        ),
    ] = IdenticalRunsChoice.auto,
    push: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="With --to hub-folder: also upload it to the Hugging Face hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: make the dataset private.")] = False,
) -> None:
    """Convert a recording of another tool to a trace, or a trace to JSON lines or a Hugging Face dataset.

    Example: specmoe convert dumps/routes.npz traces/served
    """
    from profiler.importers import FORMATS, import_trace
    from profiler.importers.rows import ImportOptions
    from profiler.trace.jsonl import write_jsonl
    from profiler.trace.plausibility import doubts
    from profiler.trace.writer import public_command

    if format_name is not None and format_name not in FORMATS:
        raise typer.BadParameter(f"{format_name!r}: expected one of {', '.join(FORMATS)}", param_hint="--from")
    if push is not None and to is not ConvertTo.hub_folder:
        raise typer.BadParameter("needs --to hub-folder", param_hint="--push")
    if to is ConvertTo.trace:
        options = ImportOptions(
            model=model,
            num_experts=num_experts,
            layers=_layers(layers),
            drop_incomplete=drop_incomplete,
            identical_runs=identical_runs.value,
            command=tuple(public_command()),
        )
        trace = import_trace(source, target, format_name=format_name, options=options)
        typer.echo(f"{target}: {trace.num_rows:,} rows, {_size(_bytes(target))}; {trace.metadata.hook}")
        for line in [*trace.metadata.gaps, *trace.caveats(), *doubts(trace)]:
            typer.echo(f"  {printable(line)}")
        return
    trace = Trace.open(source)
    if to is ConvertTo.jsonl:
        if target.exists():
            raise TraceError(f"{target} exists: choose another file")
        lines = write_jsonl(trace, target)
        typer.echo(f"{target}: {lines:,} rows, {_size(target.stat().st_size)}")
    else:
        from profiler.trace.hub import is_folder_of, push_folder, write_hub_folder

        if not is_folder_of(trace, target):
            if target.exists() and (not target.is_dir() or any(target.iterdir())):
                raise TraceError(f"{target} exists and is not an export of this trace: choose another folder")
            write_hub_folder(trace, target)
        typer.echo(f"{target}: {_size(_bytes(target))}, a Hugging Face dataset with a card")
        if push is not None:
            typer.echo(push_folder(target, push, private=private))


@app.command()
def formats(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List the formats that 'specmoe convert' reads, and those that 'specmoe export' writes.

    Example: specmoe formats
    """
    from profiler import exporters, importers

    read = [{"format": entry.name, "use": "convert", "source": entry.about} for entry in importers.FORMATS.values()]
    written = [{"format": entry.name, "use": "export", "source": entry.about} for entry in exporters.FORMATS.values()]
    print_rows(read + written, as_json)


def _layers(text: str | None) -> tuple[int, ...] | None:
    """Parse comma-separated layer numbers and ranges; None without them."""
    if text is None:
        return None
    if not re.fullmatch(r"\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*", text.replace(" ", "")):
        raise typer.BadParameter(f"{text!r}: expected numbers and ranges, such as 0-23,25", param_hint="--layers")
    layers: set[int] = set()
    for part in text.replace(" ", "").split(","):
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            raise typer.BadParameter(f"{part!r}: expected the smaller number first", param_hint="--layers")
        layers |= set(range(int(first), int(last or first) + 1))
    return tuple(sorted(layers))


@app.command()
def inspect(
    trace: Annotated[Path, typer.Argument(help="A trace directory.")],
    verify: Annotated[bool, typer.Option("--verify", help="Also check the sha256 of every file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show what a trace holds, whether it is complete, and what is missing. Exits with 1 if it is incomplete.

    Example: specmoe inspect traces/math --verify
    """
    from profiler.trace.plausibility import doubts

    opened = Trace.open(trace, allow_incomplete=True)
    faults = opened.faults(verify=verify)
    metadata = opened.metadata
    rows: int | None = None
    try:
        rows = opened.num_rows
    except TraceError as error:
        faults.append(str(error))
    implausible: list[str] = []
    if not faults:
        try:
            implausible = doubts(opened)
        except TraceError as error:
            faults.append(str(error))
    if as_json:
        document = {
            "complete": not faults,
            "faults": faults,
            "rows": rows,
            "doubts": implausible,
            "metadata": metadata.model_dump(),
        }
        console.print_json(json.dumps(document))
    else:
        model = metadata.model
        typer.echo(
            f"{trace}: {printable(model.id)}, {counted(len(model.moe_layers), 'MoE layer')} "
            f"({model.moe_layers[0]}-{model.moe_layers[-1]})"
            f", {model.num_experts} experts, top-{model.top_k}"
        )
        for source in metadata.datasets:
            typer.echo(f"  {counted(source.problems, 'problem')} of {printable(source.name)}")
        origin = printable(f"{metadata.engine}, {metadata.created}")
        typer.echo(f"  {'unknown' if rows is None else f'{rows:,}'} routing rows; {origin}")
        for gap in metadata.gaps:
            typer.echo(f"  gap: {printable(gap)}")
        for caveat in opened.caveats():
            typer.echo(f"  note: {caveat}")
        for doubt in implausible:
            typer.echo(f"  warning: {doubt}")
        typer.echo("complete" if not faults else "incomplete: " + printable("; ".join(faults)))
    if faults:
        raise typer.Exit(1)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"
