"""Meta-header loggers, as their public logs are: batch rows for tokens, constants for requests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from profiler.errors import TraceError
from profiler.importers import find_format, import_trace
from profiler.trace.reader import Trace

META = {"type": "meta", "model_id": "Qwen/Qwen1.5-MoE-A2.7B-Chat", "vllm_version": "0.15.1", "top_k": 2, "layers_logged": [0]}


def route(token_idx: int, layer: int = 0, ids: tuple[int, ...] = (3, 12), **changes: object) -> dict[str, object]:
    weights = [round(0.8 / (k + 1), 3) for k in range(len(ids))]
    row = {"type": "route", "req_id": "r1", "token_idx": token_idx, "layer": layer, "topk_ids": ids, "topk_weights": weights}
    return row | changes


def convert(tmp_path: Path, records: list[dict[str, object]]) -> Trace:
    source = tmp_path / "moe_routes.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert find_format(source).name == "route-log"
    return import_trace(source, tmp_path / "t")


def test_positions_of_each_request_are_kept_where_they_never_restart(tmp_path: Path) -> None:
    trace = convert(tmp_path, [META, route(0), route(1), route(0, req_id="r2"), route(3, ids=(5, 1))])
    assert trace.metadata.model.id == "Qwen/Qwen1.5-MoE-A2.7B-Chat"
    assert trace.metadata.versions == {"vllm": "0.15.1"}
    assert trace.problems.column("source_key").to_pylist() == ["r1", "r2"]
    assert trace.arrays(0).token_ids_T.tolist() == [0, 1, 3]
    assert trace.arrays(0).expert_ids_TLK[:, 0].tolist() == [[3, 12], [3, 12], [5, 1]]


def test_batch_rows_that_restart_are_numbered_as_they_were_logged(tmp_path: Path) -> None:
    steps = [[(0, 1), (1, 2)], [(0, 3)], [(0, 4)]]
    records = [route(row, layer, (first, 0)) for step in steps for layer in (0, 8) for row, first in step]
    # A second run appended its own header.
    trace = convert(tmp_path, [META, *records[:4], META, *records[4:]])
    assert trace.load().expert_ids_TLK[:, :, 0].tolist() == [[1, 1], [2, 2], [3, 3], [4, 4]]
    assert trace.metadata.gaps[0].startswith("token_idx restarts in the log")


def test_rows_behind_a_missing_one_are_not_guessed(tmp_path: Path) -> None:
    steps = [[0, 1], [0], [0, 1]]
    records = [route(row, layer, (step, 9)) for step, rows in enumerate(steps) for layer in (0, 1) for row in rows]
    lost = [record for n, record in enumerate(records) if n != 3]  # layer 1, row 1 of the first step
    trace = convert(tmp_path, [META, *lost])
    assert len(trace.load()) == 1
    assert "7 rows dropped: behind a row where the layers disagree on token_idx" in trace.metadata.gaps


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (route(0, req_id=None), "line 2: expected a text 'req_id'"),
        (route(0, layer=-1), "layer -1..-1"),
        (route(0, topk_weights=[0.5]), "line 2: 1 weights for 2 experts"),
        ({"type": "route"}, "line 2: expected a whole number 'layer'"),
        ({"type": "other"}, "no routing rows"),
    ],
)
def test_broken_logs_are_refused(tmp_path: Path, record: dict[str, object], reason: str) -> None:
    with pytest.raises(TraceError, match=reason):
        convert(tmp_path, [META, record])


def test_a_log_without_weights_is_a_trace_without_weights(tmp_path: Path) -> None:
    trace = convert(tmp_path, [META, {k: v for k, v in route(0).items() if k != "topk_weights"}])
    assert trace.metadata.record.weights is False
