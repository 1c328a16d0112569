"""Problems that are too short for a task: an error that says so, not a result of nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from profiler.errors import SpecmoeError, TraceError
from profiler.importers import import_trace
from profiler.trace.reader import Trace
from profiler.trace.splits import digest_of_number, part_of_digest
from speculation.data.tasks import Task
from speculation.evaluation.evaluate import evaluate
from speculation.training.fit import train

PARTS = [part_of_digest(digest_of_number(problem)) for problem in range(24)]


def synthetic_trace(tmp_path: Path, tokens: dict[str, int]) -> Trace:
    """A trace of 24 problems, with so many tokens for each part of the split."""
    rows = [
        {"problem_id": problem, "layer": layer, "token_id": token, "expert_ids": [token % 4], "weights": [0.5]}
        for problem, part in enumerate(PARTS)
        for token in range(tokens[part])
        for layer in range(2)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return import_trace(tmp_path / "rows.jsonl", tmp_path / "trace")


@pytest.mark.parametrize("horizon", [1, 2])
def test_a_horizon_that_no_problem_of_the_part_reaches_is_named(tmp_path: Path, horizon: int) -> None:
    trace = synthetic_trace(tmp_path, {"train": horizon + 1, "validation": horizon + 1, "test": horizon})
    run = train(trace, "popularity", tmp_path / "run", task=Task.NEXT_TOKEN, horizon=horizon)
    reason = f"no problem of this part has a token {horizon} after another one, so next-token has nothing to predict there"
    with pytest.raises(TraceError, match=reason):
        evaluate(run, trace, part="test")


@pytest.mark.parametrize("horizon", [1, 2])
def test_nothing_is_trained_if_no_problem_reaches_the_horizon(tmp_path: Path, horizon: int) -> None:
    """Its loss would be 0, as if every prediction were right."""
    trace = synthetic_trace(tmp_path, {"train": horizon, "validation": 5, "test": 5})
    with pytest.raises(SpecmoeError, match=f"has a token {horizon} after another one, so next-token has nothing to predict"):
        train(trace, "popularity", tmp_path / "run", task=Task.NEXT_TOKEN, horizon=horizon)
    assert not (tmp_path / "run").exists()
    # Other tasks need one token only.
    train(trace, "popularity", tmp_path / "run", task=Task.WHOLE_PATH)


def test_problems_that_are_too_short_do_not_validate(tmp_path: Path) -> None:
    trace = synthetic_trace(tmp_path, {"train": 3, "validation": 1, "test": 3})
    run = train(trace, "popularity", tmp_path / "run", task=Task.NEXT_TOKEN)
    assert json.loads((run.path / "metrics.json").read_text())["validation_problems"] == 0
