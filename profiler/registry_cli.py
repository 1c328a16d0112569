"""Commands that list the registries: `models` and `datasets`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from profiler.errors import ModelUsageError
from profiler.terminal import console, print_rows

if TYPE_CHECKING:
    from profiler.models.hosts import Host

app = typer.Typer()


@app.command()
def models(
    name: Annotated[
        str | None,
        typer.Argument(help="Show one model: its checkpoints, the GPUs that it fits on, and hosts."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the models that have a short name, or show how one of them runs. Any other hub id or model folder works too.

    Example: specmoe models mixtral-8x7b
    """
    from profiler.models.gpus import GPUS
    from profiler.models.hosts import HOSTS, STORAGE
    from profiler.models.registry import MODELS, checkpoint, fits
    from profiler.models.resolve import DEMO_MODEL, resolve_model

    if name is None:
        facts = resolve_model(DEMO_MODEL).metadata
        own = {"name": DEMO_MODEL, "MoE layers": str(len(facts.moe_layers)), "experts": str(facts.num_experts)}
        rows = [own | {"top-k": str(facts.top_k), "shared": "0", "precisions": facts.dtype or "", "location": "embedded"}]
        rows += [
            {
                "name": entry.name,
                "MoE layers": str(len(entry.moe_layers)),
                "experts": str(entry.experts),
                "top-k": str(entry.top_k),
                "shared": str(entry.shared),
                "precisions": ", ".join(entry.precisions),
                "location": entry.checkpoints[entry.precisions[0]],
            }
            for entry in MODELS.values()
        ]
        print_rows(rows, as_json)
        return
    if name == DEMO_MODEL:
        facts = resolve_model(DEMO_MODEL).metadata
        typer.echo(
            f"{name}: embedded, {facts.architecture}, {facts.dtype}; {facts.num_layers} layers, {len(facts.moe_layers)} with "
            f"{facts.num_experts} experts, top-{facts.top_k}; runs on a CPU"
        )
        return
    if name not in MODELS:
        raise ModelUsageError(f"unknown model {name!r}: expected one of {', '.join([DEMO_MODEL, *MODELS])}")
    entry = MODELS[name]
    presets = {gpu.name: [fits(entry, gpu, precision) for precision in entry.precisions] for gpu in GPUS.values()}
    if as_json:
        found = {gpu: [vars(preset) for preset in row if preset] for gpu, row in presets.items()}
        places = {precision: entry.checkpoints.get(precision) for precision in entry.precisions}
        facts_of = {key: value for key, value in vars(entry).items() if key not in {"checkpoints", "quantizable"}}
        hosts = [{**vars(host), "gpu": host.gpu and host.gpu.name} for host in HOSTS.values()]
        offload = {"hosts": hosts, "storage": [vars(storage) for storage in STORAGE.values()]}
        console.print_json(json.dumps(facts_of | {"checkpoints": places, "presets": found} | offload))
        return
    typer.echo(
        f"{name}: {entry.parameters} billion parameters, {entry.active} active per token; {entry.layers} layers, "
        f"{len(entry.moe_layers)} with {entry.experts} routed experts (top-{entry.top_k}) and {entry.shared} shared"
    )
    for precision in entry.precisions:
        missing = "" if precision in entry.checkpoints else "  (not public: modal run modal_jobs/quantize.py creates it)"
        gated = "  (accept its terms on the hub, and set a token)" if precision in entry.gated else ""
        place = entry.checkpoints.get(precision) or checkpoint(entry, precision)
        typer.echo(f"  {precision}: {place}, {entry.weights_gb(precision):.0f} GB in memory{missing}{gated}")
    rows = []
    for gpu in GPUS.values():
        cells = {
            precision: f"batch {preset.batch}" if preset else "-"
            for precision, preset in zip(entry.precisions, presets[gpu.name], strict=True)
        }
        small = entry.small_gpus.get(gpu.name)
        rows.append(
            {
                "GPU": gpu.name,
                "GB": str(gpu.memory),
                **cells,
                "--engine transformers": f"{small[0]}, batch {small[1]}" if small else "",
            }
        )
    print_rows(rows, as_json)
    typer.echo("Hosts and storage for the experts that do not fit (specmoe simulate --host NAME --storage NAME):")
    print_rows([_host_row(host) for host in HOSTS.values()], as_json)
    print_rows(
        [
            {"storage": storage.name, "GB/s": f"{storage.bandwidth:.2f}", "data sheet": storage.drive}
            for storage in STORAGE.values()
        ],
        as_json,
    )


def _host_row(host: Host) -> dict[str, str]:
    return {
        "host": host.name,
        "memory": host.memory,
        "GB/s": f"{host.bandwidth:.1f}",
        "cores": str(host.cores),
        "TFLOP/s": f"{host.tflops:.1f}",
        "data sheet": host.cpu,
    }


@app.command()
def datasets(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List datasets by name, with the columns that a local data file must have.

    Example: specmoe datasets
    """
    from profiler.datasets.registry import DATASETS

    rows = [
        {
            "name": dataset.name,
            "source": " ".join(filter(None, (dataset.hub_id or "embedded", dataset.config, dataset.split))),
            "rows": str(dataset.rows or 40),
            "columns": ", ".join(dataset.columns),
            "new tokens": str(dataset.new_tokens),
            "description": dataset.description,
        }
        for dataset in DATASETS.values()
    ]
    if as_json:
        templates = {dataset.name: dataset.template for dataset in DATASETS.values()}
        rows = [row | {"template": templates[row["name"]]} for row in rows]
    print_rows(rows, as_json)
