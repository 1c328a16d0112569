"""`python -m vllm_patch`: the source patch for a local vLLM, and sealing what a killed server left."""

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
def finish(
    directory: Annotated[Path, typer.Argument(help="A trace-NNNNN folder that a server left unfinished.", exists=True)],
) -> None:
    """Seal what a server has recorded; it does so itself unless it was killed.

    Example: python -m vllm_patch finish traces/served/trace-00000
    """
    from vllm_patch.serving import finish as finish_served

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
