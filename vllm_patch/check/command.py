"""The output of `python -m vllm_patch check`: progress lines while it runs, then tables."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from profiler.errors import UsageError, printable
from vllm_patch.check.coverage import coverage_line, verdict_line
from vllm_patch.check.jobs import FAMILY_NAMES
from vllm_patch.check.results import CheckDocument, Verdict
from vllm_patch.check.run import Check, run_check

console = Console(highlight=False)
COLORS = {Verdict.exact: "green", Verdict.ties: "green", Verdict.wrong: "bold red", Verdict.failed: "yellow"}


def run_and_print(check: Check) -> CheckDocument:
    """Run the check and print its results. Raises `SpecmoeError` for models that are neither families nor folders."""
    for model in check.models:
        if model not in (*FAMILY_NAMES, "demo") and "/" not in model:
            raise UsageError(f"unknown family {model!r}: expected one of {', '.join(FAMILY_NAMES)}, demo")
    document = run_check(check, lambda document, text: console.print(escape(f"{document.seconds:6.1f} s  {printable(text)}")))
    console.print()
    console.print(_jobs_table(document))
    for result in document.overhead:
        speeds = ", ".join(f"{arm} {speed:,.0f}" for arm, speed in result.tokens_per_second.items())
        console.print(f"\nOverhead, {result.model}; {result.workload}; {result.rounds} rounds\n  tokens/s: {speeds}")
        for arm, ratio in result.ratios.items():
            console.print(f"  {arm}: {ratio.median:.3f} of plain vLLM ({ratio.least:.3f}-{ratio.most:.3f})")
    for replay in document.replay:
        console.print(f"\nReplay, {escape(replay['case'])}; {escape(replay['device'])}, {replay['tokens']:,} tokens")
        for row in replay["rows"]:
            ratio = row["tokens_per_second"] / row["estimated"]
            console.print(f"  {escape(row['case'])}: {row['tokens_per_second']:.1f} tokens/s, {ratio:.2f} x the simulation's")
    for note in document.notes:
        console.print(escape(printable(note)))
    console.print("\n" + escape(verdict_line(document)))
    console.print(escape(printable(coverage_line(document))), soft_wrap=True)
    return document


def _jobs_table(document: CheckDocument) -> Table:
    shown = Table(box=None, title_justify="left")
    for column in ("model", "mode", "type", "verdict", "oracle", "sets", "differ", "seconds"):
        shown.add_column(
            column,
            justify="right" if column in {"sets", "differ", "seconds"} else "left",
            no_wrap=column not in {"model", "mode", "oracle"},
        )
    for job in document.jobs:
        color = COLORS.get(job.verdict, "default")
        shown.add_row(
            escape(job.model.rpartition("/")[2]),
            job.mode,
            job.dtype,
            f"[{color}]{job.verdict.value}[/]",
            (job.oracle or "").partition(",")[0],
            "" if job.compared is None else f"{job.compared:,}",
            "" if job.differing is None else f"{job.differing:,}",
            f"{job.seconds:.0f}",
        )
    return shown
