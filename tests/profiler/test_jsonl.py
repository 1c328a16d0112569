"""JSON lines out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from profiler.importers import import_trace
from profiler.importers.target import ImportOptions
from profiler.jsonl import write_jsonl
from profiler.reader import Trace

Make = Callable[..., Trace]


def test_the_record_is_spelled_as_documented(make_trace: Make, tmp_path: Path) -> None:
    trace = make_trace([(np.array([[[3, 7]]]), np.array([[[0.6, 0.4]]]))], 8)
    assert write_jsonl(trace, tmp_path / "out.jsonl") == 1
    line = '{"problem_id": 0, "layer": 0, "token_id": 0, "expert_ids": [3, 7], "weights": [0.6, 0.4]}\n'
    assert (tmp_path / "out.jsonl").read_text() == line


def test_a_round_trip_keeps_every_bit(make_trace: Make, random_problems: Make, tmp_path: Path) -> None:
    trace = make_trace(random_problems(count=6, tokens=9, layers=3, num_experts=300, top_k=4), 300)
    write_jsonl(trace, tmp_path / "out.jsonl")
    back = import_trace(tmp_path / "out.jsonl", tmp_path / "back", options=ImportOptions(num_experts=300))
    first, second = trace.load(), back.load()
    assert (first.expert_ids_TLK == second.expert_ids_TLK).all()
    assert first.weights_TLK is not None
    assert second.weights_TLK is not None
    assert (first.weights_TLK.view(np.uint16) == second.weights_TLK.view(np.uint16)).all()
    assert (first.token_ids_T == second.token_ids_T).all()
    assert back.metadata.gaps == ["no prompts, outputs or vocabulary ids"]
