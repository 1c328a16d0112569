"""The command `fit`: output, and errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.configs import GPT_OSS
from typer.testing import CliRunner

from analysis.documents.fit_report import read_fit
from profiler.errors import UsageError
from specmoe import app

runner = CliRunner()


def test_prints_memory_ways_and_assumptions(tmp_path: Path) -> None:
    out = tmp_path / "fit.json"
    done = runner.invoke(app, ["fit", "gpt-oss-20b", "--memory-gb", "10", "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert "10 of 32 in each layer" in done.output
    assert f"Recommended: {read_fit(out).ways[0].name}" in done.output
    assert "as if routing were uniform" in done.output
    assert all(f"Assumed: {line}" in done.output for line in read_fit(out).assumptions)


def test_a_config_gives_the_same_as_the_registry(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS))
    named, read = tmp_path / "named.json", tmp_path / "read.json"
    for arguments, out in ((["gpt-oss-20b"], named), (["--config", str(tmp_path)], read)):
        done = runner.invoke(app, ["fit", *arguments, "--memory-gb", "10", "--json", str(out)])
        assert done.exit_code == 0, done.output
    first, second = read_fit(named), read_fit(read)
    assert second.precision == "mxfp4"
    assert (second.memory.slots, second.memory.kv_cache) == (first.memory.slots, first.memory.kv_cache)
    assert [way.name for way in second.ways] == [way.name for way in first.ways]
    for ours, theirs in zip(first.ways, second.ways, strict=True):
        assert theirs.tokens_per_second == pytest.approx(ours.tokens_per_second, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "expected either a model or --config"),
        (["olmoe", "--config", "x"], 2, "expected either a model or --config"),
        (["olmoe", "--device", "M4 Max", "--host", "M3 Ultra"], 2, "M4 Max uses its own host's memory"),
        (["gpt-5"], None, "unknown model 'gpt-5': expected one of mixtral-8x7b"),
        (["olmoe", "--device", "abacus"], None, "unknown device 'abacus': expected one of RTX 3090"),
        (["olmoe", "--host", "abacus"], None, "unknown host 'abacus'"),
    ],
)
def test_wrong_usage(arguments: list[str], code: int | None, message: str) -> None:
    done = runner.invoke(app, ["fit", *arguments])
    assert done.exit_code == code if code else isinstance(done.exception, UsageError)
    assert message in (done.output if code else str(done.exception))
