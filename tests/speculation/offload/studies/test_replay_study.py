"""`specmoe replay`: the same tokens with real transfers, and as they are simulated."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from profiler.trace.reader import Trace
from specmoe import app


def test_replay(trace: Trace, run: Path, runner: CliRunner) -> None:
    arguments = ["replay", str(trace.path), "--on", "cpu", "--expert-mb", "0.01", "--rest-mb", "0.01", "--tokens", "20"]
    done = runner.invoke(app, [*arguments, "--predictor", str(run)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.output.splitlines()]
    assert "CPU, 20 tokens" in done.output
    cases = {line[0]: line for line in lines if line and line[0] in {"on", "lru", "lru,"}}
    assert set(cases) == {"on", "lru", "lru,"}
    # Hits without predictions do not depend on time: replayed and simulated they are the same.
    assert cases["lru"][4] == cases["lru"][5]
    missing = runner.invoke(app, ["replay", str(trace.path), "--on", "cpu"])
    assert "are unknown: name a registered model, or give the size of an expert" in str(missing.exception)
