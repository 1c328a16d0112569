"""Take labeled steps from the engine and write them in a separate thread, behind a queue of bounded size."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.trace.schema import ModelMetadata
from profiler.trace.stream import HIDDEN_STREAM, LOGITS_STREAM, RoutingWriter, ValuesWriter
from vllm_patch.capture.buffers import CaptureBuffers, Snapshot
from vllm_patch.capture.capture_files import CaptureFiles, Files, RotatingFiles
from vllm_patch.capture.first_step import BypassedHookError, check_first_step
from vllm_patch.capture.numbering import Numbering
from vllm_patch.capture.steps import Step

# Bytes that may be queued before the engine waits for the writer. The writer may hold as many again.
QUEUE_BYTES = 32 << 20
# The writer takes the queue when it holds this many bytes, or after this time: large batches cost least per row. Written rows
# survive a kill, so a crash loses only the queue: one second of rows at most, or a full queue.
BATCH_BYTES = 8 << 20
BATCH_SECONDS = 1.0


@dataclass
class _Batch:
    """Queued steps, in order: their labels, their rows, and a mask of the rows whose router inputs are kept."""

    steps: list[Step] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    hidden: list[npt.NDArray[np.bool_] | None] = field(default_factory=list)
    nbytes: int = 0


class Recorder:
    """Between `start` and `stop`, copies `buffers` after each step (`record`) and writes the rows to a capture folder.

    Requests are numbered from 0 as they appear. Rows carry these numbers; `requests.jsonl` maps them to request ids.

    moe_layers: decoder layer index of each of the L MoE layers. hidden_layers: the decoder layers whose router inputs are
    recorded. hidden_tokens: no further request's router inputs are recorded once this many tokens have been.
    """

    def __init__(
        self,
        buffers: CaptureBuffers,
        *,
        moe_layers: list[int],
        num_experts: int,
        top_k: int,
        hidden_layers: tuple[int, ...] = (),
        hidden_tokens: int = 0,
    ) -> None:
        self.buffers = buffers
        self.moe_layers, self.num_experts, self.top_k = moe_layers, num_experts, top_k
        self._hidden_layers, self._hidden_budget = hidden_layers, hidden_tokens
        self._thread: threading.Thread | None = None
        self._files: Files | None = None
        self._error: BaseException | None = None

    @property
    def recording(self) -> bool:
        """Whether a capture is running: `start` was called, and `stop` was not."""
        return self._thread is not None

    @property
    def ended(self) -> bool:
        """Whether the running capture ended with an error: nothing more is recorded until the next one."""
        return self._error is not None

    def start(self, directory: Path, hidden_tokens: int | None = None) -> dict[str, Any]:
        """Begin writing to `directory`. Returns the `facts` of the loaded model, or `error`.

        hidden_tokens: a token budget for router inputs that replaces the recorder's own.
        """
        if hidden_tokens is not None:
            self._hidden_budget = hidden_tokens
        return self._start(lambda: CaptureFiles(directory, self._open_writers))

    def start_rotating(self, begin: Callable[[], Path], end: Callable[[Path], object], limit: int) -> dict[str, Any]:
        """Like `start`, but writes to a sequence of folders.

        A request stays in the folder that was open when it started. Once a folder holds `limit` bytes of rows, new requests
        go to the next folder. A folder is closed when its last request has finished.

        begin: creates a folder and returns it. end: called with each closed folder, in the writer thread.
        limit: in bytes; 0 for no limit.
        """
        return self._start(lambda: RotatingFiles(begin, end, limit, self._open_writers))

    def _start(self, open_files: Callable[[], Files]) -> dict[str, Any]:
        if self.recording:
            return {"error": "a capture is already running in this engine"}
        self._error = None
        self._verified = False
        self._numbering = Numbering()
        self._hidden_left = self._hidden_budget
        self._hidden_requests: set[str] = set()
        self._waits, self._wait_seconds = 0, 0.0
        self._batch = _Batch()
        self._stopping = False
        self._ending: BaseException | None = None
        self._change = threading.Condition()
        # Warm-up runs wrote to the buffers: their rows must not pass for rows of the first step.
        self.buffers.clear()
        try:
            self._files = open_files()
        except Exception as error:
            return {"error": _text(error)}
        self._thread = threading.Thread(target=self._write, name="specmoe-writer", daemon=True)
        self._thread.start()
        return self.facts()

    def facts(self) -> dict[str, Any]:
        """Facts of the loaded model, and the memory that capture takes: on the device, and at most on the host."""
        return {
            "moe_layers": self.moe_layers,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "device_bytes": self.buffers.nbytes,
            # The queue (or one step, if that is larger); and as much again held by the writer, with a sorted copy.
            "host_bytes": 3 * max(QUEUE_BYTES, self.buffers.nbytes),
        }

    def record(self, step: Step) -> Snapshot | None:
        """Queue the rows of a finished step, and return them. Waits if the writer is behind.

        After the capture has failed, it does nothing and returns None.
        """
        if self._error is not None:
            return None
        hidden_T = self._choose_hidden(step)
        snapshot = self.buffers.snapshot(step.rows, hidden=hidden_T is not None, input_ids=step.input_ids)
        if not self._verified and step.rows:
            self._verify(snapshot)
        with self._change:
            if self._batch.nbytes + snapshot.nbytes > QUEUE_BYTES and self._batch.nbytes:
                began = time.perf_counter()
                self._change.wait_for(lambda: not self._batch.nbytes or self._error is not None)
                self._waits += 1
                self._wait_seconds += time.perf_counter() - began
            batch = self._batch
            batch.steps.append(step)
            batch.snapshots.append(snapshot)
            batch.hidden.append(hidden_T)
            batch.nbytes += snapshot.nbytes
            if batch.nbytes >= BATCH_BYTES:
                self._change.notify_all()
        return snapshot

    def fail(self, error: BaseException) -> None:
        """End the capture with this error. Written rows stay readable, and the engine continues."""
        with self._change:
            self._error = self._error or error
            self._change.notify_all()

    def end(self, error: BaseException) -> None:
        """Write the queued rows, then end the capture with this error. Returns when the rows are written, or cannot be."""
        with self._change:
            self._ending = error
            self._change.notify_all()
            while self._error is None and self._thread is not None and self._thread.is_alive():
                self._change.wait(BATCH_SECONDS)
            # A writer that is gone writes nothing any more.
            self._error = self._error or error

    def stop(self) -> dict[str, Any]:
        """Write the queued rows and close the files. Returns the same as `status`."""
        if self._thread is None:
            return {"error": "no capture is running in this engine"}
        with self._change:
            self._stopping = True
            self._change.notify_all()
        self._thread.join()
        self._thread = None
        return self.status()

    def status(self) -> dict[str, Any]:
        """Counts of `rows`, `requests` and `unlabeled` requests; how often (`waits`) and how long the engine waited; `error`.

        `error` is there only if the capture failed; rows that came after the error were dropped. All counts are 0 before the
        first `start`.
        """
        if self._files is None:
            return {"rows": 0, "requests": 0, "unlabeled": 0, "waits": 0, "wait_seconds": 0.0}
        answer = {
            "rows": self._files.rows,
            "requests": self._numbering.requests,
            "unlabeled": self._numbering.unlabeled,
            "waits": self._waits,
            "wait_seconds": self._wait_seconds,
        }
        return answer if self._error is None else {**answer, "error": _text(self._error)}

    def _open_writers(self, directory: Path) -> tuple[RoutingWriter, dict[str, ValuesWriter]]:
        tensors = self.buffers.tensors
        values = {}
        if "logits" in tensors:
            values["logits"] = ValuesWriter(directory / LOGITS_STREAM, self.moe_layers, "logits", self.num_experts)
        if "hidden" in tensors:
            layers, width = list(self._hidden_layers), tensors["hidden"].shape[-1]
            values["hidden"] = ValuesWriter(directory / HIDDEN_STREAM, layers, "hidden", width)
        model = ModelMetadata(id="recorded", moe_layers=self.moe_layers, num_experts=self.num_experts, top_k=self.top_k)
        return RoutingWriter(directory, model), values

    def _choose_hidden(self, step: Step) -> npt.NDArray[np.bool_] | None:
        """A mask of the rows whose router inputs are kept `[T]`; None if no row's are.

        Router inputs are kept for whole requests, until the token budget is used up.
        """
        if not self._hidden_layers:
            return None
        self._hidden_requests -= step.finished
        for new in step.new:
            if self._hidden_left > 0:
                self._hidden_requests.add(new.request_id)
        kept = np.array([request in self._hidden_requests for request in step.request_ids], dtype=np.bool_)
        hidden_T = np.repeat(kept, [step.scheduled[request] for request in step.request_ids])
        self._hidden_left -= int(hidden_T.sum())
        return hidden_T if hidden_T.any() else None

    def _verify(self, snapshot: Snapshot) -> None:
        """Check the first rows immediately: a hook that does not work must not go unnoticed until the end."""
        self._verified = True
        try:
            check_first_step(snapshot.arrays(), self.moe_layers, self.num_experts)
        except BypassedHookError as error:
            self._error = error

    def _is_due(self) -> bool:
        """Whether the writer takes the queue before its time is over."""
        return self._stopping or self._batch.nbytes >= BATCH_BYTES or (self._ending is not None and self._error is None)

    def _write(self) -> None:
        files = self._files
        assert files is not None
        try:
            while True:
                with self._change:
                    self._change.wait_for(self._is_due, timeout=BATCH_SECONDS)
                    batch, self._batch = self._batch, _Batch()
                    stopping, ending = self._stopping, self._ending
                    self._change.notify_all()
                if self._error is None:
                    files.write(self._numbering.rows(batch.steps, batch.snapshots, batch.hidden))
                    if ending is not None:
                        self.fail(ending)
                if stopping:
                    break
            files.close()
        except BaseException as error:
            # Rows that were written before the error stay readable.
            with contextlib.suppress(Exception):
                files.close()
            # record(), status() and stop() read the error: the engine continues, and the collection fails with this reason.
            with self._change:
                self._error = error
                self._change.notify_all()


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
