"""Leaderboards: the evaluations of several runs, next to each other and as means over seeds, in one folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from analysis.documents.csv_text import csv_text
from analysis.documents.evaluation import Evaluation
from profiler.trace.writer import write_text
from speculation.evaluation.leaderboard_page import as_markdown, leaderboard_page
from speculation.evaluation.leaderboard_rows import (
    LeaderboardRow,
    SeedSummary,
    labeled_results,
    leaderboard_rows,
    seed_summaries,
)

# Columns of the CSV file whose names are not valid Python names.
COLUMNS = {"top_1": "top-1"}
SEEDS_FILE = "seeds.csv"


def write_leaderboard(documents: list[Evaluation], out: Path) -> list[LeaderboardRow]:
    """Write a leaderboard to a folder.

    - `leaderboard.md`, `.csv`: a row per predictor and horizon; `seeds.csv`: means over seeds, if there are several;
    - `leaderboard.html`: plots, one page that opens offline;
    - `metrics.csv`: every metric of every predictor, also by layer and by group of tokens, one a row;
    - `budget.csv`, `reliability.csv`: the points of the budget curves, the bins of the calibration;
    - `leaderboard.json`: the evaluations.

    Raises:
        SpecmoeError: As `leaderboard_rows` does.
    """
    rows, summaries = leaderboard_rows(documents), seed_summaries(documents)
    out.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[Sequence[Any]]] = {
        "leaderboard.csv": _leaderboard_table(documents[0], rows),
        "metrics.csv": list(_metrics_table(documents)),
        "budget.csv": list(_budget_table(documents)),
        "reliability.csv": list(_reliability_table(documents)),
    }
    if summaries:
        tables[SEEDS_FILE] = list(_seeds_table(summaries))
    else:
        # An earlier leaderboard in the same folder may have had several seeds.
        (out / SEEDS_FILE).unlink(missing_ok=True)
    for name, table in tables.items():
        write_text(out / name, csv_text(table))
    contents = [each.model_dump(mode="json", by_alias=True) for each in documents]
    write_text(out / "leaderboard.json", json.dumps(contents, indent=1) + "\n")
    write_text(out / "leaderboard.md", as_markdown(documents, rows, summaries))
    write_text(out / "leaderboard.html", leaderboard_page(documents, rows, summaries))
    return rows


def _leaderboard_table(document: Evaluation, rows: list[LeaderboardRow]) -> list[Sequence[Any]]:
    unknown = {name for name, known in (("mass", document.has_weights), ("top_1", document.knows_strongest)) if not known}
    names = [name for name in asdict(rows[0]) if name not in unknown]
    cells = [asdict(row) | {"horizon": f"h={row.horizon}"} for row in rows]
    return [[COLUMNS.get(name, name) for name in names], *([each[name] for name in names] for each in cells)]


def _metrics_table(documents: list[Evaluation]) -> Iterator[Sequence[Any]]:
    yield "run", "horizon", "by", "group", "metric", "value", "low", "high"
    for name, value in documents[0].chance.items():
        yield "chance", "", "", "", name, value, None, None
    for _, _, label, result in labeled_results(documents):
        for horizon, metrics in result.metrics.items():
            for name, value in metrics.items():
                yield label, horizon, "", "", name, value, *result.intervals[horizon].get(name, (None, None))
            for layer, of_layer in enumerate(result.by_target_layer.get(horizon, [])):
                for name, value in (of_layer or {}).items():
                    yield label, horizon, "layer", layer, name, value, None, None
        for by, groups in result.groupings.items():
            for group, of_group in groups.items():
                for name, value in of_group.items():
                    yield label, "h=1", by, group, name, value, None, None


def _budget_table(documents: list[Evaluation]) -> Iterator[Sequence[Any]]:
    has_weights = documents[0].has_weights
    yield "run", "horizon", "m", "recall", "coverage", *(("mass",) if has_weights else ())
    for _, _, label, result in labeled_results(documents):
        for horizon, points in result.budget.items():
            for point in points:
                yield label, horizon, point.m, point.recall, point.coverage, *((point.mass,) if has_weights else ())


def _reliability_table(documents: list[Evaluation]) -> Iterator[Sequence[Any]]:
    yield "run", "horizon", "predicted", "observed", "count"
    for _, _, label, result in labeled_results(documents):
        for horizon, calibration in result.calibration.items():
            for each in calibration.bins:
                yield label, horizon, each.predicted, each.observed, each.count


def _seeds_table(summaries: list[SeedSummary]) -> Iterator[Sequence[Any]]:
    yield "predictor", "horizon", "seeds", "runs", "metric", "mean", "lowest", "highest"
    for each in summaries:
        seeds, runs = " ".join(map(str, each.seeds)), " ".join(each.runs)
        for name, spread in each.metrics.items():
            yield each.predictor, f"h={each.horizon}", seeds, runs, name, *spread
