"""The command `simulate`: caches of offloaded experts."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from analysis.documents.simulation import BOUNDS, SimulatedRow, Simulation
from profiler.errors import SpecmoeError, UsageError
from profiler.models.gpus import find_gpu
from profiler.models.hosts import find_host, find_storage
from profiler.models.registry import PRECISIONS
from profiler.trace.reader import Trace
from speculation.cli import PartName

if TYPE_CHECKING:
    from speculation.offload.state import Rule
    from speculation.offload.studies.simulation_options import SimulationStudy

app = typer.Typer()
console = Console(highlight=False)
messages = Console(stderr=True, highlight=False)


# Options that both commands have.
ModelName = Annotated[
    str | None,
    typer.Option("--model", help="Model whose sizes to use; 'specmoe models' lists them. Default: the trace's model."),
]
PrecisionName = Annotated[
    str | None,
    typer.Option(
        "--precision", help=f"Precision of the weights: {', '.join(PRECISIONS)}. Default: as the model was published."
    ),
]


class Policy(StrEnum):
    """Which expert a full cache evicts, of the policies that need no predictor."""

    lru = "lru"
    lfu = "lfu"
    lfru = "lfru"
    fifo = "fifo"
    popularity = "popularity"
    ewma = "ewma"
    lfu_aged = "lfu-aged"
    slru = "slru"
    least_stale = "least-stale"
    belady = "belady"

    @property
    def rule(self) -> Rule:
        """The simulation's rule."""
        from speculation.offload.state import Rule

        return Rule[self.name.upper()]


POLICIES = (
    "used least recently (lru), least often (lfu), least often with uses that fade (ewma) or are halved regularly "
    "(lfu-aged), with the fewest uses per time since the last one (lfru), least recently among those used once since loaded "
    "(slru), loaded first (fifo), loaded first among those that the current step does not use (least-stale), used least in "
    "training (popularity), or needed last (belady, which knows the future)"
)


class OnMiss(StrEnum):
    """What happens to an expert that the cache lacks."""

    copy = "copy"
    host = "host"
    cheapest = "cheapest"


