"""A leaderboard of runs with different baselines shows each of them; equal ones once."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from typer.testing import CliRunner

from analysis.documents.evaluation import Evaluation
from profiler.errors import SpecmoeError
from profiler.trace.reader import Trace
from specmoe import app
from speculation.data.routes import load_routes, route_digests
from speculation.data.tasks import Task
from speculation.evaluation.evaluate import evaluate
from speculation.evaluation.leaderboard import write_leaderboard
from speculation.evaluation.leaderboard_rows import leaderboard_rows
from speculation.training.fit import train
from speculation.training.runs import load_run

BASELINES = ("popularity", "previous-token", "conditional-counts")


@pytest.fixture
def folders(markov_trace: Trace, tmp_path: Path) -> dict[str, Path]:
    """Runs of a counting predictor: on all training problems, the same, on a few of them, and two steps ahead."""
    digests = route_digests(markov_trace, load_routes(markov_trace, "train"))
    settings = {"all": (None, 1), "same": (None, 1), "few": (digests[3:], 1), "ahead": (None, 2)}
    for name, (without, horizon) in settings.items():
        train(markov_trace, "uniform", tmp_path / name, task=Task.NEXT_TOKEN, horizon=horizon, without=without)
    return {name: tmp_path / name for name in settings}


def rows_of(board: Path) -> dict[tuple[str, str], float]:
    """recall@2 by the row's name and horizon."""
    with (board / "leaderboard.csv").open(newline="", encoding="utf-8") as file:
        return {(row["run"], row["horizon"]): float(row["recall"]) for row in csv.DictReader(file)}


@pytest.mark.parametrize("order", [("all", "same", "few", "ahead"), ("few", "ahead", "same", "all"), ("ahead", "few")])
def test_every_baseline_of_every_run_is_shown(
    order: tuple[str, ...], folders: dict[str, Path], markov_trace: Trace, tmp_path: Path
) -> None:
    command = ["evaluate", *(str(folders[name]) for name in order), "--trace", str(markov_trace.path)]
    done = CliRunner().invoke(app, [*command, "--leaderboard", str(tmp_path / "board")])
    assert done.exit_code == 0, done.output
    rows = rows_of(tmp_path / "board")
    for name in order:
        own = evaluate(load_run(folders[name]), markov_trace)
        group = "few" if name == "few" else "others"
        for baseline in BASELINES:
            # The baselines of `all`, `same` and `ahead` were computed from the same problems: they are shown once.
            labels = {label for label, _ in rows if label.startswith(baseline)}
            assert len(labels) == 2
            (label,) = (each for each in labels if (each == f"{baseline} of few") == (group == "few"))
            for horizon, metrics in own.results[baseline].metrics.items():
                assert rows[label, horizon] == pytest.approx(metrics["recall@2"], rel=1e-5), (name, baseline, horizon)


def test_equal_baselines_have_their_plain_name(folders: dict[str, Path], markov_trace: Trace, tmp_path: Path) -> None:
    documents = [evaluate(load_run(folders[name]), markov_trace) for name in ("all", "same", "ahead")]
    write_leaderboard(documents, tmp_path / "board")
    rows = rows_of(tmp_path / "board")
    twice = {(name, f"h={horizon}") for name in ("ahead", *BASELINES) for horizon in (1, 2)}
    assert rows.keys() == twice | {("all", "h=1"), ("same", "h=1")}


def test_a_run_that_is_called_like_a_baseline_stands_for_equal_ones_only(
    folders: dict[str, Path], markov_trace: Trace, tmp_path: Path
) -> None:
    documents = {name: evaluate(load_run(folders[name]), markov_trace) for name in ("all", "few")}
    run = train(markov_trace, "popularity", tmp_path / "popularity", task=Task.NEXT_TOKEN)
    popularity = evaluate(run, markov_trace)

    def labels(*shown: Evaluation) -> list[str]:
        return sorted(row.run for row in leaderboard_rows(list(shown)) if row.run.startswith("popularity"))

    assert labels(documents["all"], popularity) == ["popularity"]
    assert labels(documents["few"], popularity) == ["popularity", "popularity of few"]
    # A folder that is called like a row is named.
    other = documents["all"].model_copy(update={"run": "popularity of few"})
    with pytest.raises(SpecmoeError, match="two rows of the leaderboard would be called 'popularity of few'"):
        leaderboard_rows([documents["few"], popularity, other])
