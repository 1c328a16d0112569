"""The recorder without vLLM: labels, preemption, logits and router inputs, bounded waiting, and a writer that dies."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from profiler.capture.requests import read_requests
from profiler.capture.sealing import run_folder, seal
from profiler.trace.schema import ModelMetadata
from profiler.trace.stream import HIDDEN_STREAM, LOGITS_STREAM, ROUTING_STREAM, gather, read_index
from vllm_patch.capture import recorder as recorder_module
from vllm_patch.capture.buffers import CaptureBuffers
from vllm_patch.capture.capture_files import CapturedRows
from vllm_patch.capture.recorder import Recorder
from vllm_patch.capture.steps import NewRequest, Step

MODEL = ModelMetadata(id="synthetic", moe_layers=[0, 1], num_experts=4, top_k=2)
HIDDEN = 3


def make_recorder(*, logits: bool = False, hidden_tokens: int = 0) -> Recorder:
    hidden = (1,) if hidden_tokens else ()
    buffers = CaptureBuffers(
        max_tokens=8, layers=2, num_experts=4, top_k=2, device="cpu", logits=logits, hidden_layers=hidden, hidden_size=HIDDEN
    )
    return Recorder(buffers, moe_layers=[0, 1], num_experts=4, top_k=2, hidden_layers=hidden, hidden_tokens=hidden_tokens)


@pytest.fixture
def recorder() -> Recorder:
    return make_recorder()


def labels(spans: list[tuple[str, int, int]], new: dict[str, int | None] | None = None, finished: tuple[str, ...] = ()) -> Step:
    """Spans are (request, first position, rows)."""
    return Step(
        request_ids=[request for request, _, _ in spans],
        starts_B=np.array([start for _, start, _ in spans]),
        scheduled={request: count for request, _, count in spans},
        rows=sum(count for _, _, count in spans),
        new=[NewRequest(request, label, [1, 2], 0) for request, label in (new or {}).items()],
        finished=set(finished),
    )


def run_step(recorder: Recorder, first_expert: int, step: Step) -> None:
    """What the hooks and the runner do in one step: every layer's hook copies, then the runner records."""
    rows = step.rows
    ids = torch.tensor([first_expert, (first_expert + 1) % 4]).repeat(rows, 1)
    for position in range(2):
        copy = recorder.buffers.copy_of_layer(position)
        copy(torch.full((rows, HIDDEN), float(first_expert)), torch.eye(4)[ids[:, 0]], torch.tensor([[0.75, 0.25]] * rows), ids)
    recorder.record(step)


def read_values(path: Path, name: str) -> list[tuple[int, int, np.ndarray]]:
    """(request number, position, values `[L, W]`) of every captured token, in order."""
    index = read_index(path)
    assert index is not None
    kind, width = index.layout.types[name]
    values = np.empty((len(index.token_ids_N), len(index.layout.layers), width), kind)
    everything = np.arange(len(values))
    others = {other: np.empty((len(values), len(index.layout.layers), w), k) for other, (k, w) in index.layout.types.items()}
    gather(index, everything, others | {name: values}, everything)
    return list(zip(index.problem_ids_N.tolist(), index.token_ids_N.tolist(), values, strict=True))


def read(folder: Path) -> dict[int, list[tuple[int, int]]]:
    """Request number -> (position, first expert of the first layer), in the order of the rows."""
    result: dict[int, list[tuple[int, int]]] = {}
    for number, position, ids_LK in read_values(folder / ROUTING_STREAM, "expert_ids"):
        result.setdefault(number, []).append((position, int(ids_LK[0, 0])))
    return result


def test_interleaved_requests_are_distinguished(recorder: Recorder, tmp_path: Path) -> None:
    facts = recorder.start(tmp_path / "c")
    assert (facts["moe_layers"], facts["num_experts"], facts["top_k"]) == ([0, 1], 4, 2)
    run_step(recorder, 0, labels([("a", 0, 2), ("b", 0, 3)], new={"a": 10, "b": 20}))
    run_step(recorder, 1, labels([("b", 3, 1), ("a", 2, 1)]))
    run_step(recorder, 2, labels([("b", 4, 1)], finished=("a",)))
    answer = recorder.stop()
    assert (answer["rows"], answer["requests"], answer["unlabeled"]) == (16, 2, 0)
    assert read(tmp_path / "c") == {0: [(0, 0), (1, 0), (2, 1)], 1: [(0, 0), (1, 0), (2, 0), (3, 1), (4, 2)]}
    assert [(r.number, r.request_id, r.label) for r in read_requests(tmp_path / "c")] == [(0, "a", 10), (1, "b", 20)]


def test_device_and_host_bytes_are_what_the_buffers_hold(recorder: Recorder, tmp_path: Path) -> None:
    facts = recorder.start(tmp_path / "c")
    recorder.stop()
    # 8 tokens x 2 layers x 2 pairs of int16 and float16.
    assert facts["device_bytes"] == 8 * 2 * 2 * 4
    assert facts["host_bytes"] == 3 * recorder_module.QUEUE_BYTES