@app.command()
def simulate(
    trace: Annotated[Path, typer.Argument(help="A trace directory.")],
    predictor: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|RUN",
            help="What to prefetch: none, popularity, oracle (exactly what is needed next), a counting predictor by name, or a "
            "run directory of 'specmoe train'. May be repeated. Default: none and oracle.",
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|RUN",
            help=f"Which expert a full cache evicts: the one {POLICIES}; or a run directory of 'specmoe train --task reuse'. "
            "May be repeated. Default: lru, ewma and belady.",
        ),
    ] = None,
    time_constant: Annotated[
        float, typer.Option(min=0.1, help="Tokens over which ewma and lfu-aged forget the uses of an expert.")
    ] = 24.0,
    cache_fraction: Annotated[
        list[float] | None,
        typer.Option(
            help="Cache size as a share of all experts. May be repeated. Default: .1, .25 and .5, or none with --cache-gb."
        ),
    ] = None,
    cache_gb: Annotated[
        list[float] | None,
        typer.Option(help="Cache size in GB, for models whose expert size is known (see --model). May be repeated."),
    ] = None,
    global_cache: Annotated[
        bool, typer.Option("--global-cache", help="Share one cache among all layers, instead of one of equal size per layer.")
    ] = False,
    slots: Annotated[
        str,
        typer.Option(
            metavar="even|curve|DIR",
            help="How many slots each layer gets. even: the same. curve: so many that TRACE's training part has the most hits "
            "(see 'specmoe curve'). DIR: those in a folder of 'specmoe curve --out DIR'.",
        ),
    ] = "even",
    device: Annotated[
        list[str] | None,
        typer.Option(
            help="GPU to estimate tokens per second for; 'specmoe models' lists them. May be repeated. Default: RTX 4090, or "
            "none with --measure."
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Estimate for this machine too, from measured transfers and expert computation."),
    ] = False,
    model: ModelName = None,
    precision: PrecisionName = None,
    interconnect: Annotated[
        float | None,
        typer.Option(
            "--link", min=0, help="Bandwidth that large transfers to the GPU reach, in GB/s. Default: 80 % of PCIe's peak."
        ),
    ] = None,
    horizon: Annotated[
        int,
        typer.Option(
            min=1,
            help="Layers ahead that popularity, oracle and counting predictors prefetch; runs have their own horizon.",
        ),
    ] = 1,
    experts: Annotated[
        int | None, typer.Option(min=1, help="Experts to prefetch per prediction and layer. Default: the model's top-k.")
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Prefetch only experts with at least this predicted probability.")
    ] = 0.0,
    queue: Annotated[
        int, typer.Option(min=1, help="Prefetches that may wait for the interconnect; further ones are dropped.")
    ] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that are decoded at the same time.")] = 1,
    miss: Annotated[
        list[OnMiss] | None,
        typer.Option(
            help="What happens to an expert that the cache lacks: it is copied to the GPU (copy), computed on the host and "
            "copied in the background (host), or whichever of the two is done first (cheapest). May be repeated. Default: copy."
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Host that computes experts; 'specmoe models NAME' lists them. Default: none.")
    ] = None,
    host_bandwidth: Annotated[
        float | None,
        typer.Option(min=0, help="GB/s of host memory that expert computation reaches. Default: 70 % of the host's bandwidth."),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="Storage with the experts that host memory does not hold; 'specmoe models NAME' lists it."),
    ] = None,
    ram_gb: Annotated[
        float | None, typer.Option(min=0, help="Host memory for experts in GB; the others are on storage. Default: for all.")
    ] = None,
    ram_fraction: Annotated[
        float | None, typer.Option(min=0, max=1, help="Host memory for experts, as a share of all experts.")
    ] = None,
    draft_tokens: Annotated[
        int, typer.Option(min=0, help="Speculative decoding: draft tokens that each step verifies for a sequence.")
    ] = 0,
    acceptance: Annotated[
        float, typer.Option(min=0, max=1, help="Probability that a draft token is accepted if the one before it was.")
    ] = 0.7,
    draft_ms: Annotated[
        float, typer.Option("--draft-ms", min=0, help="Time in which the draft model drafts one token, in milliseconds.")
    ] = 0.0,
    part: Annotated[PartName, typer.Option(help="Which problems to simulate: a part of the split.")] = PartName.test,
    out: Annotated[
        Path | None, typer.Option(help="Write simulation.json, simulation.csv and a plot (simulation.html) to this folder.")
    ] = None,
) -> None:
    """Simulate a cache of offloaded experts on a trace.

    Counts hits, late and wasted prefetches, and estimates tokens per second with and without prefetching.

    Example: specmoe simulate traces/math --predictor none --predictor runs/math --predictor oracle --cache-fraction .25

    Example: specmoe simulate traces/math --device H100 --device "RTX 3090" --cache-gb 8 --out simulations/math

    Example: specmoe simulate traces/math --miss copy --miss host --host "DDR5-5600 desktop" --ram-gb 16 --storage "NVMe Gen4"
    """
    from speculation.offload.requests import Drafting
    from speculation.offload.simulation.records import Miss
    from speculation.offload.simulation_page import write_simulation
    from speculation.offload.studies.simulation_options import SimulationStudy

    if ram_gb is not None and ram_fraction is not None:
        raise UsageError("choose either --ram-gb or --ram-fraction")
    host_found = None if host is None else find_host(host)
    gpus = tuple(find_gpu(name) for name in device or ())
    if host_found is not None and host_found.gpu is not None:
        if gpus:
            raise UsageError(f"--host {host} computes with its own GPU, from the same memory: leave --device out")
        gpus = (host_found.gpu,)
    elif not gpus and not measure:
        gpus = (find_gpu("RTX 4090"),)
    study = SimulationStudy(
        trace=Trace.open(trace),
        part=part.value,
        predictors=tuple(predictor or ("none", "oracle")),
        policies=tuple(policy or ("lru", "ewma", "belady")),
        time_constant=time_constant,
        fractions=tuple(cache_fraction or (() if cache_gb else (0.1, 0.25, 0.5))),
        gigabytes=tuple(cache_gb or ()),
        is_global=global_cache,
        devices=gpus,
        measure=measure,
        model=model,
        precision=precision,
        interconnect=interconnect,
        horizon=horizon,
        experts=experts,
        threshold=threshold,
        queue=queue,
        batch=batch,
        host=host_found,
        host_bandwidth=host_bandwidth,
        misses=tuple(Miss[name.value.upper()] for name in miss or (OnMiss.copy,)),
        storage=None if storage is None else find_storage(storage),
        ram_gigabytes=ram_gb,
        ram_fraction=ram_fraction,
        drafting=Drafting(tokens=draft_tokens, acceptance=acceptance),
        draft_milliseconds=draft_ms,
        slots=slots,
    )
    if out is not None and out.exists() and not out.is_dir():
        raise SpecmoeError(f"--out {out} is not a folder")
    simulation = run_study_with_progress(study)
    print_simulation(simulation)
    if out is not None:
        write_simulation(simulation, out)
        typer.echo(f"{out}: simulation.json, simulation.csv, simulation.html")


