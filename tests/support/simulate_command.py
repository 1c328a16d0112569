"""`specmoe simulate` in a test, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from profiler.trace.reader import Trace
from specmoe import app


def simulated(runner: CliRunner, *arguments: str) -> str:
    done = runner.invoke(app, ["simulate", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def rows_of(runner: CliRunner, trace: Trace, out: Path, *arguments: str) -> list[dict[str, Any]]:
    base = [str(trace.path), "--model", "olmoe", "--predictor", "none", "--policy", "lru", "--cache-fraction", "0.25"]
    simulated(runner, *base, "--out", str(out), *arguments)
    rows: list[dict[str, Any]] = json.loads((out / "simulation.json").read_text())["rows"]
    return rows
