"""A trace, a run trained on it, and the command line that studies them."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from support.traces import MakeProblems, MakeTrace
from typer.testing import CliRunner

from profiler.trace.reader import Trace
from speculation.predictors.options import TrainingOptions
from speculation.training.fit import train


@pytest.fixture(scope="module")
def runner() -> CliRunner:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture(autouse=True)
def wide_console(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are printed as on a wide terminal, whatever imported the module first."""
    monkeypatch.setattr("speculation.offload_cli.console", Console(width=200, highlight=False))
    monkeypatch.setattr("speculation.replay_cli.console", Console(width=200, highlight=False))


@pytest.fixture
def trace(make_trace: MakeTrace, random_problems: MakeProblems) -> Trace:
    """Random routing of OLMoE's shape."""
    return make_trace(random_problems(count=30, tokens=12, layers=16, num_experts=64, top_k=8), 64)


@pytest.fixture
def run(trace: Trace, tmp_path: Path) -> Path:
    return train(trace, "conditional-counts", tmp_path / "counts", options=TrainingOptions()).path
