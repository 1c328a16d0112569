"""The command `export`: what other engines read, made from a trace."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from profiler.errors import printable
from profiler.models.registry import PRECISIONS
from profiler.trace.reader import Trace

app = typer.Typer()


class RankBy(StrEnum):
    """What experts are ranked by."""

    tokens = "tokens"
    weight = "weight"


class HeldOutPart(StrEnum):
    """Parts of the split by problem."""

    test = "test"
    validation = "validation"
    train = "train"
    all = "all"


class CountedPhase(StrEnum):
    """Which tokens are counted."""

    decode = "decode"
    all = "all"


@app.command()
def export(
    trace: Annotated[Path, typer.Argument(help="A trace directory.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="The engine's format; 'specmoe formats' lists them.")],
    out: Annotated[Path, typer.Option(help="The file to create; its report is written next to it.")],
    fraction: Annotated[float | None, typer.Option(min=0, max=1, help="Keep this share of all experts.")] = None,
    slots: Annotated[
        int | None, typer.Option(min=0, help="Keep this many experts per layer (on average, if ranked over all layers).")
    ] = None,
    gb: Annotated[
        float | None, typer.Option("--gb", min=0, help="Keep as many experts as fit into this many GB (see --model).")
    ] = None,
    over_all_layers: Annotated[
        bool, typer.Option("--global", help="Rank the experts of all layers together, instead of equally many per layer.")
    ] = False,
    by: Annotated[RankBy, typer.Option(help="Rank experts by tokens, or by the sum of routing weights.")] = RankBy.tokens,
    part: Annotated[
        HeldOutPart, typer.Option(help="Part of the split on which the choice is measured; it is made from the training part.")
    ] = HeldOutPart.test,
    phase: Annotated[
        CountedPhase, typer.Option(help="Count generated tokens only, if the trace says which these are, or all tokens.")
    ] = CountedPhase.decode,
    batch: Annotated[
        int, typer.Option(min=1, help="With llama-cpp: tokens per step. With 1, a trace cannot prefer one layer to another.")
    ] = 1,
    model: Annotated[
        str | None, typer.Option(help="With --gb: model whose expert size to use. Default: the trace's model.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help=f"With --gb: precision of its weights: {', '.join(PRECISIONS)}. Default: as the model was published."
        ),
    ] = None,
    layer_key: Annotated[
        str | None,
        typer.Option(help="With exllamav3: name of the MoE modules. Default: model.layers.{layer}.mlp, or the architecture's."),
    ] = None,
) -> None:
    """Export which experts are used most, in a format that an inference engine reads.

    Experts are chosen by the training part of the trace, and the choice is measured on problems of another part. None of the
    engines was run on the exported files: tests read them as the engines' own loaders do.

    Example: specmoe export traces/math --to exllamav3 --slots 4 --out hot.json

    Example: specmoe export traces/math --to llama-cpp --fraction .5 --batch 8 --out arguments.txt
    """
    from profiler.exporters import ExportOptions, export_trace, find_export_format
    from profiler.exporters.chosen_experts import Budget

    chosen = find_export_format(to)
    given = [name for name, value in (("--fraction", fraction), ("--slots", slots), ("--gb", gb)) if value is not None]
    if chosen.scope == "none" and given:
        raise typer.BadParameter(f"{to} keeps all experts", param_hint=given[0])
    if chosen.scope != "none" and len(given) != 1:
        raise typer.BadParameter("expected exactly one of them", param_hint="--fraction, --slots, --gb")
    options = ExportOptions(
        budget=Budget(fraction, slots, gb) if given else None,
        by=by.value,
        over_all_layers=over_all_layers,
        part=part.value,
        decode_only=phase is CountedPhase.decode,
        batch=batch,
        model=model,
        precision=precision,
        layer_key=layer_key,
    )
    report, usage = export_trace(Trace.open(trace), out, to, options)
    typer.echo(f"{out}: {printable(report.model)}, format {report.format}")
    for line in [*report.lines(), *usage]:
        typer.echo(f"  {printable(line)}")
