"""The `analyze` command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from analysis.counts.survey import EVERYTHING, Choice
from analysis.documents.evaluation import Evaluation, read_evaluation
from analysis.documents.simulation import Simulation, read_simulation
from profiler.errors import SpecmoeError, printable
from profiler.trace.reader import Trace
from profiler.trace.writer import write_text

if TYPE_CHECKING:
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
        typer.Option(help="File written by 'specmoe evaluate --json', or the folder of a run with one; may be repeated."),
    ] = None,
    simulation: Annotated[
        list[Path] | None, typer.Option(help="Folder written by 'specmoe simulate --out'; may be repeated.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of a tokenizer for the text of tokens. Default: the model's, if already downloaded."
        ),
    ] = None,
    by: Annotated[str, typer.Option(help="Column of problems.parquet whose values are the domains.")] = "dataset",
    without: Annotated[
        str | None, typer.Option(help="Boolean column of problems.parquet; problems where it is true are left out.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the shuffled controls.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print statistics.json.")] = False,
) -> None:
    """Analyze routing: load, transitions, repetition, pairs, domains, clusters and weights, each with its control.

    Example: specmoe analyze traces/math --out reports/math
    """
    evaluations = [read_evaluation(path) for path in evaluation or []]
    simulations = [read_simulation(path) for path in simulation or []]
    opened = [Trace.open(path) for path in traces]
    choice = Choice(by, without)
    if len(opened) > 1:
        if evaluations or simulations or tokenizer:
            raise SpecmoeError(
                "--evaluation, --simulation and --tokenizer need a single trace: several traces are compared with each other"
            )
        document, findings = compare_traces(opened, out, hops=hops, choice=choice, seed=seed)
    else:
        statistics, findings = analyze_trace(
            opened[0],
            out,
            hops=hops,
            choice=choice,
            seed=seed,
            evaluations=evaluations,
            simulations=simulations,
            tokenizer=tokenizer,
        )
        document = statistics.to_json()
        if not as_json:
            print_statistics(statistics)
    if as_json:
        typer.echo(json.dumps(document, indent=1, allow_nan=False))
        return
    print_findings(findings)
    typer.echo(f"report: {out / 'report.html'}")


Findings = list[tuple[str, str]]
"""Title and headline of each section of a report."""


def analyze_trace(
    trace: Trace,
    out: Path,
    *,
    hops: int | None = None,
    choice: Choice = EVERYTHING,
    seed: int = 0,
    evaluations: Sequence[Evaluation] = (),
    simulations: Sequence[Simulation] = (),
    tokenizer: str | None = None,
) -> tuple[Statistics, Findings]:
    """Compute the statistics of `trace` and write the files of `write_analysis` to `out`."""
    statistics = _compute(trace, hops, choice, seed)
    return statistics, write_analysis(statistics, out, evaluations=evaluations, simulations=simulations, tokenizer=tokenizer)


def write_analysis(
    statistics: Statistics,
    out: Path,
    *,
    evaluations: Sequence[Evaluation] = (),
    simulations: Sequence[Simulation] = (),
    tokenizer: str | None = None,
) -> Findings:
    """Write `statistics.json`, `transitions.npz`, `tables/*.csv` and `report.html` to `out`; returns the report's findings."""
    import numpy as np

    from analysis.report import write_report
    from analysis.report.labels import token_labels
    from analysis.report.tables import write_tables

    labels = token_labels(statistics.axes, statistics.source.metadata.model.id, tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "statistics.json", json.dumps(statistics.to_json(), indent=1, allow_nan=False) + "\n")
    temporary = out / "transitions.tmp.npz"
    np.savez_compressed(temporary, probabilities=statistics.probabilities, moe_layers=np.array(statistics.axes.moe_layers))
    temporary.replace(out / "transitions.npz")
    write_tables(statistics, labels, out / "tables")
    return write_report(statistics, out / "report.html", labels, evaluations, simulations)


