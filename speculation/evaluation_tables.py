"""Evaluations and leaderboards as tables in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from analysis.documents.evaluation import Evaluation, budget_table, table
from profiler.errors import counted
from speculation.data.tasks import Task

if TYPE_CHECKING:
    from speculation.evaluation.leaderboard_rows import LeaderboardRow, SeedSummary

console = Console(highlight=False)


def print_evaluation(evaluation: Evaluation) -> None:
    """Print a table per horizon, and what the numbers mean."""
    horizons = len(next(iter(evaluation.results.values())).metrics)
    for horizon in range(1, horizons + 1):
        _print_rows(table(evaluation, horizon), f"{_target(evaluation.task, horizon)}, {escape(evaluation.model)}")
        budget = budget_table(evaluation, horizon)
        if budget:
            weight = " (mass: of their weight)" if evaluation.has_weights else ""
            _print_rows(budget, f"Share of the chosen experts{weight} in the top m; ECE: calibration")
    what = evaluation.held_out[0].upper() + evaluation.held_out[1:]
    part = f"{evaluation.part} part of a split {evaluation.split}" if evaluation.part != "all" else "the whole trace"
    typer.echo(
        f"{what}: {counted(evaluation.problems, 'problem')}, {evaluation.tokens:,} tokens; {part}. "
        "In brackets: 95 % interval over problems."
    )
    for line in _split_by_flags(evaluation):
        typer.echo(line)
    for caveat in evaluation.caveats:
        typer.echo(f"Note: {caveat}")


def _print_rows(rows: list[dict[str, str]], title: str) -> None:
    shown = Table(box=None, title=title, title_justify="left")
    for column in rows[0]:
        shown.add_column(column, justify="left" if column == "predictor" else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*row.values())
    console.print(shown)


def _split_by_flags(evaluation: Evaluation) -> list[str]:
    """For every flag that the trace gives its problems, such as `looping`: the metrics without, and on, these problems."""
    result = evaluation.results.get(evaluation.predictor)
    if result is None:
        # Written by an early release, which did not name the run's own predictor.
        return []
    k_name = result.recall_at_k_name
    lines = []
    for name, groups in result.groupings.items():
        if set(groups) == {"false", "true"} and all(groups.values()):
            without, only = (f"{groups[side][k_name]:.3f} (exact {groups[side]['exact']:.3f})" for side in ("false", "true"))
            lines.append(f"{evaluation.predictor}, {k_name}: {without} without {name} problems, {only} on {name} ones only.")
    return lines


def print_leaderboard(rows: list[LeaderboardRow], document: Evaluation, summaries: list[SeedSummary]) -> None:
    """Print the rows of `speculation.evaluation.leaderboard` as a table, and the means over seeds below it."""
    from speculation.evaluation.leaderboard_page import seed_range

    k_name = document.recall_at_k_name
    title = f"{document.task}, {escape(document.model)}; {counted(document.problems, 'problem')}, {document.tokens:,} tokens"
    shown = Table(box=None, title=title, title_justify="left")
    for column in ("run", "h", k_name, "exact", "control", "parameters", "µs"):
        shown.add_column(column, justify="left" if column == "run" else "right", no_wrap=True)
    shown.add_row("chance", "", f"{document.chance[k_name]:.3f}", f"{document.chance['exact']:.3f}", "", "", "")
    for row in rows:
        shown.add_row(
            escape(row.run),
            str(row.horizon),
            f"{row.recall:.3f} ({row.low:.3f}-{row.high:.3f})",
            f"{row.exact:.3f}",
            "" if row.control is None else f"{row.control:.3f}",
            "" if row.parameters is None else f"{row.parameters:,}",
            "" if row.microseconds_per_prediction is None else f"{row.microseconds_per_prediction:,.0f}",
        )
    console.print(shown)
    if summaries:
        typer.echo("Runs that differ in their seed only: mean over the seeds (lowest-highest).")
    for each in summaries:
        values = ", ".join(f"{name} {seed_range(*value)}" for name, value in each.metrics.items())
        seeds = ", ".join(map(str, each.seeds))
        typer.echo(f"{each.predictor}, h = {each.horizon}, {counted(len(each.seeds), 'seed')} ({seeds}): {values}")


def _target(task: str, horizon: int) -> str:
    if task == Task.NEXT_LAYER:
        return "Experts of the next layer" if horizon == 1 else f"Experts {horizon} layers ahead"
    if task == Task.NEXT_TOKEN:
        return "Experts of the next token" if horizon == 1 else f"Experts {horizon} tokens ahead"
    return "Experts of a token at all layers, predicted before its first layer"
