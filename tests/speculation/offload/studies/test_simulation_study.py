"""`specmoe simulate`: from a trace and a run to the answer, its files, and the report's section."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.simulate_command import simulated
from support.traces import MakeProblems, MakeTrace
from typer.testing import CliRunner

from analysis.documents.simulation import read_simulation
from profiler.errors import SpecmoeError
from profiler.trace.reader import Trace
from specmoe import app
from speculation.predictors.options import TrainingOptions
from speculation.training.fit import train


def test_a_run_is_worth_something_or_not(trace: Trace, run: Path, runner: CliRunner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    output = simulated(
        runner,
        *(
            str(trace.path),
            "--model",
            "olmoe",
            "--device",
            "RTX 3090",
            "--device",
            "H100",
            "--policy",
            "lru",
            "--policy",
            "belady",
        ),
        *(
            "--predictor",
            "none",
            "--predictor",
            str(run),
            "--predictor",
            "oracle",
            "--cache-fraction",
            "0.25",
            "--cache-gb",
            "9",
        ),
        *("--out", str(out)),
    )
    text = (out / "simulation.json").read_text()
    document = json.loads(text)
    rows = document["rows"]
    # What is written is what is read.
    read = read_simulation(out)
    assert read.to_json() == text
    # Token by token: what gains most by prefetching.
    best = max(read.best, key=lambda row: row.gain or 0)
    assert read.sample is not None
    assert (read.sample.device, read.sample.capacity, read.sample.prefetch) == (best.device, best.capacity, best.prefetch)
    assert (read.part, read.layers, read.num_experts, read.top_k) == ("test", 16, 64, 8)
    # Two devices: bounds, and two sizes of two policies with none, the run, its control, and the oracle.
    assert len(rows) == 2 * (2 + 2 * 2 * 4)
    with (out / "simulation.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)

    def one(device: str, share: float, policy: str, prefetch: str) -> dict[str, Any]:
        found: dict[str, Any]
        (found,) = [
            row
            for row in rows
            if (row["device"], row["policy"], row["prefetch"]) == (device, policy, prefetch) and row["share"] == share
        ]
        return found

    # 64 experts of 16 layers, 12.6 MB each: 9 GB are 44 of each layer.
    assert {row["capacity"] for row in rows} == {0, 16, 44, 64}
    for device in ("RTX 3090", "H100"):
        slow, fast = one(device, 0.0, "on demand", "none"), one(device, 1.0, "all resident", "none")
        none, oracle = one(device, 0.25, "lru", "none"), one(device, 0.25, "lru", "oracle")
        assert slow["hit_rate"] == 0
        assert fast["hit_rate"] == 1
        assert slow["tokens_per_second"] < none["tokens_per_second"] < oracle["tokens_per_second"] < fast["tokens_per_second"]
        assert none["hit_rate"] <= one(device, 0.25, "belady", "none")["hit_rate"]
        # Random routing: neither the run nor its control finds anything out.
        for prefetch in ("counts", "counts, shuffled control"):
            assert one(device, 0.25, "lru", prefetch)["hit_rate"] == pytest.approx(0.25, abs=0.06)
    assert one("H100", 0.25, "lru", "none")["tokens_per_second"] > one("RTX 3090", 0.25, "lru", "none")["tokens_per_second"]
    assert len(document["best"]) == 4
    for row in rows:
        counts = row["counts_by_layer"]
        assert sum(counts["hit"]) / sum(counts["requested"]) == pytest.approx(row["hit_rate"])
        assert len(counts["collision"]) == 16
    assert "with 9.0 GB" not in output  # 44 of each layer are 8.9 GB.
    assert "Fastest with 8.9 GB of experts: lru, prefetch " in output
    assert "Assumed: interconnect: 25.2 GB/s, 80% (assumed) of 31.5 GB/s, PCIe 4 x16" in output
    assert "NOT held out" not in output
    page = (out / "simulation.html").read_text()
    assert "https://" not in page.split("<script")[0]
    assert "RTX 3090" in page


def test_what_is_not_held_out_is_said(trace: Trace, run: Path, runner: CliRunner) -> None:
    output = simulated(runner, str(trace.path), "--predictor", str(run), "--part", "all")
    assert "NOT held out" in output
    assert "transfers that take no time: hit rate" in output
    assert "tokens/s" not in output


def test_the_report_answers(trace: Trace, run: Path, runner: CliRunner, tmp_path: Path) -> None:
    simulated(
        runner,
        *(str(trace.path), "--model", "olmoe", "--predictor", "none", "--predictor", str(run), "--out", str(tmp_path / "sim")),
    )
    arguments = ["analyze", str(trace.path), "--out", str(tmp_path / "r"), "--hops", "2", "--simulation", str(tmp_path / "sim")]
    done = runner.invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert re.search("GB for experts on RTX 4090: (lru|ewma)", done.output)
    page = (tmp_path / "r" / "report.html").read_text()
    assert "Experts that do not fit" in page
    assert "Simulated, not run" in page
    # Without times there are hit rates.
    simulated(runner, str(trace.path), "--out", str(tmp_path / "sim"))
    again = runner.invoke(app, arguments, catch_exceptions=False)
    assert re.search("a cache with 50% of all experts, (lru|ewma)", again.output)
    assert "no prefetching, if transfers took no time" in again.output


def test_a_learned_policy(trace: Trace, runner: CliRunner, tmp_path: Path) -> None:
    run = tmp_path / "reuse-run"
    arguments = ["train", str(trace.path), "--task", "reuse", "--predictor", "reuse-small", "--epochs", "1", "--out", str(run)]
    done = runner.invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "for reuse, horizon 1" in done.output
    out = tmp_path / "sim"
    output = simulated(
        runner,
        *(str(trace.path), "--model", "olmoe", "--policy", "lru", "--policy", str(run), "--policy", "belady"),
        *("--cache-fraction", "0.25", "--predictor", "none", "--predictor", "oracle", "--out", str(out)),
    )
    assert "hit rate (gap captured), tokens/s" in output
    rows = {(row.policy, row.prefetch): row for row in read_simulation(out).rows}
    learned, control = rows["reuse-run", "none"], rows["reuse-run, shuffled control", "none"]
    assert rows["lru", "none"].gap_captured == 0
    assert rows["belady", "none"].gap_captured == 1
    for row in (learned, control):
        assert row.gap_captured is not None
        assert row.gap_low is not None
        assert row.gap_high is not None
        assert row.gap_low <= row.gap_captured <= row.gap_high
        assert row.score_microseconds > 0
    assert learned.is_possible
    assert not control.is_possible
    assert rows["reuse-run", "oracle"].gap_captured is None
    assert ("reuse-run, shuffled control", "oracle") not in rows
    # A run predicts experts or their reuse: each has its place.
    with pytest.raises(SpecmoeError, match="was trained for reuse: use it as a policy, not as a predictor"):
        runner.invoke(app, ["simulate", str(trace.path), "--predictor", str(run)], catch_exceptions=False)
    with pytest.raises(SpecmoeError, match="policy 'mru' is neither the folder of a run nor one of lru, fifo"):
        runner.invoke(app, ["simulate", str(trace.path), "--policy", "mru"], catch_exceptions=False)
    with pytest.raises(SpecmoeError, match="predicts when experts are used again, not which are chosen"):
        runner.invoke(app, ["evaluate", str(run), "--trace", str(trace.path)], catch_exceptions=False)


def test_without_generated_tokens_all_are_taken_as_such(
    make_trace: MakeTrace, random_problems: MakeProblems, runner: CliRunner
) -> None:
    problems = random_problems(count=30, tokens=12, layers=16, num_experts=64, top_k=8)
    prompts = make_trace(problems, 64, name="prompts", prompt_tokens=13)
    output = simulated(runner, str(prompts.path), "--model", "olmoe", "--cache-fraction", "0.5")
    assert "The trace does not say which tokens were generated: all are simulated as if they were." in output
    assert "all resident: " in output


def test_one_layer(make_trace: MakeTrace, random_problems: MakeProblems, runner: CliRunner) -> None:
    trace = make_trace(random_problems(count=30, tokens=12, layers=1, num_experts=8, top_k=1), 8, name="one")
    output = simulated(runner, str(trace.path), "--predictor", "none", "--predictor", "oracle", "--predictor", "popularity")
    assert "oracle" in output
    assert "The sizes of synthetic are unknown, so no device was simulated" in output


def test_runs_of_the_same_name_and_a_closed_interconnect(trace: Trace, run: Path, runner: CliRunner, tmp_path: Path) -> None:
    other = tmp_path / "again" / run.name
    other.parent.mkdir()
    run.rename(other)
    same = train(trace, "previous-token", run, options=TrainingOptions()).path
    out = tmp_path / "out"
    arguments = [
        "--predictor",
        str(other),
        "--predictor",
        str(same),
        "--model",
        "olmoe",
        "--link",
        "0",
        "--cache-fraction",
        "0.5",
    ]
    simulated(runner, str(trace.path), *arguments, "--out", str(out))
    document = json.loads((out / "simulation.json").read_text())
    found = {row["prefetch"] for row in document["rows"]}
    assert {str(other), str(same)} < found
    assert {row["tokens_per_second"] for row in document["rows"] if row["policy"] == "lru"} == {0.0}
    assert document["devices"][0]["costs"]["copy_seconds"] is None


def test_a_cache_that_no_device_has(trace: Trace, runner: CliRunner) -> None:
    output = simulated(
        runner, str(trace.path), "--model", "olmoe", "--device", "L4", "--cache-fraction", "1", "--precision", "bf16"
    )
    assert "All of olmoe, 14 GB, would fit on an L4 of 24 GB." in output


@pytest.mark.parametrize(("predictors", "said"), [(["none"], False), (["none", "oracle"], True)])
def test_prefetching_is_described_only_if_there_is_any(
    predictors: list[str], said: bool, trace: Trace, runner: CliRunner
) -> None:
    options = [each for name in predictors for each in ("--predictor", name)]
    output = simulated(runner, str(trace.path), "--cache-fraction", "0.25", *options)
    assert ("Prefetched: " in output) == said


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["--predictor", "unknown"],
            "predictor 'unknown' is neither the folder of a run, nor none, popularity, oracle or the name of a predictor",
        ),
        (["--model", "mixtral-8x7b"], "mixtral-8x7b has 32 MoE layers of 8 experts, top-2; the trace has 16 of 64, top-8"),
        (["--model", "gpt-9"], "unknown model 'gpt-9'"),
        (["--cache-gb", "3"], "a cache size in GB needs the size of an expert: name a model of known sizes"),
        (["--device", "TPU"], "unknown GPU 'TPU': expected one of RTX 3090"),
        (["--cache-fraction", "2"], "cache fraction 2.0: expected 0 to 1"),
        (["--predictor", "oracle", "--horizon", "17"], "horizon 17: expected 1 to 16 layers ahead"),
    ],
)
def test_wrong_usage_is_one_clear_line(arguments: list[str], text: str, trace: Trace, runner: CliRunner) -> None:
    done = runner.invoke(app, ["simulate", str(trace.path), *arguments])
    assert isinstance(done.exception, SpecmoeError)
    assert text in str(done.exception)
