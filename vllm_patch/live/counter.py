"""Count the steps of an engine in a thread, and publish the counts about once a second. The engine never waits.

The queue is bounded in bytes. A step for which it has no room is dropped and counted as dropped; its rows are in no metric.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from profiler.live.metrics import (
    CAPTURE_ROWS,
    CAPTURE_WAIT_SECONDS,
    CAPTURE_WAITS,
    COUNTING,
    DROPPED,
    EXPERT_TOKENS,
    STEP_KINDS,
    STEPS,
    TOKENS,
    TOTAL,
    WINDOW,
    WINDOW_TOKENS,
    Samples,
)
from profiler.live.publication import Publication, Publisher
from vllm_patch.capture.buffers import CaptureBuffers, Snapshot
from vllm_patch.capture.first_step import check_first_step
from vllm_patch.capture.numbering import Numbering
from vllm_patch.capture.steps import Step
from vllm_patch.live.counts import RollingCounts, RoutingCounts, RowCounter
from vllm_patch.live.shadow_feed import ShadowFeed

QUEUE_BYTES = 32 << 20
# Above this, counting is so far behind that nothing is scored.
BUSY_BYTES = QUEUE_BYTES // 4
BATCH_BYTES = 8 << 20
BATCH_SECONDS = 1.0
FLUSH_SECONDS = 10.0

log = logging.getLogger("vllm.specmoe")


@dataclass
class _Queue:
    """Queued steps, in order, and the rows of those that have any."""

    steps: list[Step] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    nbytes: int = 0


class LiveCounter:
    """Counts every step that is offered to it, from its creation to `close`.

    Args:
        buffers: The buffers that the hooks fill.
        publisher: Where the counts are published.
        moe_layers: Decoder layer index of each of the L MoE layers.
        num_experts: E.
        top_k: K.
        window_seconds: Length of the rolling window.
        experts: Whether to publish the tokens of each expert.
        feed: Where the rows of sampled requests go; None without a predictor to score.
        recorder_status: The status of a recording in the same engine (`Recorder.status`), while there is one.
    """

    def __init__(
        self,
        buffers: CaptureBuffers,
        publisher: Publisher,
        *,
        moe_layers: list[int],
        num_experts: int,
        top_k: int,
        window_seconds: float,
        experts: bool = False,
        feed: ShadowFeed | None = None,
        recorder_status: Callable[[], dict[str, Any] | None] = lambda: None,
    ) -> None:
        self._buffers, self._publisher = buffers, publisher
        self._moe_layers, self._num_experts, self._top_k = moe_layers, num_experts, top_k
        self._experts, self._feed, self._recorder_status = experts, feed, recorder_status
        layers = len(moe_layers)
        self._rows = RowCounter(layers, num_experts, top_k)
        self._total = RoutingCounts.zeros(layers, num_experts)
        self._window = RollingCounts(layers, num_experts, window_seconds)
        self._numbering = Numbering()
        self._queue = _Queue()
        self._dropped = 0
        self._change = threading.Condition()
        self._stopping = self._flushing = False
        self._verified = self._unpublished = False
        self._latest = Samples()
        self._error: BaseException | None = None
        # Warm-up runs wrote to the buffers: their rows must not pass for rows of the first step.
        buffers.clear()
        self._thread = threading.Thread(target=self._run, name="specmoe-live", daemon=True)
        self._thread.start()

    def offer(self, step: Step, snapshot: Snapshot | None = None) -> None:
        """Queue a finished step. Never waits for the counting: a step for which the queue has no room is dropped.

        snapshot: its rows, if a recording copied them already.
        """
        if self._error is not None:
            return
        has_room = self._queue.nbytes < QUEUE_BYTES
        if step.rows and has_room and snapshot is None:
            names = ("expert_ids",) if self._feed is None and self._verified else ("expert_ids", "weights")
            input_ids = None if self._feed is None else step.input_ids
            snapshot = self._buffers.snapshot(step.rows, names=names, input_ids=input_ids)
        with self._change:
            if not step.rows or not has_room:
                self._dropped += step.rows
                self._note_only(step)
                return
            assert snapshot is not None
            self._queue.steps.append(step)
            self._queue.snapshots.append(snapshot)
            self._queue.nbytes += snapshot.nbytes
            if self._queue.nbytes >= BATCH_BYTES:
                self._change.notify_all()

    def publication(self) -> Publication:
        """What is published, once everything offered before has been counted."""
        with self._change:
            self._flushing = True
            self._change.notify_all()
            self._change.wait_for(lambda: not self._flushing or not self._thread.is_alive(), timeout=FLUSH_SECONDS)
        return Publication(self._publisher.model, self._publisher.engine, self._latest)

    def fail(self, error: BaseException) -> None:
        """Count nothing any more. The engine continues."""
        if self._error is None:
            log.error("routing is no longer counted: %s: %s", type(error).__name__, error)
        self._error = error

    def close(self) -> None:
        """Count what is queued, then publish nothing any more."""
        with self._change:
            self._stopping = True
            self._change.notify_all()
        self._thread.join()
        if self._feed is not None:
            self._feed.close()
        self._publisher.close()

    def _note_only(self, step: Step) -> None:
        """Keep which requests a step without rows starts and ends; several such steps in a row become one."""
        steps = self._queue.steps
        if steps and not steps[-1].rows:
            started = [new for new in steps[-1].new if new.request_id not in step.finished]
            steps[-1] = replace(steps[-1], new=[*started, *step.new], finished=steps[-1].finished | step.finished)
        elif step.new or step.finished:
            nothing = np.empty(0, dtype=np.int32)
            steps.append(replace(step, request_ids=[], starts_B=nothing, scheduled={}, rows=0, input_ids=None))

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(self._is_due, timeout=BATCH_SECONDS)
                taken, self._queue = self._queue, _Queue()
                stopping, flushing = self._stopping, self._flushing
            try:
                if self._error is None:
                    self._count(taken)
                self._publish(self._samples(time.monotonic()))
            except Exception as error:
                self.fail(error)
            if flushing:
                with self._change:
                    self._flushing = False
                    self._change.notify_all()
            if stopping:
                return

    def _publish(self, samples: Samples) -> None:
        if samples == self._latest:
            return
        self._latest = samples
        try:
            self._publisher.publish(samples)
        except OSError as error:
            # A full disk: counting continues, and the next second may have room.
            if not self._unpublished:
                log.error("live metrics cannot be published: %s", error)
            self._unpublished = True

    def _is_due(self) -> bool:
        return self._stopping or self._flushing or self._queue.nbytes >= BATCH_BYTES

    def _count(self, taken: _Queue) -> None:
        rows = self._numbering.rows(taken.steps, taken.snapshots, [None] * len(taken.snapshots))
        if rows.steps:
            if not self._verified:
                check_first_step(rows.steps[0], self._moe_layers, self._num_experts)
                self._verified = True
            counted = [step for step in taken.steps if step.rows]
            counts = self._rows.count(
                rows.numbers_T,
                rows.positions_T,
                np.concatenate([arrays["expert_ids"] for arrays in rows.steps]),
                np.array([step.rows for step in counted]),
                np.array([step.rows == len(step.request_ids) for step in counted]),
            )
            self._total.add(counts)
            self._window.add(counts, time.monotonic())
        self._rows.forget(rows.finished)
        if self._feed is not None:
            if taken.nbytes > BUSY_BYTES:
                self._feed.shed()
            self._feed.take(rows, int(self._total.tokens))

    def _samples(self, now: float) -> Samples:
        samples, window, total = Samples(), self._window.total(now), self._total
        samples.add(TOKENS, int(total.tokens))
        for number, kind in enumerate(STEP_KINDS):
            samples.add(STEPS, int(total.steps_2[number]), kind)
        samples.add(WINDOW_TOKENS, int(window.tokens))
        samples.add(COUNTING, float(self._error is None))
        samples.add(DROPPED, self._dropped)
        total.samples(samples, self._moe_layers, self._top_k, TOTAL)
        window.samples(samples, self._moe_layers, self._top_k, WINDOW)
        if self._experts:
            for layer, tokens_E in zip(self._moe_layers, total.load_LE.tolist(), strict=True):
                for expert, tokens in enumerate(tokens_E):
                    samples.add(EXPERT_TOKENS, tokens, layer, expert)
        status = self._recorder_status()
        if status is not None:
            samples.add(CAPTURE_ROWS, status["rows"])
            samples.add(CAPTURE_WAITS, status["waits"])
            samples.add(CAPTURE_WAIT_SECONDS, status["wait_seconds"])
        if self._feed is not None:
            self._feed.samples(samples)
        return samples
