"""The `analyze` command."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from analysis.counts.survey import Choice
from analysis.documents.curves import read_curves
from analysis.documents.evaluation import read_evaluation
from analysis.documents.simulation import read_simulation
from analysis.documents.statistics import STATISTICS_FILE
from profiler.errors import UsageError, counted, printable
from profiler.trace.reader import Trace

if TYPE_CHECKING:
    from analysis.analyze import Findings
    from analysis.statistics.compute import Statistics

app = typer.Typer()
console = Console(highlight=False)
messages = Console(stderr=True, highlight=False)


@app.command()
def analyze(
    traces: Annotated[list[Path], typer.Argument(metavar="TRACE...", help="Trace directories; several are compared.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html, statistics.json, transitions.npz and tables/.")],
    hops: Annotated[
        int | None, typer.Option(min=1, help="Longest distance between layers. Default: 8, or fewer if memory is short.")
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(
            help="File written by 'specmoe evaluate --json', or the folder of a run with one; may be repeated. The report also "
            "shows what it predicted token by token, if the file lists it."
        ),
    ] = None,
    simulation: Annotated[
        list[Path] | None, typer.Option(help="Folder written by 'specmoe simulate --out'; may be repeated.")
    ] = None,
    curves: Annotated[
        list[Path] | None,
        typer.Option(help="Folder written by 'specmoe curve --out', for the misses by cache size; may be repeated."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of a tokenizer for the text of tokens. Default: the model's, if already downloaded."
        ),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(help="Folder for each figure as SVG and PNG for papers, with its data as CSV; needs matplotlib."),
    ] = None,
    by: Annotated[str, typer.Option(help="Column of problems.parquet whose values are the domains.")] = "dataset",
    without: Annotated[
        str | None, typer.Option(help="Boolean column of problems.parquet; problems where it is true are left out.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the shuffled controls.")] = 0,
    open_report: Annotated[bool, typer.Option("--open", help="Open the report in the browser.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print statistics.json.")] = False,
) -> None:
    """Analyze routing: load, transitions, repetition, pairs, domains, clusters and weights, each with its control.

    Example: specmoe analyze traces/math --out reports/math
    """
    from analysis.analyze import analyze_trace, compare_traces

    evaluations = [read_evaluation(path) for path in evaluation or []]
    simulations = [read_simulation(path) for path in simulation or []]
    if figures is not None:
        import analysis.report.paper_figures  # noqa: F401 - a missing package is reported before a long analysis

    hit_rates = [read_curves(path) for path in curves or []]
    opened = [Trace.open(path) for path in traces]
    choice = Choice(by, without)
    if len(opened) > 1:
        if evaluations or simulations or hit_rates or tokenizer:
            raise UsageError(
                "--evaluation, --simulation, --curves and --tokenizer need a single trace: several traces are compared with "
                "each other"
            )
        findings = compare_traces(
            opened, out, hops=hops, choice=choice, seed=seed, figures=figures, compute=compute_with_progress
        )[1]
    else:
        statistics, findings = analyze_trace(
            opened[0],
            out,
            hops=hops,
            choice=choice,
            seed=seed,
            evaluations=evaluations,
            simulations=simulations,
            curves=hit_rates,
            tokenizer=tokenizer,
            figures=figures,
            compute=compute_with_progress,
        )
        if not as_json:
            print_statistics(statistics)
    if open_report and not webbrowser.open((out / "report.html").resolve().as_uri()):
        messages.print("no browser was found to open the report", markup=False)
    if as_json:
        typer.echo((out / STATISTICS_FILE).read_text(encoding="utf-8"), nl=False)
        return
    print_findings(findings)
    typer.echo(f"report: {out / 'report.html'}")


def compute_with_progress(trace: Trace, *, hops: int | None, choice: Choice, seed: int) -> Statistics:
    """`compute_statistics` with a progress bar, or with two lines if the output is not a terminal."""
    from analysis.statistics.compute import compute_statistics

    total = trace.num_rows // max(1, len(trace.metadata.model.moe_layers))
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as progress:
        task = progress.add_task(f"counting tokens of {escape(printable(trace.path.name))}", total=total)
        if not messages.is_terminal:
            messages.print(f"counting {total:,} tokens of {printable(str(trace.path))} ...", markup=False)
        counted = 0

        def advance(tokens: int) -> None:
            nonlocal counted
            counted += tokens
            progress.advance(task, tokens)
            if counted == total:
                progress.update(task, description=f"computing statistics of {escape(printable(trace.path.name))}")
                if not messages.is_terminal:
                    messages.print("computing statistics ...")

        return compute_statistics(trace, hops=hops, choice=choice, seed=seed, on_progress=advance)


def print_statistics(statistics: Statistics) -> None:
    """Print one line per layer."""
    from analysis.statistics.compute import show

    model = statistics.source.metadata.model
    table = Table(
        box=None,
        title=f"{escape(printable(model.id))}: {counted(statistics.problems, 'problem')}, {statistics.tokens:,} tokens",
        title_justify="left",
    )
    repetition = statistics.repetitions[0]
    if statistics.axes.knows_strongest:
        repeats, repeats_shuffled, to_next = repetition.first, repetition.first_shuffled, "bits to next"
        names = ("information_bits", "information_shuffled_bits")
    else:
        repeats, repeats_shuffled, to_next = repetition.shared, repetition.shared_shuffled, f"recall@{model.top_k} to next"
        names = ("conditional_topk", "shuffled_topk")
    headers = ("layer", "entropy/max", "busiest/mean", "repeats", "shuffled", to_next, "shuffled")
    for header in headers:
        table.add_column(header, justify="right")
    for n, layer in enumerate(model.moe_layers):
        shared = ("", "")
        if statistics.hops and n < len(model.moe_layers) - 1:
            first, second = (show(float(getattr(statistics.hops[0], name)[n])) for name in names)
            shared = first, second
        table.add_row(
            str(layer),
            show(float(statistics.load.entropy_share[n])),
            show(float(statistics.load.max_over_mean[n]), 2),
            show(float(repeats[0, n])),
            show(float(repeats_shuffled[n])),
            *shared,
        )
    console.print(table)
    for caveat in statistics.source.caveats:
        console.print(f"note: {escape(caveat)}")


def print_findings(findings: Findings) -> None:
    """Print the headlines of a report."""
    for title, headline in findings:
        console.print(f"[bold]{escape(printable(title))}[/bold]: {escape(printable(headline))}", soft_wrap=True)