def test_preempted_positions_keep_the_last_rows(recorder: Recorder, tmp_path: Path) -> None:
    recorder.start(run_folder(tmp_path, 0))
    run_step(recorder, 0, labels([("a", 0, 3)], new={"a": 1}))
    # vLLM may announce a resumed request as a new one.
    run_step(recorder, 2, labels([("a", 0, 4)], new={"a": 1}))
    assert recorder.stop()["requests"] == 1
    assert seal(tmp_path, MODEL, {1: 5}, {1: (0, 0)}) == {}
    rows = pq.read_table(tmp_path / "routing").to_pylist()
    assert [(r["problem_id"], r["token_id"], r["expert_ids"][0]) for r in rows if r["layer"] == 0] == [
        (1, token, 2) for token in range(4)
    ]


def test_requests_without_a_label_are_counted_and_those_from_before_the_start_are_left_out(tmp_path: Path) -> None:
    recorder = make_recorder()
    recorder.start(tmp_path / "c")
    run_step(recorder, 3, labels([("before", 7, 2), ("a", 0, 1), ("b", 0, 1)], new={"a": None, "b": 5}))
    answer = recorder.stop()
    assert (answer["rows"], answer["unlabeled"]) == (4, 1)
    assert read(tmp_path / "c") == {0: [(0, 3)], 1: [(0, 3)]}


def test_a_recorder_can_be_used_again(recorder: Recorder, tmp_path: Path) -> None:
    for folder in ("first", "second"):
        recorder.start(tmp_path / folder)
        run_step(recorder, 0, labels([("a", 0, 1)], new={"a": 1}))
        assert recorder.stop()["rows"] == 2
        assert read(tmp_path / folder) == {0: [(0, 0)]}
    assert "error" in recorder.stop()


def test_logits_of_every_layer_and_token_are_kept(tmp_path: Path) -> None:
    recorder = make_recorder(logits=True)
    recorder.start(tmp_path / "c")
    run_step(recorder, 2, labels([("a", 0, 2)], new={"a": 0}))
    recorder.stop()
    values = read_values(tmp_path / "c" / LOGITS_STREAM, "logits")
    assert [(number, position) for number, position, _ in values] == [(0, 0), (0, 1)]
    assert all((logits_LE == [[0, 0, 1, 0]] * 2).all() for _, _, logits_LE in values)


def test_router_inputs_are_kept_of_whole_requests_until_the_budget_is_used(tmp_path: Path) -> None:
    recorder = make_recorder(hidden_tokens=3)
    recorder.start(tmp_path / "c")
    run_step(recorder, 1, labels([("a", 0, 2)], new={"a": 0}))
    run_step(recorder, 2, labels([("a", 2, 1), ("b", 0, 3)], new={"b": 1}))
    run_step(recorder, 3, labels([("a", 3, 1), ("b", 3, 1), ("c", 0, 1)], new={"c": 2}))
    assert recorder.stop()["rows"] == 18
    values = read_values(tmp_path / "c" / HIDDEN_STREAM, "hidden")
    # b was admitted with one token of budget left and is kept whole; c came too late.
    assert sorted((number, position, float(hidden_LD[0, 0])) for number, position, hidden_LD in values) == [
        *[(0, 0, 1.0), (0, 1, 1.0), (0, 2, 2.0), (0, 3, 3.0)],
        *[(1, 0, 2.0), (1, 1, 2.0), (1, 2, 2.0), (1, 3, 3.0)],
    ]
    assert {hidden_LD.shape for _, _, hidden_LD in values} == {(1, HIDDEN)}


def test_a_slow_writer_makes_the_engine_wait_and_loses_nothing(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "QUEUE_BYTES", 1)
    monkeypatch.setattr(recorder_module, "BATCH_BYTES", 1)
    recorder.start(tmp_path / "c")
    files = recorder._files
    assert files is not None
    write = files.write

    def write_slowly(batch: CapturedRows) -> None:
        time.sleep(0.05)
        write(batch)

    monkeypatch.setattr(files, "write", write_slowly)
    for number in range(10):
        run_step(recorder, number % 4, labels([(str(number), 0, 1)], new={str(number): number}))
    answer = recorder.stop()
    assert answer["rows"] == 20
    assert answer["waits"] > 0
    assert answer["wait_seconds"] > 0
    assert read(tmp_path / "c") == {number: [(0, number % 4)] for number in range(10)}


def test_a_full_disk_is_reported_never_blocks_and_keeps_what_was_written(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "QUEUE_BYTES", 64)
    monkeypatch.setattr(recorder_module, "BATCH_BYTES", 1)
    recorder.start(tmp_path / "c")
    run_step(recorder, 0, labels([("a", 0, 2)], new={"a": 1}))
    deadline = time.monotonic() + 30
    while recorder.status()["rows"] < 4 and time.monotonic() < deadline:
        time.sleep(0.01)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recorder._files, "write", full)
    for _ in range(100):
        run_step(recorder, 0, labels([("a", 2, 8)]))
    assert "No space left" in recorder.stop()["error"]
    assert read(tmp_path / "c") == {0: [(0, 0), (1, 0)]}


