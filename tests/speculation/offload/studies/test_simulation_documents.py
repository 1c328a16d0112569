"""What reads the document of a simulation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis.documents.simulation import read_simulation
from profiler.errors import TraceError


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


def test_what_is_not_a_simulation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "simulation.json"
    for text in ("[]", '{"model": "m", "trace": "t", "devices": [], "notes": [], "best": [], "rows": []}'):
        path.write_text(text)
        with pytest.raises(TraceError, match="expected what 'specmoe simulate TRACE --out DIR' writes"):
            read_simulation(tmp_path)
    path.unlink()
    with pytest.raises(TraceError, match=r"simulation\.json"):
        read_simulation(tmp_path)