def compare_traces(
    traces: list[Trace], out: Path, *, hops: int | None = None, choice: Choice = EVERYTHING, seed: int = 0
) -> tuple[dict[str, Any], Findings]:
    """Analyze each trace into its own folder in `out`, and write `report.html` and `statistics.json` of the comparison."""
    from analysis.report import write_comparison
    from analysis.report.comparison import comparison_table
    from analysis.statistics.agreement import prompt_agreement, same_problems
    from analysis.statistics.compute import plain

    names = _names(traces)
    compared = {}
    for name, trace in zip(names, traces, strict=True):
        messages.print(f"{printable(name)}: {printable(str(trace.path))}", markup=False)
        compared[name] = analyze_trace(trace, out / name, hops=hops, choice=choice, seed=seed)[0]
    agreements, paired = {}, set()
    for (first, one), (second, other) in combinations(zip(names, traces, strict=True), 2):
        agreement = prompt_agreement(Trace.open(one.path), Trace.open(other.path), choice)
        if same_problems(one, other):
            paired.add((first, second))
        if agreement is not None:
            agreements[f"{first} / {second}"] = agreement
    document = {
        "traces": {name: str(trace.path) for name, trace in zip(names, traces, strict=True)},
        "figures": plain(comparison_table(compared)),
        "agreement": plain(agreements),
    }
    write_text(out / "statistics.json", json.dumps(document, indent=1, allow_nan=False) + "\n")
    return document, write_comparison(compared, out / "report.html", agreements, paired)


def _names(traces: list[Trace]) -> list[str]:
    """The names of the traces' folders, numbered where a name is taken already."""
    names: list[str] = []
    for trace in traces:
        base = name = trace.path.resolve().name
        number = 1
        while name in names:
            number += 1
            name = f"{base}-{number}"
        names.append(name)
    return names


def _compute(trace: Trace, hops: int | None, choice: Choice, seed: int) -> Statistics:
    """`compute_statistics` with a progress bar, or with two lines if the output is not a terminal."""
    from analysis.statistics.compute import compute_statistics

    total = trace.num_rows // max(1, len(trace.metadata.model.moe_layers))
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as progress:
        task = progress.add_task("counting tokens", total=total)
        if not messages.is_terminal:
            messages.print(f"counting {total:,} tokens ...")
        counted = 0

        def advance(tokens: int) -> None:
            nonlocal counted
            counted += tokens
            progress.advance(task, tokens)
            if counted == total:
                progress.update(task, description="computing statistics")
                if not messages.is_terminal:
                    messages.print("computing statistics ...")

        return compute_statistics(trace, hops=hops, choice=choice, seed=seed, on_progress=advance)


def print_statistics(statistics: Statistics) -> None:
    """Print one line per layer."""
    from analysis.statistics.compute import show

    model = statistics.source.metadata.model
    table = Table(
        box=None,
        title=f"{escape(printable(model.id))}: {statistics.problems:,} problems, {statistics.tokens:,} tokens",
        title_justify="left",
    )
    headers = ("layer", "entropy/max", "busiest/mean", "repeats", "shuffled", "bits to next", "shuffled")
    for header in headers:
        table.add_column(header, justify="right")
    repetition = statistics.repetitions[0]
    for n, layer in enumerate(model.moe_layers):
        shared = ("", "")
        if statistics.hops and n < len(statistics.hops[0].information_bits):
            first = statistics.hops[0]
            shared = show(float(first.information_bits[n])), show(float(first.information_shuffled_bits[n]))
        table.add_row(
            str(layer),
            show(float(statistics.load.entropy_share[n])),
            show(float(statistics.load.max_over_mean[n]), 2),
            show(float(repetition.first[0, n])),
            show(float(repetition.first_shuffled[n])),
            *shared,
        )
    console.print(table)
    for caveat in statistics.source.caveats:
        console.print(f"note: {escape(caveat)}")


def print_findings(findings: Findings) -> None:
    """Print the headlines of a report."""
    for title, headline in findings:
        console.print(f"[bold]{escape(printable(title))}[/bold]: {escape(printable(headline))}", soft_wrap=True)
