"""The `specmoe` command: assembles the sub-commands of all packages; the demo runs the main ones in sequence."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

import analysis.cli
import profiler.cli
import profiler.export_cli
import profiler.live_cli
import profiler.registry_cli
import profiler.terminal
import speculation.cli
import speculation.curve_cli
import speculation.evaluation_tables
import speculation.fit_cli
import speculation.generate_cli
import speculation.offload_cli
import speculation.replay_cli
from profiler.collect.options import EngineName

app = typer.Typer(
    help="Record how mixture-of-experts models route tokens, analyze the routing, and learn to predict it.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(profiler.cli.app)
app.add_typer(profiler.export_cli.app)
app.add_typer(profiler.registry_cli.app)
app.add_typer(profiler.live_cli.app)
app.add_typer(analysis.cli.app)
app.add_typer(speculation.cli.app)
app.add_typer(speculation.offload_cli.app)
app.add_typer(speculation.replay_cli.app)
app.add_typer(speculation.curve_cli.app)
app.add_typer(speculation.fit_cli.app)
app.add_typer(speculation.generate_cli.app)

DEMO_NEW_TOKENS = 64


def main() -> None:
    """The entry point of the `specmoe` command."""
    profiler.cli.run_app(app, "specmoe")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the trace, the run and the report.")] = Path("specmoe-demo"),
    num_problems: Annotated[int, typer.Option(min=30, max=120, help="Number of the 120 embedded prompts to run.")] = 120,
    engine: Annotated[EngineName | None, typer.Option(help="Default: vllm if it is installed, else transformers.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the engine's own log.")] = False,
) -> None:
    """Collect, analyze, train and evaluate on the embedded model and prompts, offline, in about a minute.

    Example: specmoe demo --out specmoe-demo
    """
    from analysis.analyze import analyze_trace
    from profiler.collect.options import LocalOptions
    from profiler.datasets.registry import DEMO_DATASETS
    from profiler.engines.vllm import is_installed
    from profiler.models.resolve import DEMO_MODEL
    from profiler.trace.reader import Trace
    from profiler.trace.writer import check_free, write_text
    from speculation.evaluation.evaluate import evaluate

    began = time.monotonic()
    console = profiler.terminal.console
    check_free(out)
    if engine is None and not is_installed():
        typer.echo("vLLM is not installed: the demo runs on transformers, with the same model and the same record")
    name: EngineName = engine or ("vllm" if is_installed() else "transformers")

    console.rule("1 of 4: collect", align="left")
    options = LocalOptions(
        model=DEMO_MODEL,
        dataset=",".join(DEMO_DATASETS),
        out=out / "trace",
        num_problems=num_problems,
        engine=name,
        max_new_tokens=DEMO_NEW_TOKENS,
        verbose=verbose,
    )
    profiler.cli.print_summary(profiler.cli.collect_with_progress(options))
    trace = Trace.open(out / "trace")

    console.rule("2 of 4: train", align="left")
    run = speculation.cli.train_with_progress(trace, "mlp", out / "run")
    speculation.cli.print_run(run)

    console.rule("3 of 4: evaluate", align="left")
    evaluation = evaluate(run, trace, with_sample=True)
    write_text(out / "evaluation.json", evaluation.to_json())

    console.rule("4 of 4: analyze", align="left")
    statistics, findings = analyze_trace(
        trace, out / "report", evaluations=[evaluation], compute=analysis.cli.compute_with_progress
    )
    analysis.cli.print_statistics(statistics)
    analysis.cli.print_findings(findings)

    console.rule("Result", align="left")
    speculation.evaluation_tables.print_evaluation(evaluation)
    typer.echo(f"Report: {out / 'report' / 'report.html'} ({time.monotonic() - began:.0f} s in all)")


if __name__ == "__main__":
    main()
