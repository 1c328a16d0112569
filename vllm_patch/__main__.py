"""`python -m vllm_patch`: check capture on this machine, patch a local vLLM, seal the trace of a killed server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from profiler.cli import run_app
from profiler.errors import counted
from vllm_patch import source
from vllm_patch.releases import OLDEST_CPU_ROUTER, parse_release

app = typer.Typer(
    help="Check routing capture on this machine, patch the source of a local vLLM, or seal the trace of a killed server.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
Vllm = Annotated[
    Path | None, typer.Option("--vllm", help="A vLLM package folder or checkout; default: the installed one.", exists=True)
]


@app.command()
def apply(vllm: Vllm = None) -> None:
    """Insert the hook into the source of a local vLLM. Does nothing if the hook is already there.

    Example: python -m vllm_patch apply --vllm ~/src/vllm
    """
    local = source.open_vllm(vllm)
    changed = source.apply(local)
    _show(source.open_vllm(vllm), [f"patched {path}" for path in changed] or ["nothing to do"])


@app.command()
def revert(vllm: Vllm = None) -> None:
    """Remove the hook and restore the files byte for byte.

    Example: python -m vllm_patch revert
    """
    local = source.open_vllm(vllm)
    changed = source.revert(local)
    _show(source.open_vllm(vllm), [f"restored {path}" for path in changed] or ["nothing to do"])


@app.command()
def status(vllm: Vllm = None) -> None:
    """Show the vLLM version, where the hook goes, and whether it is applied.

    Example: python -m vllm_patch status
    """
    _show(source.open_vllm(vllm), [])


@app.command()
def diff(vllm: Vllm = None) -> None:
    """Print the lines that 'apply' inserts, as a patch for 'git apply'.

    Example: python -m vllm_patch diff --vllm ~/src/vllm > specmoe.patch
    """
    typer.echo(source.diff(source.open_vllm(vllm)), nl=False)


@app.command()
def check(
    family: Annotated[
        list[str] | None,
        typer.Option(help="A router family to check; may be repeated. Default: families with different routers."),
    ] = None,
    all_families: Annotated[bool, typer.Option("--all", help="Check all known families.")] = False,
    model: Annotated[
        list[Path] | None,
        typer.Option(help="A model folder to check instead of the small synthetic models; may be repeated.", exists=True),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Run each model in one mode only: the one most users run.")] = False,
    overhead: Annotated[bool, typer.Option("--overhead", help="Also measure the cost of capture, in tokens/s.")] = False,
    replay: Annotated[bool, typer.Option("--replay", help="Also run 'specmoe replay' on a small trace.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results to this file; it is rewritten after each step.")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(min=10, help="Time limit for the whole check, in seconds. The most valuable steps run first."),
    ] = None,
    keep: Annotated[Path | None, typer.Option(help="Keep models, traces and logs in this folder.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Engines to run at a time. Default: 2; on a GPU, 1 for every 4 cores.")
    ] = None,
) -> None:
    """Compare the routing that the installed vLLM records on this device with transformers.

    Small models with random weights, one for each router family, run in the modes that matter on this device. Every expert set
    and every weight is compared. The exit code is 1 if anything is wrong, or if a model that you named could not be compared.

    Example: python -m vllm_patch check --overhead --json check.json
    """
    from vllm_patch.check.command import run_and_print
    from vllm_patch.check.run import Check

    named = (*(family or ()), *(str(path.absolute()) for path in model or ()))
    found = run_and_print(
        Check(
            models=named,
            all_families=all_families,
            quick=quick,
            overhead=overhead,
            replay=replay,
            budget=budget,
            json_file=json_file,
            keep=keep,
            workers=workers,
        )
    )
    if not found.passed(named):
        raise typer.Exit(1)


@app.command()
def finish(
    directory: Annotated[Path, typer.Argument(help="A trace-NNNNN folder that a server left incomplete.", exists=True)],
) -> None:
    """Seal the trace of a server that was killed. A server that stops normally seals its own traces.

    Example: python -m vllm_patch finish traces/served/trace-00000
    """
    from vllm_patch.serving.server import finish as finish_served

    trace = finish_served(directory)
    typer.echo(
        f"{directory}: {counted(trace.problems.num_rows, 'problem')}"
        if trace
        else f"{directory} held no requests and was removed"
    )


def _show(local: source.LocalVllm, lines: list[str]) -> None:
    for line in lines:
        typer.echo(line)
    typer.echo(f"vLLM {local.version or 'of unknown version'} in {local.package}")
    typer.echo(f"hook: {local.hook.function} in {local.hook.source}: {local.state}")
    if local.version and parse_release(local.version) < OLDEST_CPU_ROUTER:
        typer.echo("on CPU, this release routes inside its kernels: the hook wraps them when the model is loaded")


if __name__ == "__main__":
    run_app(app, "vllm_patch")
