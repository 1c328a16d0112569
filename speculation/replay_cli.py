"""The command `replay`: a trace with real transfers and computation of dummy experts."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from profiler.errors import UsageError
from profiler.trace.reader import Trace
from profiler.trace.writer import write_text
from speculation.cli import PartName
from speculation.offload_cli import ModelName, Policy, PrecisionName, console

app = typer.Typer()


class On(StrEnum):
    """The device to replay on."""

    cuda = "cuda"
    cpu = "cpu"


@app.command()
def replay(
    trace: Annotated[Path, typer.Argument(help="A trace directory.")],
    predictor: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Run directory of a next-layer predictor, which predicts after every layer. Default: none."
        ),
    ] = None,
    policy: Annotated[
        str,
        typer.Option(
            metavar="NAME|RUN",
            help="Which expert a full cache evicts (see 'specmoe simulate --help'): any but belady, or a run directory of "
            "'specmoe train --task reuse'.",
        ),
    ] = "lru",
    cache_fraction: Annotated[float, typer.Option(min=0, max=1, help="Cache size as a share of all experts.")] = 0.25,
    on: Annotated[On | None, typer.Option(help="Device to replay on. Default: cuda if there is a GPU, else cpu.")] = None,
    model: ModelName = None,
    precision: PrecisionName = None,
    expert_mb: Annotated[
        float | None, typer.Option(min=0.001, help="Size of an expert in MB. Default: that of the model's experts.")
    ] = None,
    rest_mb: Annotated[
        float | None, typer.Option(min=0.001, help="Size of a layer's other weights in MB. Default: that of the model's.")
    ] = None,
    experts: Annotated[
        int | None, typer.Option(min=1, help="Experts to prefetch per prediction and layer. Default: the model's top-k.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Number of tokens to replay.")] = 500,
    part: Annotated[PartName, typer.Option(help="Which problems to replay: a part of the split.")] = PartName.test,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
) -> None:
    """Replay a trace with real transfers and GEMMs of dummy experts, and compare with the simulation.

    Tokens are replayed one at a time: without a cache, with a cache and, if a run is given, with a cache and prefetching.

    Example: specmoe replay traces/math --model gpt-oss-20b --predictor runs/math --cache-fraction .25
    """
    from speculation.offload.replay import default_device
    from speculation.offload.studies.replay_study import Replay, run_replay

    reuse = Path(policy) if policy not in {known.value for known in Policy} else None
    if reuse is not None and not reuse.is_dir():
        known = ", ".join(each.value for each in Policy if each != Policy.belady)
        raise UsageError(f"policy {policy!r} is neither the folder of a run nor one of {known}")
    result = run_replay(
        Replay(
            trace=Trace.open(trace),
            part=part.value,
            run=predictor,
            policy=Policy.lru.rule if reuse is not None else Policy(policy).rule,
            reuse=reuse,
            fraction=cache_fraction,
            kind=default_device() if on is None else on.value,
            model=model,
            precision=precision,
            expert_bytes=None if expert_mb is None else int(expert_mb * 1e6),
            rest_bytes=None if rest_mb is None else int(rest_mb * 1e6),
            experts=experts,
            tokens=tokens,
        )
    )
    if json_file is not None:
        write_text(json_file, result.to_json())
    shown = Table(box=None, title=f"{result.device}, {result.tokens:,} tokens", title_justify="left")
    for column in ("case", "tokens/s", "simulated", "ratio", "hits", "simulated", "late", "simulated"):
        shown.add_column(column, justify="left" if column == "case" else "right", no_wrap=column != "case")
    for row in result.rows:
        shown.add_row(
            escape(row.case),
            f"{row.tokens_per_second:.1f}",
            f"{row.estimated:.1f}",
            f"{row.tokens_per_second / row.estimated:.2f}",
            *(f"{value:.3f}" for value in (row.hit_rate, row.estimated_hit_rate, row.late, row.estimated_late)),
        )
    console.print(shown)
    for line in result.assumptions:
        typer.echo(line)
