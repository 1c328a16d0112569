"""JSON lines out and in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from profiler.errors import TraceError
from profiler.jsonl import read_jsonl, write_jsonl
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
    back = read_jsonl(tmp_path / "out.jsonl", tmp_path / "back", num_experts=300)
    first, second = trace.load(), back.load()
    assert (first.expert_ids_TLK == second.expert_ids_TLK).all()
    assert (first.weights_TLK.view(np.uint16) == second.weights_TLK.view(np.uint16)).all()
    assert (first.token_ids_T == second.token_ids_T).all()
    assert back.metadata.gaps == ["no prompts, outputs or vocabulary ids"]


def line(problem_id: int = 0, layer: int = 0, token_id: int = 0, **changes: object) -> str:
    row = {"problem_id": problem_id, "layer": layer, "token_id": token_id, "expert_ids": [1, 0], "weights": [0.5, 0.5]}
    return json.dumps(row | changes)


def test_rows_may_be_in_any_order_within_a_problem(tmp_path: Path) -> None:
    lines = [line(layer=5, token_id=1), line(layer=4, token_id=0), line(layer=5, token_id=0), line(layer=4, token_id=1)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    trace = read_jsonl(tmp_path / "in.jsonl", tmp_path / "t")
    assert trace.metadata.model.moe_layers == [4, 5]
    assert trace.load().token_ids_T.tolist() == [0, 1]
    assert trace.metadata.gaps[0] == "num_experts was inferred from the highest expert id"


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["{"], "is not JSON lines"),
        (['{"problem_id": 0}'], "a row without 'layer'"),
        ([line(weights=[0.5])], "expected one length everywhere"),
        ([line(expert_ids=[1, -1])], "negative expert id"),
        ([line(weights=[0.5, -0.5])], "negative or not finite"),
        ([line(layer=0), line(layer=1), line(layer=0, token_id=1)], "without all of the layers"),
        ([line(layer=0), line(layer=0), line(layer=1), line(layer=1)], "missing or repeated layer"),
        ([line(0), line(1), line(0, token_id=1)], "problem 0 are not adjacent"),
        ([line(token_id=-1)], "negative token_id"),
        ([""], "is not JSON lines"),
        ([line(problem_id=-1)], "negative problem_id"),
        ([line(expert_ids=[0, 0])], "more than there can be"),
        ([line(expert_ids=[70_000, 0])], "out of range"),
        ([line(weights=[1e6, 0.5])], "above 65,504"),
    ],
)
def test_bad_lines_are_refused_with_the_reason(tmp_path: Path, lines: list[str], reason: str) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(TraceError, match=reason):
        read_jsonl(tmp_path / "in.jsonl", tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_positions_that_are_not_there_are_named_as_a_gap(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(line(token_id=0) + "\n" + line(token_id=7) + "\n")
    assert "6 positions of 1 problems have no rows" in read_jsonl(tmp_path / "in.jsonl", tmp_path / "t").metadata.gaps


def test_a_target_folder_that_was_there_stays_there_empty(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "in.jsonl").write_text(line(0) + "\n" + line(1) + "\n" + line(0, token_id=1) + "\n")
    with pytest.raises(TraceError, match="not adjacent"):
        read_jsonl(tmp_path / "in.jsonl", tmp_path / "t")
    assert list((tmp_path / "t").iterdir()) == []
