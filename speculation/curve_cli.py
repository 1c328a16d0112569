"""The command `curve`: hit rates of every cache size, working sets, and slots for each layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from analysis.documents.curves import CacheCurves
from profiler.errors import SpecmoeError, UsageError, counted
from profiler.trace.reader import Trace
from speculation.cli import PartName

if TYPE_CHECKING:
    from speculation.offload.curves.curve_study import CurveStudy
    from speculation.offload.state import Rule

app = typer.Typer()
console = Console(highlight=False)
messages = Console(stderr=True, highlight=False)


@app.command()
def curve(
    trace: Annotated[Path, typer.Argument(help="A trace directory.")],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Eviction policy (see 'specmoe simulate --help'). lru is computed in any case, at every size; others are "
            "simulated, at about 14 sizes. May be repeated. Default: lru and belady.",
        ),
    ] = None,
    part: Annotated[PartName, typer.Option(help="Which problems to evaluate: a part of the split.")] = PartName.test,
    training: Annotated[
        Path | None,
        typer.Option(
            metavar="OTHER",
            help="Another trace that popularity and slots come from: all its problems that are not evaluated. Default: TRACE's "
            "training part.",
        ),
    ] = None,
    cache_fraction: Annotated[
        list[float] | None,
        typer.Option(help="Slots to divide among layers, as a share of all experts. May be repeated. Default: .1, .25 and .5."),
    ] = None,
    window: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Consecutive tokens whose experts are counted. May be repeated. Default: 1, 8, 64 and 512.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that are decoded at the same time, for curves and slots.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Write curve.json, curve.csv and a page with plots (curve.html) to this folder.")
    ] = None,
) -> None:
    """Compute the hit rate of expert caches of every size.

    Also counts the experts that a layer needs within some tokens, and divides slots among layers so that the training problems
    have the most hits.

    Example: specmoe curve traces/math --out curves/math

    Example: specmoe curve traces/held-out --part all --training traces/math --policy lru --policy lfru --policy belady
    """
    from speculation.offload.curves.curve_page import write_curves
    from speculation.offload.curves.curve_study import WINDOWS, CurveStudy

    if out is not None and out.exists() and not out.is_dir():
        raise SpecmoeError(f"--out {out} is not a folder")
    study = CurveStudy(
        trace=Trace.open(trace),
        part=part.value,
        training=None if training is None else Trace.open(training),
        policies=tuple(_rule(name) for name in policy or ("lru", "belady")),
        fractions=tuple(cache_fraction or (0.1, 0.25, 0.5)),
        windows=tuple(window or WINDOWS),
        batch=batch,
    )
    curves = run_curves_with_progress(study)
    print_curves(curves)
    if out is not None:
        write_curves(curves, out)
        typer.echo(f"{out}: curve.json, curve.csv, curve.html")


def _rule(name: str) -> Rule:
    from speculation.offload.state import Rule

    known = {rule.label: rule for rule in Rule if rule != Rule.LEARNED}
    if name not in known:
        raise UsageError(f"policy {name!r}: expected one of {', '.join(known)}")
    return known[name]


def run_curves_with_progress(study: CurveStudy) -> CacheCurves:
    """Compute the curves, with a progress bar where there is a terminal."""
    from speculation.offload.curves.curve_study import run_curves

    if not messages.is_terminal:
        return run_curves(study)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=messages, transient=True, redirect_stdout=False, redirect_stderr=False) as progress:
        bar = progress.add_task("reading", total=None)

        def on_done(done: int, total: int) -> None:
            progress.update(bar, description="simulating", completed=done, total=total)

        return run_curves(study, on_done)


def print_curves(curves: CacheCurves) -> None:
    """Print hit rates at some sizes, working sets and slots as tables, then the results in sentences, and the notes."""
    from speculation.offload.curves.hit_curves import SHARES

    sizes = sorted({int(share * curves.num_experts) for share in SHARES})
    shown = _table(f"{curves.model}: hit rate by slots per layer", "policy", *map(str, sizes), "knee")
    for each in curves.curves:
        scale = len(curves.moe_layers) if each.is_global else 1
        cells = (f"{each.hit_rate(size * scale):.3f}" if size * scale in each.sizes else "-" for size in sizes)
        name = each.policy + (", one cache for all layers" if each.is_global else "") + ("" if each.is_exact else ", simulated")
        shown.add_row(name, *cells, f"{each.knee / scale:.1f}" if each.is_global else str(each.knee))
    console.print(shown)
    if curves.working_sets:
        shown = _table(
            "Working sets: experts of a layer that these tokens use", "tokens", "mean", "90 %", "layers' means", "number"
        )
        for row in curves.working_sets:
            name = f"{row.tokens}, one step of a batch" if row.is_batch else f"{row.tokens}, consecutive"
            means = f"{min(row.mean_by_layer):.1f} to {max(row.mean_by_layer):.1f}"
            shown.add_row(name, f"{row.mean:.1f}", str(row.percentile_90), means, f"{row.count:,}")
        console.print(shown)
    for sentence in curves.summary:
        typer.echo(sentence)
    for divided in curves.slots:
        slots = " ".join(map(str, divided.by_layer))
        typer.echo(f"{counted(divided.slots, 'slot')} divided by the curves of training, layer by layer: {slots}")
    for note in curves.notes:
        typer.echo(note)


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(box=None, title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
