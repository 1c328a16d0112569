"""The `analyze` command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from profiler.errors import SpecmoeError
from profiler.reader import Trace
from profiler.writer import write_text

app = typer.Typer()
console = Console(highlight=False)


@app.command()
def analyze(
    trace: Annotated[Path, typer.Argument(help="A trace directory.")],
    out: Annotated[Path, typer.Option(help="Folder for statistics.json, transitions.npz and report.html.")],
    hops: Annotated[int, typer.Option(min=1, help="Longest distance between layers.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="For the shuffled controls.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print statistics.json.")] = False,
) -> None:
    """Expert load, cross-layer transitions and domain differences, each beside chance and a shuffled control.

    Example: specmoe analyze traces/math --out reports/math
    """
    statistics = analyze_trace(Trace.open(trace), out, hops=hops, seed=seed)
    if as_json:
        console.print_json(json.dumps(statistics.to_json()))
        return
    print_statistics(statistics)
    typer.echo(f"report: {out / 'report.html'}")


def analyze_trace(
    trace: Trace, out: Path, *, hops: int = 8, seed: int = 0, predictions: list[dict[str, Any]] | None = None
) -> Any:
    """Compute the statistics of `trace` and write `statistics.json`, `transitions.npz` and `report.html` to `out`."""
    from analysis.report import write_report
    from analysis.statistics import compute_statistics

    if len(trace.metadata.model.moe_layers) < 2:
        raise SpecmoeError(f"{trace.path} has one MoE layer; cross-layer statistics need two")
    statistics = compute_statistics(trace, hops=hops, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "statistics.json", json.dumps(statistics.to_json(), indent=1, allow_nan=False) + "\n")
    np.savez_compressed(out / "transitions.npz", probabilities=statistics.probabilities.astype(np.float32))
    write_report(statistics, out / "report.html", predictions)
    return statistics


def print_statistics(statistics: Any) -> None:
    """One line per layer."""
    from analysis.statistics import plain_zero

    model = statistics.trace.metadata.model
    next_layer = statistics.transitions[0]
    table = Table(
        box=None,
        title=f"{escape(model.id)}: {statistics.problems} problems, {statistics.tokens:,} tokens",
        title_justify="left",
    )
    headers = ("layer", "load entropy/max", "busiest/mean", "bits with next layer", "shuffled")
    for header in headers:
        table.add_column(header, justify="right")
    for position, layer in enumerate(model.moe_layers):
        shared = ("", "")
        if position < len(next_layer.information_bits):
            shared = (
                plain_zero(next_layer.information_bits[position]),
                plain_zero(next_layer.information_shuffled_bits[position]),
            )
        table.add_row(
            str(layer),
            f"{statistics.load.entropy_share[position]:.3f}",
            f"{statistics.load.max_over_mean[position]:.2f}",
            *shared,
        )
    console.print(table)
    for caveat in statistics.trace.caveats():
        console.print(f"note: {caveat}")
