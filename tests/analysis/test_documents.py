"""Documents of other commands: what is said if there is none, and the schemas of all."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import BaseModel

import analysis
from analysis import documents
from analysis.documents.curves import read_curves
from analysis.documents.evaluation import read_evaluation
from analysis.documents.fit_report import read_fit
from analysis.documents.schemas import KINDS, document_schemas
from analysis.documents.simulation import read_simulation
from analysis.documents.statistics import read_statistics
from profiler.errors import TraceError


@pytest.mark.parametrize(
    ("read", "command"),
    [
        (read_curves, "specmoe curve"),
        (read_evaluation, "specmoe evaluate"),
        (read_fit, "specmoe fit"),
        (read_simulation, "specmoe simulate"),
        (read_statistics, "specmoe analyze"),
    ],
)
def test_a_missing_document_names_the_command_that_writes_it(
    read: Callable[[Path], BaseModel], command: str, tmp_path: Path
) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(TraceError, match=f"no such file; expected what '{command}") as raised:
            read(path)
        assert str(raised.value).startswith(str(path))
        assert "Errno" not in str(raised.value)


def test_every_document_has_a_schema() -> None:
    """What no other type contains is a document of its own, and is listed."""
    found: set[type[BaseModel]] = set()
    for module in pkgutil.iter_modules(documents.__path__):
        for value in vars(importlib.import_module(f"analysis.documents.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, BaseModel) and value.__module__.startswith("analysis.documents."):
                found.add(value)
    used = {name for each in found for name in each.model_json_schema().get("$defs", {})}
    alone = {each.__name__ for each in found if each.__name__ not in used and not each.__name__.startswith("_")}
    assert {kind.model for kind in KINDS.values()} == alone
    schemas = document_schemas()
    assert schemas.keys() == KINDS.keys()
    for name, schema in schemas.items():
        assert schema["title"] == KINDS[name].model
        assert schema["description"]
        reader = KINDS[name].reader
        assert not reader or callable(getattr(analysis, reader))
