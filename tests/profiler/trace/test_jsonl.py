"""JSON lines out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.traces import MakeProblems, MakeTrace

from profiler.importers import import_trace
from profiler.importers.rows import ImportOptions
from profiler.trace.jsonl import write_jsonl


def test_the_record_is_spelled_as_documented(make_trace: MakeTrace, tmp_path: Path) -> None:
    trace = make_trace([(np.array([[[3, 7]]]), np.array([[[0.6, 0.4]]]))], 8)
    assert write_jsonl(trace, tmp_path / "out.jsonl") == 1
    line = '{"problem_id": 0, "layer": 0, "token_id": 0, "expert_ids": [3, 7], "weights": [0.6, 0.4]}\n'
    assert (tmp_path / "out.jsonl").read_text() == line


def test_a_round_trip_keeps_every_bit(make_trace: MakeTrace, random_problems: MakeProblems, tmp_path: Path) -> None:
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


@settings(max_examples=60, deadline=None)
@given(data=st.data(), weighted=st.booleans())
def test_whatever_rows_go_in_come_out_as_lines(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, weighted: bool
) -> None:
    """Lists of any length, in any order, with weights or without: the same rows come back, pairs sorted by weight."""
    pairs = st.dictionaries(st.integers(0, 299), st.floats(0, 1000, width=16), min_size=1, max_size=5)
    keys = data.draw(st.sets(st.tuples(st.integers(0, 3), st.integers(0, 9000)), min_size=1, max_size=8))
    rows: list[dict[str, Any]] = []
    for problem_id, token_id in keys:
        for layer in (2, 5):
            experts = data.draw(pairs)
            row: dict[str, Any] = {"problem_id": problem_id, "layer": layer, "token_id": token_id, "expert_ids": list(experts)}
            rows.append(row | ({"weights": list(experts.values())} if weighted else {}))
    folder = tmp_path_factory.mktemp("property")
    shuffled = data.draw(st.permutations(rows))
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shuffled))
    trace = import_trace(folder / "in.jsonl", folder / "trace", options=ImportOptions(num_experts=300))
    write_jsonl(trace, folder / "out.jsonl")
    back = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: (row["problem_id"], row["token_id"], row["layer"]))
    for row in rows:
        if weighted:
            ordered = sorted(zip(row["weights"], row["expert_ids"], strict=True), key=lambda pair: (-pair[0], pair[1]))
            row["weights"], row["expert_ids"] = [weight for weight, _ in ordered], [expert for _, expert in ordered]
    for row in (*back, *rows):
        # The text is the shortest that gives the same float16.
        row["weights"] = np.array(row.get("weights", []), np.float16).tolist()
    assert back == rows
