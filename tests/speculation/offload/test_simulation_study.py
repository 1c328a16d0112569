"""`specmoe simulate` and `specmoe replay`: from a trace and a run to the answer, its files, and the report's section."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.traces import MakeProblems, MakeTrace
from typer.testing import CliRunner

from analysis.documents.simulation import read_simulation
from profiler.errors import SpecmoeError, TraceError
from profiler.trace.reader import Trace
from specmoe import app
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


def simulated(runner: CliRunner, *arguments: str) -> str:
    done = runner.invoke(app, ["simulate", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


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


def test_runs_of_the_same_name_and_a_closed_link(trace: Trace, run: Path, runner: CliRunner, tmp_path: Path) -> None:
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


def test_documents_of_earlier_versions_are_read(tmp_path: Path) -> None:
    row = {
        "device": "H100",
        "capacity": 16,
        "share": 0.25,
        "gigabytes": 3.2,
        "policy": "lru",
        "prefetch": "none",
        "predict_microseconds": 0.0,
        "hit_rate": 0.5,
        "tokens_per_second": 40.0,
        "times_on_demand": 2.0,
    }
    document = {
        "trace": "math",
        "model": "olmoe",
        "devices": [{"name": "H100", "costs": None, "assumptions": []}],
        "notes": [],
        "best": [row | {"gain": None}],
        "rows": [row],
    }
    (tmp_path / "simulation.json").write_text(json.dumps(document))
    found = read_simulation(tmp_path)
    assert found.rows[0].hit_rate == 0.5
    assert found.rows[0].late is None
    assert found.best[0].is_possible


@pytest.mark.parametrize(("predictors", "said"), [(["none"], False), (["none", "oracle"], True)])
def test_prefetching_is_described_only_if_there_is_any(
    predictors: list[str], said: bool, trace: Trace, runner: CliRunner
) -> None:
    options = [each for name in predictors for each in ("--predictor", name)]
    output = simulated(runner, str(trace.path), "--cache-fraction", "0.25", *options)
    assert ("Prefetched: " in output) == said


def test_what_is_no_simulation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "simulation.json"
    for text in ("[]", '{"model": "m", "trace": "t", "devices": [], "notes": [], "best": [], "rows": []}'):
        path.write_text(text)
        with pytest.raises(TraceError, match="expected what 'specmoe simulate TRACE --out DIR' writes"):
            read_simulation(tmp_path)
    path.unlink()
    with pytest.raises(TraceError, match=r"simulation\.json"):
        read_simulation(tmp_path)


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


def rows_of(runner: CliRunner, trace: Trace, out: Path, *arguments: str) -> list[dict[str, Any]]:
    base = [str(trace.path), "--model", "olmoe", "--predictor", "none", "--policy", "lru", "--cache-fraction", "0.25"]
    simulated(runner, *base, "--out", str(out), *arguments)
    rows: list[dict[str, Any]] = json.loads((out / "simulation.json").read_text())["rows"]
    return rows


def test_misses_on_a_host(trace: Trace, runner: CliRunner, tmp_path: Path) -> None:
    options = ["--miss", "copy", "--miss", "host", "--miss", "cheapest", "--host"]
    by_host = {}
    for host in ("DDR4-3200 desktop", "12-channel DDR5 server"):
        rows = rows_of(runner, trace, tmp_path / "out", *options, host)
        assert [row["policy"] for row in rows] == ["on demand", "on host", "lru", "lru", "lru", "all resident"]
        by_host[host] = {row["policy"] if row["policy"] != "lru" else row["on_miss"]: row for row in rows}
    slow, fast = by_host["DDR4-3200 desktop"], by_host["12-channel DDR5 server"]
    for name in ("on host", "host", "cheapest"):
        assert slow[name]["tokens_per_second"] < fast[name]["tokens_per_second"] < fast["all resident"]["tokens_per_second"]
    # The time that the policy takes is measured in each run.
    assert slow["copy"]["tokens_per_second"] == pytest.approx(fast["copy"]["tokens_per_second"], rel=0.02)
    assert fast["copy"]["tokens_per_second"] < fast["host"]["tokens_per_second"]
    assert fast["on host"]["on_host"] == 1.0
    assert fast["copy"]["on_host"] == fast["copy"]["filled_per_token"] == 0.0
    assert fast["host"]["filled_per_token"] > 0
    output = simulated(runner, str(trace.path), "--model", "olmoe", *options, "8-channel DDR5 server")
    assert "lru, cheapest" in output
    assert "on host: " in output
    assert "Assumed: host: 8 channels of DDR5-4800, Xeon Platinum 8480+; 215.0 GB/s, 70% (assumed) of 307.2 GB/s" in output


def test_experts_on_storage(trace: Trace, runner: CliRunner, tmp_path: Path) -> None:
    few, most = (
        rows_of(runner, trace, tmp_path / "out", "--storage", "NVMe Gen4", "--ram-fraction", share)[1] for share in (".3", ".8")
    )
    assert (few["ram"], most["ram"]) == (307, 819)
    assert few["hit_rate"] == most["hit_rate"]
    assert few["ram_hit_rate"] < most["ram_hit_rate"] < 1
    assert few["tokens_per_second"] < most["tokens_per_second"]
    # 12.6 MB an expert.
    by_size = rows_of(runner, trace, tmp_path / "out", "--storage", "NVMe Gen4", "--ram-gb", "6")[1]
    assert by_size["ram"] == int(6e9 / (3 * 2048 * 1024 * 2))
    # One memory: a miss is a read.
    rows = rows_of(runner, trace, tmp_path / "out", "--storage", "NVMe Gen4", "--host", "M4 Max")
    assert {row["device"] for row in rows} == {"M4 Max"}
    assert rows[0]["tokens_per_second"] < rows[1]["tokens_per_second"] < rows[2]["tokens_per_second"]


def test_drafts(trace: Trace, runner: CliRunner, tmp_path: Path) -> None:
    plain = rows_of(runner, trace, tmp_path / "out")[-1]
    good = rows_of(runner, trace, tmp_path / "out", "--draft-tokens", "3", "--acceptance", "1")[-1]
    bad = rows_of(runner, trace, tmp_path / "out", "--draft-tokens", "3", "--acceptance", "0")[-1]
    late = rows_of(runner, trace, tmp_path / "out", "--draft-tokens", "3", "--acceptance", "1", "--draft-ms", "5")[-1]
    # With all experts resident, drafts cost only their own experts.
    assert bad["tokens_per_second"] < plain["tokens_per_second"] < good["tokens_per_second"]
    assert late["tokens_per_second"] < good["tokens_per_second"]
    output = simulated(runner, str(trace.path), "--model", "olmoe", "--draft-tokens", "2", "--acceptance", "1")
    assert "Speculative decoding: 2 draft tokens per step and sequence, each accepted with probability 1.0 (given)" in output


def test_what_a_host_needs(trace: Trace, runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speculation.offload.host_measure.DUMMY_BYTES", 1 << 24)
    monkeypatch.setattr("speculation.offload.host_measure.FILE_BYTES", 1 << 25)
    monkeypatch.setattr("speculation.offload.devices.DUMMY_BYTES", 1 << 24)
    arguments = ["--model", "olmoe", "--measure", "--miss", "host", "--ram-fraction", ".5", "--cache-fraction", ".5"]
    output = simulated(runner, str(trace.path), *arguments)
    assert "measured on this machine: an expert on the CPU" in output
    assert "measured on this machine: an expert from " in output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--miss", "host"], "which host computes the experts"),
        (["--ram-gb", "4"], "which storage holds the experts"),
        (["--storage", "NVMe Gen4"], "NVMe Gen4: how many experts fit in host memory?"),
        (["--ram-gb", "4", "--ram-fraction", ".5"], "choose either --ram-gb or --ram-fraction"),
        (["--host", "M4 Max", "--device", "H100"], "--host M4 Max computes with its own GPU"),
        (["--host", "M4 Max", "--miss", "host"], "M4 Max has one memory for CPU and GPU"),
        (["--host", "abacus"], "unknown host 'abacus'"),
        (["--storage", "tape"], "unknown storage 'tape'"),
    ],
)
def test_hosts_that_do_not_go_together(arguments: list[str], text: str, trace: Trace, runner: CliRunner) -> None:
    done = runner.invoke(app, ["simulate", str(trace.path), "--model", "olmoe", *arguments])
    assert isinstance(done.exception, SpecmoeError)
    assert text in str(done.exception)
