"""Collect routing from static device buffers, step by step, and write it per request in a thread of its own."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from profiler.writer import RoutingWriter
from vllm_patch.steps import Step

# Steps that may wait for the writer before the engine does. A decode step of 256 requests of Mixtral is 0.1 MB.
QUEUED_STEPS = 64

_Rows = tuple[Step, npt.NDArray[np.int16], npt.NDArray[np.float32]]
_Span = tuple[int, npt.NDArray[np.int16], npt.NDArray[np.float32]]


class Recorder:
    """Buffers `[max_tokens, L, K]` that the hooks write in every step, and a writer thread behind a bounded queue.

    moe_layers: decoder layer index of each of the L MoE layers. Rows of a request are kept in memory until it finishes.
    """

    def __init__(
        self, moe_layers: list[int], num_experts: int, top_k: int, max_tokens: int, device: torch.device | str
    ) -> None:
        self.moe_layers = moe_layers
        self.num_experts = num_experts
        self.top_k = top_k
        shape = (max_tokens, len(moe_layers), top_k)
        # Out-of-range ids mark rows that no hook wrote in this step: the writer refuses them.
        self.expert_ids_TLK = torch.full(shape, -1, dtype=torch.int16, device=device)
        self.weights_TLK = torch.zeros(shape, dtype=torch.float32, device=device)
        self._queue: queue.Queue[_Rows | None] = queue.Queue(QUEUED_STEPS)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._writer: RoutingWriter | None = None
        self._unlabelled = 0

    @property
    def recording(self) -> bool:
        """Between `start` and `stop`."""
        return self._thread is not None

    def start(self, directory: Path) -> dict[str, Any]:
        """Begin writing to `directory`; answers the facts of the loaded model, or `error`."""
        if self.recording:
            return {"error": "a capture is already running in this engine"}
        try:
            self._writer = RoutingWriter(directory, self.moe_layers, self.num_experts, self.top_k)
        except Exception as error:
            return {"error": str(error)}
        self._error, self._unlabelled = None, 0
        self._thread = threading.Thread(target=self._write, name="specmoe-writer", daemon=True)
        self._thread.start()
        return {"moe_layers": self.moe_layers, "num_experts": self.num_experts, "top_k": self.top_k}

    def record(self, step: Step) -> None:
        """Snapshot the rows of a finished step. Waits if the writer is behind; does nothing once it has failed."""
        rows = sum(count for _, _, count in step.spans)
        ids = self.expert_ids_TLK[:rows].to("cpu", copy=True).numpy()
        weights = self.weights_TLK[:rows].to("cpu", copy=True).numpy()
        self.expert_ids_TLK[:rows].fill_(-1)
        while self._error is None:
            try:
                self._queue.put((step, ids, weights), timeout=1.0)
                return
            except queue.Full:
                continue

    def stop(self) -> dict[str, Any]:
        """Write what is left and close; answers `rows`, `unlabelled` requests and, if the writer failed, `error`."""
        if self._thread is None or self._writer is None:
            return {"error": "no capture is running in this engine"}
        while self._error is None:
            try:
                self._queue.put(None, timeout=1.0)
                break
            except queue.Full:
                continue
        self._thread.join()
        self._thread = None
        self._queue = queue.Queue(QUEUED_STEPS)
        return {"rows": self._writer.rows, "unlabelled": self._unlabelled} | self.status()

    def status(self) -> dict[str, Any]:
        """Answers `error` if the writer has failed; rows that came since then were dropped."""
        return {} if self._error is None else {"error": f"{type(self._error).__name__}: {self._error}"}

    def _write(self) -> None:
        assert self._writer is not None
        spans: dict[str, list[_Span]] = {}
        problem_ids: dict[str, int] = {}
        try:
            while (rows := self._queue.get()) is not None:
                step, ids, weights = rows
                for request in step.finished & spans.keys():
                    self._write_request(problem_ids.pop(request), spans.pop(request))
                for request, problem_id in step.problem_ids.items():
                    if problem_id is None:
                        self._unlabelled += 1
                    else:
                        problem_ids[request] = problem_id
                        spans.setdefault(request, [])
                row = 0
                for request, first, count in step.spans:
                    if request in spans:
                        # Copies: a view would keep the rows of every other request of the step.
                        rows_of_request = slice(row, row + count)
                        spans[request].append((first, ids[rows_of_request].copy(), weights[rows_of_request].copy()))
                    row += count
            for request, kept in spans.items():
                self._write_request(problem_ids[request], kept)
            self._writer.close()
        except BaseException as error:
            # Read by record() and stop(): the engine goes on, the collection fails with this reason.
            self._error = error

    def _write_request(self, problem_id: int, spans: list[_Span]) -> None:
        if not spans:
            return
        assert self._writer is not None
        ids_TLK, weights_TLK, captured_T = assemble(spans)
        token_ids_T = np.flatnonzero(captured_T)
        self._writer.add(problem_id, token_ids_T, ids_TLK[captured_T], weights_TLK[captured_T])


def assemble(
    spans: list[_Span],
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Join spans (first position, ids `[n, L, K]`, weights `[n, L, K]`) of one request by position.

    A position that was computed twice (preemption) keeps the later rows. Returns ids and weights `[T, L, K]` and which of
    the T positions were captured `[T]`.
    """
    length = max(first + len(ids) for first, ids, _ in spans)
    shape = (length, *spans[0][1].shape[1:])
    ids_TLK = np.full(shape, -1, dtype=np.int16)
    weights_TLK = np.zeros(shape, dtype=np.float32)
    captured_T = np.zeros(length, dtype=np.bool_)
    for first, ids, weights in spans:
        positions = slice(first, first + len(ids))
        ids_TLK[positions], weights_TLK[positions], captured_T[positions] = ids, weights, True
    return ids_TLK, weights_TLK, captured_T
