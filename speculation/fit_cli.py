"""The command `fit`: whether a model fits on a GPU, how many experts do, and how fast that is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from analysis.documents.fit_report import Fit
from profiler.errors import ModelUsageError, printable
from profiler.models.gpus import GPUS, Gpu
from profiler.models.hosts import HOSTS, Host, find_host
from profiler.models.registry import MODELS, PRECISIONS, WORKSPACE, ModelEntry, find_entry
from profiler.trace.reader import Trace
from profiler.trace.writer import write_text
from speculation.cli import PartName

app = typer.Typer()
console = Console(highlight=False)
DEFAULT_HOST = "DDR5-5600 desktop"


@app.command()
def fit(
    model: Annotated[
        str | None, typer.Argument(help="A model that 'specmoe models' lists, by name or hub id; not with --config.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="The config.json of any other mixture-of-experts model (needs transformers), or its folder."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="GPU ('specmoe models NAME' lists them), or a host whose GPU uses its memory (see --host).")
    ] = "RTX 4090",
    memory_gb: Annotated[
        float | None, typer.Option(min=0.1, max=1e6, help="Memory of the device in GB. Default: as its data sheet says.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help=f"Host that has the other experts: {', '.join(HOSTS)}. Default: {DEFAULT_HOST}.")
    ] = None,
    host_memory_gb: Annotated[
        float | None, typer.Option(min=0, max=1e6, help="Host memory for experts in GB. Default: enough for all.")
    ] = None,
    context: Annotated[int, typer.Option(min=1, max=1 << 30, help="Tokens of each sequence.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, max=1 << 20, help="Sequences that are decoded at the same time.")] = 1,
    precision: Annotated[
        str | None,
        typer.Option(help=f"Precision of the weights: {', '.join(PRECISIONS)}. Default: as published."),
    ] = None,
    kv_bits: Annotated[Literal["16", "8"], typer.Option(help="Bits of each key and value.")] = "16",
    reserve_gb: Annotated[
        float, typer.Option(min=0, max=1e6, help="GB of the device for activations, logits and the engine.")
    ] = WORKSPACE,
    interconnect: Annotated[
        float | None, typer.Option("--link", min=0, help="GB/s that transfers to the GPU reach. Default: 80 % of PCIe's peak.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="A trace of the model: hit rates and distinct experts are then those of its routing.")
    ] = None,
    part: Annotated[PartName, typer.Option(help="With --trace: which problems to use, a part of the split.")] = PartName.test,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
) -> None:
    """Say whether a model fits on a GPU, how many of its experts do, and how fast each way to run it is expected to be.

    Speeds are estimated from sizes and bandwidths, which are printed with everything that was assumed.

    Example: specmoe fit gpt-oss-20b --device "RTX 3090" --memory-gb 12 --context 8192

    Example: specmoe fit qwen3-30b-a3b --precision awq --memory-gb 16 --trace traces/qwen --host "8-channel DDR5 server"
    """
    from speculation.offload.fitting import FitOptions, fit_model

    gpu, place = _machine(device, host)
    result = fit_model(
        FitOptions(
            entry=_entry(model, config, precision),
            gpu=gpu,
            host=place,
            memory=memory_gb,
            context=context,
            batch=batch,
            precision=precision,
            kv_bits=int(kv_bits),
            reserve=reserve_gb,
            host_memory=host_memory_gb,
            interconnect=interconnect,
            trace=None if trace is None else Trace.open(trace),
            part=part.value,
        )
    )
    if json_file is not None:
        write_text(json_file, result.to_json())
    print_fit(result)


def print_fit(fit: Fit) -> None:
    """Print the memory, the ways from the fastest on, warnings, and what was assumed."""
    use = fit.memory
    typer.echo(
        f"{printable(fit.model)} in {fit.precision} on {fit.device}, {fit.context:,} tokens of context, "
        f"{fit.batch} sequence{'s' if fit.batch > 1 else ''}"
    )
    rows = (
        ("usable memory", use.usable, f"of {use.device:g} GB"),
        ("weights but routed experts", use.dense, ""),
        ("keys and values", use.kv_cache, f"{fit.kv_bits} bits"),
        ("reserve", use.reserve, "assumed"),
        ("left for experts", use.left, f"{use.expert_bytes / 1e6:.1f} MB each"),
        ("all routed experts", use.experts, f"{use.layers} layers of {use.experts_per_layer}"),
    )
    for name, size, what in rows:
        typer.echo(f"  {name:<27}{size:7.1f} GB{f'  {what}' if what else ''}")
    typer.echo(
        f"  {use.share:.0%} of the experts fit: {use.slots} of {use.experts_per_layer} in each layer. A step needs "
        f"{fit.union:.1f} of a layer ({fit.union_source})"
    )
    if fit.ways:
        shown = Table(box=None, title="Fastest first", title_justify="left")
        for column in ("experts", "tokens/s", "hit rate", "GB on the host"):
            shown.add_column(column, justify="left" if column == "experts" else "right", no_wrap=column != "experts")
        for way in fit.ways:
            layers = "" if way.gpu_layers is None else f" ({way.gpu_layers} of {use.layers} on the GPU)"
            shown.add_row(
                escape(way.name + layers),
                f"{way.tokens_per_second:.1f}",
                "" if way.hit_rate is None else f"{way.hit_rate:.3f}",
                f"{way.host_gigabytes:.1f}" if way.host_gigabytes else "",
            )
        console.print(shown)
        for source in dict.fromkeys(way.hit_rate_source for way in fit.ways if way.hit_rate_source):
            of = [way.name for way in fit.ways if way.hit_rate_source == source]
            typer.echo(f"Hit rate{'' if len(of) > 1 else f' ({of[0]})'}: {printable(source)}")
        typer.echo(f"Recommended: {fit.ways[0].name}")
    for line in fit.warnings:
        typer.echo(f"Warning: {line}")
    for line in fit.assumptions:
        typer.echo(f"Assumed: {printable(line)}")


def _entry(model: str | None, config: Path | None, precision: str | None) -> ModelEntry:
    if (model is None) == (config is None):
        raise typer.BadParameter("expected either a model or --config", param_hint="MODEL")
    if config is not None:
        from profiler.models.sizes import entry_of_config

        return entry_of_config(config, precision)
    entry = find_entry(model or "")
    if entry is None:
        raise ModelUsageError(f"unknown model {model!r}: expected one of {', '.join(MODELS)}, or another model's --config")
    return entry


def _machine(device: str, host: str | None) -> tuple[Gpu, Host]:
    """The GPU and the host. A GPU without memory of its own has its host's."""
    if device in GPUS:
        chosen = find_host(host or DEFAULT_HOST)
        # A host that has a GPU of its own still has memory for the experts of another.
        return GPUS[device], replace(chosen, gpu=None)
    shared = {name: each for name, each in HOSTS.items() if each.gpu is not None}
    if device not in shared:
        raise ModelUsageError(f"unknown device {device!r}: expected one of {', '.join([*GPUS, *shared])}")
    if host not in {None, device}:
        raise typer.BadParameter(f"{device} uses its own host's memory", param_hint="--host")
    found = shared[device]
    assert found.gpu is not None
    return found.gpu, found
