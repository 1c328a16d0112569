"""Curves of `specmoe curve` are drawn with the analysis' own misses by cache size."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.traces import MakeProblems, MakeTrace
from typer.testing import CliRunner

from analysis.analyze import analyze_trace
from analysis.documents.curves import CacheCurves, HitRateCurve
from analysis.report.sections.cache_sizes import cache_sizes_section
from analysis.statistics.compute import compute_statistics
from profiler.errors import TraceError
from specmoe import app


def curves_of(layers: int, experts: int) -> CacheCurves:
    own = HitRateCurve(policy="lru", is_global=False, is_exact=True, sizes=[0, 2, 4], hits=[0, 50, 80], requested=100, knee=2)
    shared = HitRateCurve(policy="belady", is_global=True, is_exact=False, sizes=[0, 8], hits=[0, 100], requested=100, knee=8)
    return CacheCurves(
        trace="t", model="m", moe_layers=list(range(layers)), num_experts=experts, top_k=1, part="test", problems=3, tokens=60,
        decode_tokens=50, batch=1, training_problems=None, summary=[], notes=[], curves=[own, shared], working_sets=[],
        slots=[],
    )  # fmt: skip


def test_curves_are_drawn_by_slots_of_a_layer(make_trace: MakeTrace, random_problems: MakeProblems) -> None:
    trace = make_trace(random_problems(count=3, tokens=20, layers=2, num_experts=4, top_k=1), 4)
    section = cache_sizes_section(compute_statistics(trace), [curves_of(2, 4)])
    drawn = {trace.name: list(trace.y) for trace in section.figures[0].figure.data}
    # Misses of 1 to 4 slots; a size in between is interpolated, and a cache for both layers has half of its slots for each.
    assert drawn["lru, each layer (specmoe curve, test part)"] == pytest.approx([0.75, 0.5, 0.35, 0.2])
    assert drawn["belady, one cache for all layers (specmoe curve, test part)"] == pytest.approx([0.75, 0.5, 0.25, 0.0])
    assert "interpolated" in section.explanation


def test_curves_of_another_model_are_refused(make_trace: MakeTrace, random_problems: MakeProblems, tmp_path: Path) -> None:
    trace = make_trace(random_problems(count=3, tokens=20, layers=2, num_experts=4, top_k=1), 4)
    with pytest.raises(TraceError, match=r"curves of t: 2 layers of 8 experts; .* has 2 of 4: run 'specmoe curve'"):
        analyze_trace(trace, tmp_path / "r", curves=[curves_of(2, 8)])
    (tmp_path / "curve.json").write_text(curves_of(2, 4).to_json())
    command = ["analyze", str(trace.path), str(trace.path), "--out", str(tmp_path / "r"), "--curves", str(tmp_path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code != 0
    assert "--curves and --tokenizer need a single trace" in str(done.exception)
    assert not (tmp_path / "r").exists()
