"""Runs that differ in their seed only are summarized, with their spread; others never."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.traces import MakeProblems, MakeTrace

from analysis.documents.evaluation import Evaluation
from profiler.trace.reader import Trace
from speculation.data.routes import load_routes, route_digests
from speculation.evaluation.evaluate import evaluate
from speculation.evaluation.leaderboard import SEEDS_FILE, write_leaderboard
from speculation.evaluation.leaderboard_rows import seed_summaries
from speculation.predictors.options import TrainingOptions
from speculation.training.fit import train

OPTIONS = TrainingOptions(epochs=1, batch_tokens=128, width=8)


def evaluated(trace: Trace, out: Path, name: str = "mlp", **changed: int) -> Evaluation:
    run = train(trace, name, out, options=replace(OPTIONS, **changed))  # type: ignore[arg-type]
    return evaluate(run, trace, with_baselines=False)


def test_seeds_are_summarized(markov_trace: Trace, tmp_path: Path) -> None:
    documents = [evaluated(markov_trace, tmp_path / f"run {seed}", seed=seed) for seed in (2, 0, 1)]
    # Another predictor and other options are other recipes; they have a single seed each.
    others = [
        evaluated(markov_trace, tmp_path / "wide", width=16, seed=5),
        evaluated(markov_trace, tmp_path / "p", "popularity"),
    ]
    (summary,) = seed_summaries([*documents, *others])
    assert (summary.predictor, summary.horizon, summary.seeds) == ("mlp", 1, (0, 1, 2))
    assert summary.runs == ("run 0", "run 1", "run 2")
    values = [document.results["mlp"].metrics["h=1"]["recall@2"] for document in documents]
    assert len(set(values)) == 3
    assert summary.metrics["recall@2"] == pytest.approx((np.mean(values), min(values), max(values)))
    assert list(summary.metrics) == ["recall@2", "mass@2", "top-1", "exact", "calibration error"]
    write_leaderboard([*documents, *others], tmp_path / "board")
    with (tmp_path / "board" / SEEDS_FILE).open(newline="") as file:
        rows = {row["metric"]: row for row in csv.DictReader(file)}
    assert rows["recall@2"]["seeds"] == "0 1 2"
    assert float(rows["recall@2"]["lowest"]) == pytest.approx(min(values), rel=1e-5)
    markdown = (tmp_path / "board" / "leaderboard.md").read_text(encoding="utf-8")
    assert f"| mlp | 0, 1, 2 | 1 | {np.mean(values):.3f} ({min(values):.3f}-{max(values):.3f}) |" in markdown
    assert "mean of 3 seeds: 0, 1, 2" in (tmp_path / "board" / "leaderboard.html").read_text(encoding="utf-8")
    # A later leaderboard in the same folder, of one seed, has no summary.
    write_leaderboard(others, tmp_path / "board")
    assert not (tmp_path / "board" / SEEDS_FILE).exists()


def test_what_differs_in_more_than_the_seed_is_not_summarized(
    markov_trace: Trace, make_trace: MakeTrace, random_problems: MakeProblems, tmp_path: Path
) -> None:
    again = make_trace(random_problems(count=40, tokens=30, layers=4, num_experts=8, top_k=2), 8, name="again")
    first = evaluated(markov_trace, tmp_path / "first", seed=0)
    digests = route_digests(markov_trace, load_routes(markov_trace, "train"))
    fewer = train(markov_trace, "mlp", tmp_path / "fewer", without=digests[:3], options=replace(OPTIONS, seed=1))
    unvalidated = route_digests(markov_trace, load_routes(markov_trace, "validation"))
    blind = train(markov_trace, "mlp", tmp_path / "blind", without=unvalidated, options=replace(OPTIONS, seed=2))
    recorded_again = train(again, "mlp", tmp_path / "recorded again", options=replace(OPTIONS, seed=4))
    documents = [
        first,
        evaluate(fewer, markov_trace, with_baselines=False),
        evaluate(blind, markov_trace, with_baselines=False),
        evaluated(markov_trace, tmp_path / "other", seed=3, epochs=2),
        # The same seed again is no other seed; an evaluation of an older release does not say how its run was trained.
        first.model_copy(update={"run": "copy"}),
        first.model_copy(update={"run": "old", "recipe": None}),
        # The same prompts, recorded again.
        evaluate(recorded_again, markov_trace, with_baselines=False),
    ]
    recipes = [document.recipe for document in (*documents[:4], documents[-1]) if document.recipe is not None]
    assert [recipe.trained_on == recipes[0].trained_on for recipe in recipes] == [True, False, True, True, True]
    assert [recipe.validated_on == recipes[0].validated_on for recipe in recipes] == [True, True, False, True, True]
    assert [recipe.trace_sha256 == recipes[0].trace_sha256 for recipe in recipes] == [True, True, True, True, False]
    assert seed_summaries(documents) == []
    write_leaderboard(documents, tmp_path / "board")
    assert "seeds" not in (tmp_path / "board" / "leaderboard.md").read_text(encoding="utf-8")
