"""`specmoe simulate --slots`: caches of different sizes for each layer have the hits that the curves promise."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.traces import MakeProblems, MakeTrace
from typer.testing import CliRunner

from analysis.documents.curves import read_curves
from analysis.documents.simulation import read_simulation
from profiler.errors import SpecmoeError
from profiler.trace.reader import Trace
from profiler.trace.splits import part_of
from specmoe import app


@pytest.fixture(scope="module")
def runner() -> CliRunner:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture
def trace(make_trace: MakeTrace, random_problems: MakeProblems) -> Trace:
    """Random routing, 20 experts in each of 3 layers, of which the second uses four only."""
    problems = random_problems(count=30, tokens=12, layers=3, num_experts=20, top_k=2)
    for ids, _ in problems:
        ids[:, 1] = ids[:, 1] % 2 + [0, 2]
    return make_trace(problems, 20)


def run(runner: CliRunner, *arguments: object) -> str:
    done = runner.invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_slots_by_the_curves(trace: Trace, runner: CliRunner, tmp_path: Path) -> None:
    run(runner, "curve", trace.path, "--cache-fraction", ".25", "--cache-fraction", ".5", "--out", tmp_path / "curves")
    rows = {row.slots // 3: row for row in read_curves(tmp_path / "curves").slots}
    assert set(rows) == {5, 10}
    # Four experts are all that layer 1 uses; it gets no slot more.
    assert [row.by_layer[1] for row in rows.values()] == [4, 4]
    common = (
        "simulate",
        trace.path,
        "--policy",
        "lru",
        "--predictor",
        "none",
        "--cache-fraction",
        ".25",
        "--cache-fraction",
        ".5",
    )
    found = {}
    for slots in ("even", "curve", tmp_path / "curves", tmp_path / "curves" / "curve.json"):
        output = run(runner, *common, "--slots", slots, "--out", tmp_path / "out")
        assert ("Slots are divided among layers by the curves" in output) == (slots != "even")
        found[slots] = {row.capacity: row for row in read_simulation(tmp_path / "out").rows if row.policy == "lru"}
    for capacity, row in rows.items():
        assert found["even"][capacity].hit_rate == pytest.approx(row.evaluated.even)
        assert found["even"][capacity].slots_by_layer == []
        for slots in found.keys() - {"even"}:
            assert found[slots][capacity].slots_by_layer == row.by_layer
            assert found[slots][capacity].hit_rate == pytest.approx(row.evaluated.by_curves)
            assert found[slots][capacity].share == found["even"][capacity].share
        assert row.evaluated.by_curves > row.evaluated.even


def test_slots_of_simulated_problems_are_not_held_out(trace: Trace, runner: CliRunner) -> None:
    output = run(runner, "simulate", trace.path, "--slots", "curve", "--part", "all", "--cache-fraction", ".5")
    assert "NOT held out: slots were chosen on the simulated problems." in output


def test_slots_that_there_are_not(
    trace: Trace, make_trace: MakeTrace, random_problems: MakeProblems, runner: CliRunner, tmp_path: Path
) -> None:
    run(runner, "curve", trace.path, "--cache-fraction", ".25", "--out", tmp_path / "curves")
    prompts = [prompt for prompt in (f"prompt {number}" for number in range(60)) if part_of(prompt) == "test"][:3]
    untrained = make_trace(
        random_problems(count=3, tokens=4, layers=2, num_experts=20, top_k=2), 20, name="untrained", prompts=prompts
    )
    for arguments, text in (
        ((trace.path, "--slots", "odd"), "slots 'odd': expected even, curve, or a folder that 'specmoe curve TRACE --out DIR'"),
        ((trace.path, "--slots", "curve", "--global-cache"), "slots 'curve' are of caches for each layer"),
        (
            (trace.path, "--slots", tmp_path / "curves"),
            "curve.json divides 15 slots, not 30: run 'specmoe curve' with --cache-fraction 0.5",
        ),
        ((untrained.path, "--slots", "curve"), "has no training part"),
        ((untrained.path, "--slots", tmp_path / "curves"), "has 3 MoE layers of 20 experts, the trace's has 2 of 20"),
    ):
        done = runner.invoke(app, ["simulate", *map(str, arguments), "--cache-fraction", ".5"])
        assert isinstance(done.exception, SpecmoeError), arguments
        assert text in str(done.exception)
