"""The commands that list what there is name each entry, for people and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest
from typer.testing import CliRunner

from profiler.datasets.registry import DATASETS
from profiler.exporters import FORMATS as EXPORTS
from profiler.importers import FORMATS as IMPORTS
from profiler.models.registry import MODELS
from specmoe import app
from speculation.predictors.registry import predictor_classes

LISTS = {
    "models": [*MODELS, "demo"],
    "datasets": DATASETS,
    "predictors": predictor_classes(),
    "formats": [*IMPORTS, *EXPORTS],
}


@pytest.mark.parametrize(("command", "names"), LISTS.items())
def test_every_entry_is_listed(command: str, names: Iterable[str]) -> None:
    runner = CliRunner(env={"COLUMNS": "250"})
    shown = runner.invoke(app, [command], catch_exceptions=False)
    assert shown.exit_code == 0
    as_json = runner.invoke(app, [command, "--json"], catch_exceptions=False)
    assert as_json.exit_code == 0
    listed = json.loads(as_json.stdout)
    found = [entry.get("name", entry.get("format")) for entry in listed]
    assert sorted(found) == sorted(names)
    for name in names:
        assert name in shown.stdout


def test_the_size_of_a_predictor_is_that_for_a_task_that_it_has() -> None:
    shown = CliRunner().invoke(app, ["predictors"], catch_exceptions=False).stdout
    sizes = [line for line in shown.splitlines() if "parameters:" in line]
    assert len(sizes) == len(predictor_classes())
    for cls, line in zip(predictor_classes().values(), sizes, strict=True):
        ahead = "one layer ahead" if "next-layer" in cls.tasks else min(cls.tasks)
        assert line.endswith((f"for 24 MoE layers of 32 experts, top-4, {ahead}", "parameters: depends on the data"))
