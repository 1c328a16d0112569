"""Requests for the scoring process: sampled, whole, in order; and dropped rather than waited for."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from profiler.capture.requests import CapturedRequest
from profiler.live.metrics import SAMPLED, Samples
from profiler.live.options import ShadowOptions
from profiler.live.shadow_stream import ShadowModel, ShadowRequest, read_model, read_request, write_model, write_request
from vllm_patch.capture.buffers import Arrays
from vllm_patch.capture.capture_files import CapturedRows
from vllm_patch.live import shadow_feed
from vllm_patch.live.shadow_feed import ShadowFeed

MODEL = ShadowModel(moe_layers=[1, 2], num_experts=8, top_k=2, model="model", engine="0")
# Copies the stream to the published file.
COPY = "import json, shutil, sys; shutil.copyfileobj(sys.stdin.buffer.raw, open(json.loads(sys.argv[1])['published'], 'wb', 0))"
SLEEP = "import time; time.sleep(600)"
StartFeed = Callable[..., ShadowFeed]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartFeed]:
    feeds = []

    def start_feed(program: str = COPY, share: float = 1.0) -> ShadowFeed:
        options = ShadowOptions(run="unused", share=share)
        feeds.append(ShadowFeed(options, MODEL, tmp_path / "stream", [sys.executable, "-c", program]))
        return feeds[-1]

    yield start_feed
    for feed in feeds:
        feed.close()


def rows(
    numbers: list[int], positions: list[int], *, new: tuple[int, ...] = (), finished: tuple[int, ...] = ()
) -> CapturedRows:
    """Rows of one step; the experts of each say its request and position, its vocabulary id is 100 * request + position."""
    count = len(numbers)
    ids = np.array([[[n % 8, p % 8]] * 2 for n, p in zip(numbers, positions, strict=True)], dtype=np.int16).reshape(count, 2, 2)
    arrays: Arrays = {
        "expert_ids": ids,
        "weights": np.full((count, 2, 2), 0.5, dtype=np.float16),
        "input_ids": np.array([100 * n + p for n, p in zip(numbers, positions, strict=True)], dtype=np.int64),
    }
    return CapturedRows(
        np.array(numbers, dtype=np.int32),
        np.array(positions, dtype=np.int32),
        [arrays] if count else [],
        [None] if count else [],
        [CapturedRequest(number, f"r{number}", None, [1, 2], 0) for number in new],
        list(finished),
    )


def received(path: Path, count: int) -> list[ShadowRequest]:
    """What the process has received, once it is so many requests."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if path.exists():
            with path.open("rb") as stream:
                if read_model(stream) == MODEL:
                    found = [request for request in iter(lambda: read_request(stream), None) if request is not None]
                    if len(found) >= count:
                        return found
        time.sleep(0.02)
    raise AssertionError("nothing arrived")


def outcomes(feed: ShadowFeed) -> tuple[float, float]:
    samples = Samples()
    feed.samples(samples)
    return samples.get(SAMPLED, "sent"), samples.get(SAMPLED, "dropped")


def test_a_finished_request_arrives_whole(start: StartFeed, tmp_path: Path) -> None:
    feed = start()
    feed.take(rows([3, 3, 4], [0, 1, 0], new=(3, 4)), 3)
    # Position 1 is computed again after preemption: the last row counts.
    feed.take(rows([3, 3, 3], [1, 2, 3]), 6)
    feed.take(rows([], [], finished=(3,)), 6)
    (request,) = received(tmp_path / "stream", 1)
    assert request.positions_T.tolist() == [0, 1, 2, 3]
    assert request.vocab_ids_T.tolist() == [300, 301, 302, 303]
    assert request.expert_ids_TLK[:, 1].tolist() == [[3, 0], [3, 1], [3, 2], [3, 3]]
    assert (request.prompt_tokens, request.engine_tokens) == (2, 6)
    assert outcomes(feed) == (1, 0)


def test_about_the_chosen_share_is_sampled(start: StartFeed) -> None:
    feed = start(share=0.1)
    feed.take(rows([], [], new=tuple(range(2000))), 0)
    assert 150 < len(feed._open) < 250


def test_a_busy_engine_sheds_what_is_not_finished(start: StartFeed) -> None:
    feed = start()
    feed.take(rows([1, 2], [0, 0], new=(1, 2)), 2)
    feed.shed()
    feed.take(rows([1], [1], finished=(1, 2)), 3)
    assert outcomes(feed) == (0, 2)


def test_a_process_that_does_not_read_drops_requests_and_does_not_wait(start: StartFeed) -> None:
    feed = start(SLEEP)
    began = time.monotonic()
    # The pipe holds some, the queue eight.
    size = 5000
    for number in range(40):
        feed.take(rows([number] * size, list(range(size)), new=(number,)), 0)
        feed.take(rows([], [], finished=(number,)), 0)
    assert time.monotonic() - began < 20
    sent, dropped = outcomes(feed)
    assert sent + dropped == 40
    assert sent <= shadow_feed.WAITING + 3
    assert not feed._open
    assert feed._open_bytes == 0


@pytest.mark.parametrize("limit", ["REQUEST_BYTES", "OPEN_BYTES"])
def test_requests_that_are_too_large_are_dropped(start: StartFeed, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(shadow_feed, limit, 100)
    feed = start()
    feed.take(rows([1], [0], new=(1,)), 1)
    feed.take(rows([1] * 9, list(range(1, 10))), 10)
    feed.take(rows([], [], finished=(1,)), 10)
    assert outcomes(feed) == (0, 1)
    assert feed._open_bytes == 0


def test_a_process_that_ends_is_reported_once_and_nothing_more_is_sampled(
    start: StartFeed, caplog: pytest.LogCaptureFixture
) -> None:
    feed = start("import sys; sys.exit(1)")
    deadline = time.monotonic() + 30
    number = 0
    while not feed._failed and time.monotonic() < deadline:
        feed.take(rows([number], [0], new=(number,), finished=()), 1)
        feed.take(rows([], [], finished=(number,)), 1)
        number += 1
        time.sleep(0.05)
    assert feed._failed
    feed.take(rows([number], [0], new=(number,)), 1)
    assert not feed._open
    assert [record.message for record in caplog.records] == [
        "the predictor is no longer scored: its process has ended, and the engine continues"
    ]


def test_a_stream_that_is_cut_ends_with_its_last_whole_request(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    one = ShadowRequest(
        expert_ids_TLK=np.ones((3, 2, 2), dtype=np.uint16),
        weights_TLK=np.ones((3, 2, 2), dtype=np.float16),
        positions_T=np.arange(3, dtype=np.int32),
        vocab_ids_T=np.arange(3, dtype=np.int32),
        prompt_tokens=1,
        engine_tokens=3,
    )
    with path.open("wb") as stream:
        write_model(stream, MODEL)
        begin = stream.tell()
        write_request(stream, one)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with path.open("rb") as stream:
            assert (read_model(stream) is None) == (length < begin)
            if length >= begin:
                assert read_request(stream) is None
