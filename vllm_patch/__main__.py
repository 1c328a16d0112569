"""`python -m vllm_patch`: check capture on this machine, patch the source of a local vLLM, seal what a killed server left."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from profiler.cli import run_app
from vllm_patch import source
from vllm_patch.releases import OLDEST_CPU_ROUTER, parse_release

app = typer.Typer(
    help="Insert the routing hook into the source of a local vLLM, for forks and where plugins cannot be used.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
Vllm = Annotated[
    Path | None, typer.Option("--vllm", help="A vLLM package folder or checkout; default: the installed one.", exists=True)
]


@app.command()
def apply(vllm: Vllm = None) -> None:
    """Insert the hook; does nothing where it is in.

    Example: python -m vllm_patch apply --vllm ~/src/vllm
    """
    local = source.open_vllm(vllm)
    changed = source.apply(local)
    _show(source.open_vllm(vllm), [f"patched {path}" for path in changed] or ["nothing to do"])


@app.command()
def revert(vllm: Vllm = None) -> None:
    """Remove the hook; the files get back the bytes that they had.

    Example: python -m vllm_patch revert
    """
    local = source.open_vllm(vllm)
    changed = source.revert(local)
    _show(source.open_vllm(vllm), [f"restored {path}" for path in changed] or ["nothing to do"])


@app.command()
def status(vllm: Vllm = None) -> None:
    """Say which vLLM this is, where its hook goes, and whether it is in.

    Example: python -m vllm_patch status
    """
    _show(source.open_vllm(vllm), [])


@app.command()
def diff(vllm: Vllm = None) -> None:
    """Print what apply inserts, as a patch for 'git apply'.

    Example: python -m vllm_patch diff --vllm ~/src/vllm > specmoe.patch
    """
    typer.echo(source.diff(source.open_vllm(vllm)), nl=False)


@app.command()
def check(
    family: Annotated[
        list[str] | None, typer.Option(help="A family of routers, several times if wanted. Default: all that are known.")
    ] = None,
    model: Annotated[
        list[Path] | None, typer.Option(help="A model's folder, instead of small synthetic ones.", exists=True)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Each model in one mode only, the one that users' runs have.")] = False,
    overhead: Annotated[bool, typer.Option("--overhead", help="Also measure what capture costs, in tokens/s.")] = False,
    replay: Annotated[bool, typer.Option("--replay", help="Also run 'specmoe replay' of a small trace here.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results to this file, again after each step.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(min=10, help="Seconds for all of it; the most valuable steps come first.")
    ] = None,
    keep: Annotated[Path | None, typer.Option(help="Keep models, traces and logs in this folder.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Engines at a time. Default: one; on a GPU one for every 4 cores.")
    ] = None,
) -> None:
    """Compare what is recorded here, by the installed vLLM on this device, with transformers.

    Small models with random weights, one of each family of routers, run in the modes that matter on this device; every set of
    experts and every weight is compared. Exit code 1 if something is wrong, or a model that you named could not be compared.

    Example: python -m vllm_patch check --overhead --json check.json
    """
    from vllm_patch.check.command import run_and_print
    from vllm_patch.check.run import Check

    named = (*(family or ()), *(str(path.absolute()) for path in model or ()))
    found = run_and_print(
        Check(
            models=named,
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
    directory: Annotated[Path, typer.Argument(help="A trace-NNNNN folder that a server left unfinished.", exists=True)],
) -> None:
    """Seal what a server has recorded; it does so itself unless it was killed.

    Example: python -m vllm_patch finish traces/served/trace-00000
    """
    from vllm_patch.serving.server import finish as finish_served

    trace = finish_served(directory)
    typer.echo(f"{directory}: {trace.problems.num_rows} problems" if trace else f"{directory} held no request and was removed")


def _show(local: source.LocalVllm, lines: list[str]) -> None:
    for line in lines:
        typer.echo(line)
    typer.echo(f"vLLM {local.version or 'of unknown version'} in {local.package}")
    typer.echo(f"hook: {local.hook.function} in {local.hook.source}: {local.state}")
    if local.version and parse_release(local.version) < OLDEST_CPU_ROUTER:
        typer.echo("on CPU this release routes inside its kernels: they are hooked when the model is loaded")


if __name__ == "__main__":
    run_app(app, "vllm_patch")
