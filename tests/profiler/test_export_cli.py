"""The command `export`: output, and errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.traces import MakeProblems, MakeTrace
from typer.testing import CliRunner

from profiler.errors import SpecmoeError
from specmoe import app

runner = CliRunner()


def test_prints_the_value_of_the_choice(make_trace: MakeTrace, random_problems: MakeProblems, tmp_path: Path) -> None:
    trace = make_trace(random_problems(30, 4, 2, 8, 2), 8)
    out = tmp_path / "hot.json"
    done = runner.invoke(app, ["export", str(trace.path), "--to", "exllamav3", "--slots", "4", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "8 of 16 experts kept, equally many in each layer" in done.output
    assert "chance 0.500; best fixed choice" in done.output
    assert out.is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "json"], "expected exactly one of them"),
        (["--to", "json", "--slots", "1", "--fraction", ".5"], "expected exactly one of them"),
        (["--to", "sglang", "--slots", "1"], "sglang keeps all experts"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = runner.invoke(app, ["export", str(tmp_path), "--out", str(tmp_path / "o"), *arguments])
    assert done.exit_code == 2
    assert message in done.output


def test_unknown_format(tmp_path: Path) -> None:
    done = runner.invoke(app, ["export", str(tmp_path), "--out", str(tmp_path / "o"), "--to", "gguf"])
    assert isinstance(done.exception, SpecmoeError)
    assert "unknown format 'gguf': expected one of llama-cpp" in str(done.exception)


def test_formats_have_a_name_a_use_and_a_source() -> None:
    """Programs read these keys."""
    done = runner.invoke(app, ["formats", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {tuple(row) for row in found} == {("format", "use", "source")}
    assert {row["use"] for row in found} == {"convert", "export"}