@pytest.mark.parametrize("failed", [False, True], ids=["running", "failed before"])
def test_the_end_of_a_capture_writes_what_was_queued_before_it(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: bool
) -> None:
    monkeypatch.setattr(recorder_module, "BATCH_SECONDS", 1000)
    recorder.start(tmp_path / "c")
    for number in range(3):
        run_step(recorder, number, labels([(str(number), 0, 2)], new={str(number): number}))
    if failed:
        recorder.fail(OSError("no disk"))
    recorder.end(RuntimeError("weights changed"))
    if not failed:
        assert read(tmp_path / "c") == {number: [(0, number), (1, number)] for number in range(3)}
    # Nothing is recorded from here on.
    run_step(recorder, 3, labels([("3", 0, 2)], new={"3": 3}))
    answer = recorder.stop()
    assert answer["rows"] == (0 if failed else 12)
    assert answer["error"] == ("OSError: no disk" if failed else "RuntimeError: weights changed")


def test_the_end_of_a_capture_does_not_wait_for_a_writer_that_is_gone(recorder: Recorder, tmp_path: Path) -> None:
    recorder.start(tmp_path / "t")
    # The thread ends without an error, as if the interpreter were shutting down.
    with recorder._change:
        recorder._stopping = True
        recorder._change.notify_all()
    assert recorder._thread is not None
    recorder._thread.join()
    waiting = threading.Thread(target=recorder.end, args=(RuntimeError("the weights changed"),), daemon=True)
    waiting.start()
    waiting.join(timeout=10)
    assert not waiting.is_alive()
    assert recorder.ended
    assert recorder.status()["error"] == "RuntimeError: the weights changed"


def test_a_taken_folder_and_a_second_start_are_refused(recorder: Recorder, tmp_path: Path) -> None:
    recorder.start(tmp_path / "c")
    assert "already running" in recorder.start(tmp_path / "d")["error"]
    run_step(recorder, 0, labels([("a", 0, 1)], new={"a": 1}))
    recorder.stop()
    assert "exists already: a capture needs a new folder" in recorder.start(tmp_path / "c")["error"]


def test_a_hook_that_misses_a_layer_is_found_in_the_first_step(recorder: Recorder, tmp_path: Path) -> None:
    recorder.start(tmp_path / "c")
    recorder.buffers.tensors["expert_ids"][:1, 0] = torch.tensor([0, 1], dtype=torch.int16)
    recorder.record(labels([("a", 0, 1)], new={"a": 1}))
    assert "no routing arrived from layers [1]" in recorder.status()["error"]
    assert recorder.stop()["rows"] == 0


@pytest.mark.parametrize(("ids", "text"), [([0, 4], "expected 0..3"), ([2, 2], "the same expert twice")])
def test_ids_that_no_router_chooses_are_found_in_the_first_step(ids: list[int], text: str, tmp_path: Path) -> None:
    recorder = make_recorder()
    recorder.start(tmp_path / "c")
    recorder.buffers.tensors["expert_ids"][:1] = torch.tensor(ids, dtype=torch.int16)
    recorder.record(labels([("a", 0, 1)], new={"a": 1}))
    assert text in recorder.stop()["error"]


def test_a_layer_whose_hook_did_not_run_later_is_an_error_not_the_step_before(recorder: Recorder, tmp_path: Path) -> None:
    recorder.start(tmp_path / "c")
    run_step(recorder, 0, labels([("a", 0, 2)], new={"a": 1}))
    recorder.buffers.tensors["expert_ids"][:1, 0] = torch.tensor([0, 1], dtype=torch.int16)
    recorder.record(labels([("a", 2, 1)]))
    assert "expert ids -1..1" in recorder.stop()["error"]


def test_rows_are_readable_while_the_capture_runs(recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "BATCH_SECONDS", 0.01)
    recorder.start(tmp_path / "c")
    run_step(recorder, 0, labels([("a", 0, 2)], new={"a": 1}))
    deadline = time.monotonic() + 30
    while recorder.status()["rows"] < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert read(tmp_path / "c") == {0: [(0, 0), (1, 0)]}
    run_step(recorder, 1, labels([("a", 2, 1)]))
    recorder.stop()
    assert read(tmp_path / "c") == {0: [(0, 0), (1, 0), (2, 1)]}


def test_buffers_for_many_experts_hold_every_id() -> None:
    buffers = CaptureBuffers(max_tokens=1, layers=1, num_experts=40_000, top_k=1, device="cpu")
    buffers.copy_of_layer(0)(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([[39_999]]))
    assert buffers.snapshot(1, hidden=False).arrays()["expert_ids"].item() == 39_999
    assert (buffers.tensors["expert_ids"] == -1).all()
    assert np.iinfo(np.int16).max < 39_999
