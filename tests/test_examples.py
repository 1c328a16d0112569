"""The notebooks and scripts of examples/ run, offline, and the notebooks' stored outputs are those of their code."""

from __future__ import annotations

import contextlib
import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import plotly.graph_objects as go
import pytest
import torch
from support.notebooks import code_cells, run_cell, without_numbers

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
# The arguments of each script: what the first and the second notebook leave behind.
SCRIPTS = {
    "read_trace.py": ["traces/demo"],
    "predict_layer_by_layer.py": ["runs/mlp", "traces/demo"],
    "offloaded_generation.py": [],
}
LARGEST = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that all examples run in, one after the other."""
    place = tmp_path_factory.mktemp("examples")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.chdir(place):
        yield place
    torch.set_num_threads(threads)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_and_shows_what_is_stored(path: Path, folder: Path) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    figures = 0
    for cell in code_cells(path):
        printed, value = run_cell(cell, names, f"{path.name}, cell {cell.number}")
        assert without_numbers(printed) == without_numbers(cell.printed), f"cell {cell.number}: run the notebook again"
        assert isinstance(value, go.Figure) == ("image/png" in cell.shown), f"cell {cell.number}"
        figures += isinstance(value, go.Figure)
    assert figures >= 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_names_no_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text) < LARGEST
    assert "Traceback" not in text
    words = " ".join(str(output.get("text", "")) for cell in json.loads(text)["cells"] for output in cell.get("outputs", []))
    assert not re.search(r"/(home|root|tmp|work|Users)/", words)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [script, *SCRIPTS[script]])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert capsys.readouterr().out


def test_every_script_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SCRIPTS)
