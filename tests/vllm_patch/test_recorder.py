"""The recorder without vLLM: labels, preemption, bounded waiting, and a writer that dies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from profiler.writer import decode_rows
from vllm_patch import recorder as recorder_module
from vllm_patch.recorder import Recorder, assemble
from vllm_patch.steps import Step


@pytest.fixture
def recorder() -> Recorder:
    return Recorder([0, 1], num_experts=4, top_k=2, max_tokens=8, device="cpu")


def run_step(
    recorder: Recorder,
    spans: list[tuple[str, int, int]],
    first_expert: int,
    new: dict[str, int | None] | None = None,
    finished: set[str] = frozenset(),
) -> None:
    """What the hooks and the runner do in one step: fill the first rows of the buffers, then record."""
    rows = sum(count for _, _, count in spans)
    recorder.expert_ids_TLK[:rows] = torch.tensor([first_expert, (first_expert + 1) % 4])
    recorder.weights_TLK[:rows] = torch.tensor([0.75, 0.25])
    recorder.record(Step(spans=spans, problem_ids=new or {}, finished=finished))


def read(folder: Path) -> dict[int, dict[int, int]]:
    """Problem -> position -> strongest expert."""
    import pyarrow.parquet as pq

    chunk = decode_rows(pq.read_table(sorted(folder.glob("part-*.parquet"))), 2, 2)
    result: dict[int, dict[int, int]] = {}
    for problem, token, expert in zip(
        chunk.problem_ids_T.tolist(), chunk.token_ids_T.tolist(), chunk.expert_ids_TLK[:, 0, 0].tolist(), strict=True
    ):
        result.setdefault(problem, {})[token] = expert
    return result


def test_interleaved_requests_are_told_apart(recorder: Recorder, tmp_path: Path) -> None:
    assert recorder.start(tmp_path / "c") == {"moe_layers": [0, 1], "num_experts": 4, "top_k": 2}
    run_step(recorder, [("a", 0, 2), ("b", 0, 3)], 0, new={"a": 10, "b": 20})
    run_step(recorder, [("b", 3, 1), ("a", 2, 1)], 1)
    run_step(recorder, [("b", 4, 1)], 2, finished={"a"})
    assert recorder.stop() == {"rows": 16, "unlabelled": 0}
    assert read(tmp_path / "c") == {10: {0: 0, 1: 0, 2: 1}, 20: {0: 0, 1: 0, 2: 0, 3: 1, 4: 2}}


def test_preempted_positions_keep_the_last_rows(recorder: Recorder, tmp_path: Path) -> None:
    recorder.start(tmp_path / "c")
    run_step(recorder, [("a", 0, 3)], 0, new={"a": 1})
    run_step(recorder, [("a", 0, 4)], 2)
    assert recorder.stop()["rows"] == 8
    assert read(tmp_path / "c") == {1: {0: 2, 1: 2, 2: 2, 3: 2}}


def test_requests_without_a_problem_id_are_counted_not_written(recorder: Recorder, tmp_path: Path) -> None:
    recorder.start(tmp_path / "c")
    run_step(recorder, [("warm-up", 0, 2), ("a", 0, 1)], 3, new={"warm-up": None, "a": 5})
    assert recorder.stop() == {"rows": 2, "unlabelled": 1}
    assert read(tmp_path / "c") == {5: {0: 3}}


def test_a_recorder_can_be_used_again(recorder: Recorder, tmp_path: Path) -> None:
    for folder in ("first", "second"):
        recorder.start(tmp_path / folder)
        run_step(recorder, [("a", 0, 1)], 0, new={"a": 1})
        assert recorder.stop()["rows"] == 2
        assert read(tmp_path / folder) == {1: {0: 0}}
    assert "error" in recorder.stop()


def test_a_slow_writer_makes_the_engine_wait_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr(recorder_module, "QUEUED_STEPS", 1)
    slow = Recorder([0, 1], num_experts=4, top_k=2, max_tokens=8, device="cpu")
    original = Recorder._write_request
    monkeypatch.setattr(Recorder, "_write_request", lambda *a: (time.sleep(0.05), original(*a)))
    slow.start(tmp_path / "c")
    for number in range(10):
        name = str(number)
        run_step(slow, [(name, 0, 1)], number % 4, new={name: number}, finished={str(number - 1)})
    assert slow.stop()["rows"] == 20
    assert read(tmp_path / "c") == {number: {0: number % 4} for number in range(10)}


def test_a_dead_writer_is_reported_and_never_blocks(recorder: Recorder, tmp_path: Path) -> None:
    recorder.start(tmp_path / "c")
    recorder.expert_ids_TLK[:] = -1
    recorder.record(Step(spans=[("a", 0, 1)], problem_ids={"a": 1}, finished=set()))
    recorder.record(Step(spans=[], problem_ids={}, finished={"a"}))
    for _ in range(3 * recorder_module.QUEUED_STEPS):
        run_step(recorder, [("b", 0, 1)], 0)
    assert "expected 0..3" in recorder.stop()["error"]


def test_a_taken_folder_and_a_second_start_are_refused(recorder: Recorder, tmp_path: Path) -> None:
    recorder.start(tmp_path / "c")
    assert "already running" in recorder.start(tmp_path / "d")["error"]
    run_step(recorder, [("a", 0, 1)], 0, new={"a": 1})
    recorder.stop()
    assert "already holds routing parts" in recorder.start(tmp_path / "c")["error"]


def test_assemble_leaves_gaps_open() -> None:
    span = (np.ones((1, 1, 1), np.int16), np.ones((1, 1, 1), np.float32))
    ids, _, captured = assemble([(2, *span), (0, *span)])
    assert captured.tolist() == [True, False, True]
    assert ids[:, 0, 0].tolist() == [1, -1, 1]


def test_a_layer_whose_hook_did_not_run_is_an_error_not_the_step_before(recorder: Recorder, tmp_path: Path) -> None:
    recorder.start(tmp_path / "c")
    run_step(recorder, [("a", 0, 2)], 0, new={"a": 1})
    recorder.expert_ids_TLK[:1, 0] = torch.tensor([0, 1])
    recorder.record(Step(spans=[("a", 2, 1)], problem_ids={}, finished=set()))
    assert "expert ids -1..1" in recorder.stop()["error"]


def test_status_tells_of_a_dead_writer_while_it_runs(recorder: Recorder, tmp_path: Path) -> None:
    import time

    recorder.start(tmp_path / "c")
    recorder.record(Step(spans=[("a", 0, 1)], problem_ids={"a": 1}, finished=set()))
    assert recorder.status() == {}
    recorder.record(Step(spans=[], problem_ids={}, finished={"a"}))
    deadline = time.monotonic() + 30
    while not recorder.status() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "expected 0..3" in recorder.status()["error"]
