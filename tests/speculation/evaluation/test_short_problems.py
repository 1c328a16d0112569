"""Problems that are too short for a task: an error that says so, not a result of nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from profiler.errors import TraceError
from profiler.importers import import_trace
from speculation.data.tasks import Task
from speculation.evaluation.evaluate import evaluate
from speculation.training.fit import train


@pytest.mark.parametrize("horizon", [1, 2])
def test_a_horizon_that_no_problem_reaches_is_named(tmp_path: Path, horizon: int) -> None:
    rows = [
        {"problem_id": problem, "layer": layer, "token_id": token, "expert_ids": [token % 4], "weights": [0.5]}
        for problem in range(6)
        for token in range(horizon)
        for layer in range(2)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trace = import_trace(tmp_path / "rows.jsonl", tmp_path / "trace")
    run = train(trace, "popularity", tmp_path / "run", task=Task.NEXT_TOKEN, horizon=horizon)
    reason = f"no problem of this part has a token {horizon} after another one, so next-token has nothing to predict there"
    with pytest.raises(TraceError, match=reason):
        evaluate(run, trace, part="all")