def run_study_with_progress(study: SimulationStudy) -> Simulation:
    """Run a study, with a progress bar where there is a terminal."""
    from speculation.offload.studies.simulation_study import run_study

    if not messages.is_terminal:
        return run_study(study)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=messages, transient=True, redirect_stdout=False, redirect_stderr=False) as progress:
        bar = progress.add_task("predicting", total=None)

        def on_done(done: int, total: int) -> None:
            progress.update(bar, description="simulating", completed=done, total=total)

        return run_study(study, on_done)


def print_simulation(simulation: Simulation) -> None:
    """Print a table per device (hit rate, gap captured and tokens/s by cache size), the fastest combinations, and what was
    assumed."""
    for device in simulation.devices:
        rows = [row for row in simulation.rows if row.device == device.name]
        is_timed = device.name is not None
        sizes = {row.capacity: row for row in rows if row.policy not in BOUNDS}
        title = f"{escape(simulation.model)}, {device.name or 'transfers that take no time'}: hit rate (gap captured)"
        shown = Table(box=None, title=title + (", tokens/s" if is_timed else ""), title_justify="left")
        pairs = list(dict.fromkeys((row.label, row.prefetch) for row in rows if row.policy not in BOUNDS))
        has_prefetchers = len({prefetch for _, prefetch in pairs}) > 1
        shown.add_column("policy")
        if has_prefetchers:
            shown.add_column("prefetch")
        for row in sizes.values():
            size = f", {row.gigabytes or 0:.1f} GB" if is_timed else ""
            shown.add_column(f"{row.share:.0%} ({row.capacity}{size})", justify="right", no_wrap=True)
        for policy, prefetch in pairs:
            found = {row.capacity: row for row in rows if (row.label, row.prefetch) == (policy, prefetch)}
            names = (policy, prefetch) if has_prefetchers else (policy,)
            shown.add_row(*map(escape, names), *(_cell(found[size]) for size in sizes))
        console.print(shown)
        for row in rows:
            if row.policy in BOUNDS and is_timed:
                typer.echo(f"{row.policy}: {row.tokens_per_second or 0:.1f} tokens/s")
        for row in simulation.best:
            if row.device == device.name and is_timed:
                typer.echo(
                    f"Fastest with {row.gigabytes or 0:.1f} GB of experts: {row.label}, prefetch {row.prefetch}, "
                    f"{row.tokens_per_second or 0:.1f} tokens/s, {row.times_on_demand or 0:.1f} x demand-loading every expert"
                    + (f", {row.gain:.2f} x the fastest without prefetching" if row.gain else "")
                )
        for line in device.assumptions:
            typer.echo(f"Assumed: {line}")
    for line in simulation.notes:
        typer.echo(line)


def _cell(row: SimulatedRow) -> str:
    speed = row.tokens_per_second
    gap = "" if row.gap_captured is None else f"({row.gap_captured:.0%})"
    return f"{row.hit_rate:.3f} {gap:>6}" + ("" if speed is None else f" {speed:6.1f}")
