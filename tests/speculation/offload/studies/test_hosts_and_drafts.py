"""`specmoe simulate` with hosts that compute experts, experts on storage, and speculative decoding."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.simulate_command import rows_of, simulated
from typer.testing import CliRunner

from profiler.errors import SpecmoeError
from profiler.trace.reader import Trace
from specmoe import app


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
    monkeypatch.setattr("speculation.offload.studies.host_measure.DUMMY_BYTES", 1 << 24)
    monkeypatch.setattr("speculation.offload.studies.host_measure.FILE_BYTES", 1 << 25)
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
