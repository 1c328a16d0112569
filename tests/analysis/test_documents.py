"""Documents of other commands: what is said if there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import BaseModel

from analysis.documents.curves import read_curves
from analysis.documents.evaluation import read_evaluation
from analysis.documents.fit_report import read_fit
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
