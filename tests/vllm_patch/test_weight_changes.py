"""A capture ends before the weights change, whichever of the worker's methods changes them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from profiler.capture.options import CaptureOptions
from vllm_patch.worker import WEIGHT_CHANGES, WorkerCapture


class RunningRecorder:
    """Notes in `events` what ends it."""

    recording = True
    ended = False

    def __init__(self, events: list[str]) -> None:
        self._events = events

    def end(self, error: BaseException) -> None:
        self._events.append(f"ended: {error}")
        self.ended = True


def worker(events: list[str]) -> Any:
    def method(name: str) -> Callable[..., str]:
        def call(*_: object) -> str:
            events.append(name)
            return name

        return call

    return SimpleNamespace(**{name: method(name) for name in ("load_model", "execute_model", "shutdown", *WEIGHT_CHANGES)})


@pytest.mark.parametrize("name", WEIGHT_CHANGES)
def test_a_capture_ends_before_the_weights_change(name: str) -> None:
    events: list[str] = []
    one = worker(events)
    capture = WorkerCapture(one, CaptureOptions())
    capture._recorder = RunningRecorder(events)  # type: ignore[assignment] # a stand-in without buffers
    assert getattr(one, name)("anything") == name
    reason = f"{name} changed the loaded weights: start the engine again to record it"
    assert events == [f"ended: {reason}", name]
    assert capture.start("unused") == {"error": reason}


def test_a_capture_ends_once_however_often_the_weights_change(caplog: pytest.LogCaptureFixture) -> None:
    """Programs for reinforcement learning pass the new weights in many calls."""
    events: list[str] = []
    one = worker(events)
    capture = WorkerCapture(one, CaptureOptions())
    capture._recorder = RunningRecorder(events)  # type: ignore[assignment] # a stand-in without buffers
    with caplog.at_level("ERROR", logger="vllm.specmoe"):
        for name in (*WEIGHT_CHANGES, *WEIGHT_CHANGES):
            getattr(one, name)()
    assert [event for event in events if event.startswith("ended")] == events[:1]
    assert events[1:] == [*WEIGHT_CHANGES, *WEIGHT_CHANGES]
    assert len(caplog.records) == 1
