"""Counting in a thread: nothing is lost, nothing waits, and what does not fit is dropped and reported."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from profiler.live.metrics import (
    CAPTURE_ROWS,
    CAPTURE_WAITS,
    COUNTING,
    DROPPED,
    EXPERT_TOKENS,
    REPEATED,
    STEPS,
    TOKENS,
    TOTAL,
    Samples,
)
from profiler.live.publication import Publisher, read_publications
from vllm_patch.capture.buffers import CaptureBuffers
from vllm_patch.capture.recorder import Recorder
from vllm_patch.capture.steps import NewRequest, Step
from vllm_patch.live import counter as counter_module
from vllm_patch.live.counter import LiveCounter


def step(spans: list[tuple[str, int, int]], new: tuple[str, ...] = (), finished: tuple[str, ...] = ()) -> Step:
    """Spans are (request, first position, rows)."""
    return Step(
        request_ids=[request for request, _, _ in spans],
        starts_B=np.array([start for _, start, _ in spans]),
        scheduled={request: count for request, _, count in spans},
        rows=sum(count for _, _, count in spans),
        new=[NewRequest(request, None, [1, 2], 0) for request in new],
        finished=set(finished),
    )


class Engine:
    """Hooks, a recorder and a counter as in a worker: every row of step i selects the experts i and i + 1 (mod 4)."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.buffers = CaptureBuffers(max_tokens=8, layers=1, num_experts=4, top_k=2, device="cpu")
        self.recorder = Recorder(self.buffers, moe_layers=[5], num_experts=4, top_k=2)
        self.folder = folder
        self.counter = LiveCounter(
            self.buffers,
            Publisher.of_engine(folder, "model"),
            moe_layers=[5],
            num_experts=4,
            top_k=2,
            window_seconds=60.0,
            experts=True,
            recorder_status=lambda: self.recorder.status() if self.recorder.recording else None,
            **options,
        )
        self.steps = 0

    def run(self, one: Step, broken: bool = False) -> None:
        ids = torch.tensor([self.steps % 4, (self.steps + 1) % 4]).repeat(one.rows, 1)
        if not broken:
            self.buffers.copy_of_layer(0)(torch.zeros(0), torch.zeros(0), torch.full((one.rows, 2), 0.5), ids)
        self.steps += 1
        snapshot = self.recorder.record(one) if self.recorder.recording else None
        self.counter.offer(one, snapshot)

    def samples(self) -> Samples:
        return self.counter.publication().samples


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    found = Engine(tmp_path / "live")
    yield found
    found.counter.close()


def test_everything_offered_is_counted_and_published(engine: Engine) -> None:
    engine.run(step([("a", 0, 3)], new=("a",)))
    engine.run(step([("a", 3, 1)]))
    engine.run(step([], finished=("a",)))
    samples = engine.samples()
    assert (samples.get(TOKENS), samples.get(DROPPED), samples.get(COUNTING)) == (4, 0, 1)
    assert [samples.get(EXPERT_TOKENS, 5, expert) for expert in range(4)] == [3, 4, 1, 0]
    assert [samples.get(STEPS, kind) for kind in ("decode", "mixed")] == [1, 1]
    # Of three comparisons, two share both experts, the last one of two.
    assert samples.get(REPEATED, 5, TOTAL) == pytest.approx(5 / 6)
    (published,) = read_publications(engine.folder)
    assert (published.model, published.engine, published.samples) == ("model", "0", samples)
    json.loads(published.to_json())
    engine.counter.close()
    assert list(read_publications(engine.folder)) == []


def test_a_recording_in_the_same_engine_shares_its_rows_and_shows_its_state(engine: Engine, tmp_path: Path) -> None:
    engine.run(step([("a", 0, 2)], new=("a",)))
    assert engine.recorder.start(tmp_path / "capture")["num_experts"] == 4
    engine.run(step([("b", 0, 2)], new=("b",)))
    samples = engine.samples()
    assert samples.get(CAPTURE_WAITS) == 0
    assert CAPTURE_ROWS.name in samples.values
    assert engine.recorder.stop()["rows"] == 2
    engine.run(step([("a", 2, 1), ("b", 2, 1)]))
    samples = engine.samples()
    assert samples.get(TOKENS) == 6
    assert CAPTURE_ROWS.name not in samples.values


class Stuck:
    """Holds the counting thread at its next batch, until `go` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        count = LiveCounter._count

        def count_when_allowed(counter: LiveCounter, taken: Any) -> None:
            self.entered.set()
            assert self.go.wait(30)
            count(counter, taken)

        monkeypatch.setattr(LiveCounter, "_count", count_when_allowed)


def test_what_the_queue_has_no_room_for_is_dropped_and_the_engine_does_not_wait(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Every step is a batch, and two steps of eight rows (of 2 x 2 + 2 x 2 bytes at first, then 2 x 2) fill the queue.
    monkeypatch.setattr(counter_module, "BATCH_BYTES", 1)
    monkeypatch.setattr(counter_module, "QUEUE_BYTES", 100)
    stuck = Stuck(monkeypatch)
    engine = Engine(tmp_path / "live")
    try:
        engine.run(step([("a", 0, 8)], new=("a",)))
        assert stuck.entered.wait(30)
        began = time.monotonic()
        for number in range(100):
            name, finished = f"r{number}", (f"r{number - 1}",) if number else ()
            engine.run(step([(name, 0, 8)], new=(name,), finished=finished))
        assert time.monotonic() - began < 5
        queue = engine.counter._queue
        assert queue.nbytes < 300
        # Two steps with rows, and one that says what began and ended in all the others.
        assert [one.rows for one in queue.steps] == [8, 8, 0]
        assert [new.request_id for new in queue.steps[-1].new] == ["r99"]
        stuck.go.set()
        engine.run(step([("r99", 8, 1)]))
        engine.run(step([("r99", 9, 1)], finished=()))
        samples = engine.samples()
    finally:
        stuck.go.set()
        engine.counter.close()
    assert samples.get(DROPPED) >= 98 * 8
    assert samples.get(TOKENS) + samples.get(DROPPED) == 8 + 100 * 8 + 2
    assert engine.counter._numbering._numbers.keys() == {"a", "r99"}


def test_a_hook_that_is_bypassed_ends_counting_and_not_the_engine(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    engine.run(step([("a", 0, 2)], new=("a",)), broken=True)
    engine.samples()
    engine.run(step([("a", 2, 1)]))
    samples = engine.samples()
    assert (samples.get(COUNTING), samples.get(TOKENS)) == (0, 0)
    assert "no routing arrived from layers [5]" in caplog.text


def test_a_full_disk_does_not_end_counting(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    publish = Publisher.publish

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Publisher, "publish", fail)
    engine.run(step([("a", 0, 2)], new=("a",)))
    engine.samples()
    monkeypatch.setattr(Publisher, "publish", publish)
    engine.run(step([("a", 2, 1)]))
    assert engine.samples().get(TOKENS) == 3
    assert [record.message for record in caplog.records] == ["live metrics cannot be published: no space left on device"]
    (published,) = read_publications(engine.folder)
    assert published.samples.get(TOKENS) == 3


def test_engines_of_one_folder_have_numbers_of_their_own(tmp_path: Path) -> None:
    first, second = (Publisher.of_engine(tmp_path, "model") for _ in range(2))
    assert (first.engine, second.engine) == ("0", "1")
    # Nothing was published yet, which is no error.
    assert list(read_publications(tmp_path)) == []
    first.close()
    assert Publisher.of_engine(tmp_path, "model").engine == "0"
