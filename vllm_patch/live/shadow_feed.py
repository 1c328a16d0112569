"""Pass a sample of the finished requests to the process that scores a predictor on them, and never wait for it.

The process runs `python -m speculation.shadow`. It is started by name: this package does not import `speculation`, and a
predictor's libraries and threads stay out of the engine's process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import random
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.live.metrics import SAMPLED, Samples
from profiler.live.options import ShadowOptions
from profiler.live.shadow_stream import ShadowModel, ShadowRequest, write_model, write_request
from vllm_patch.capture.capture_files import CapturedRows

PROGRAM = "speculation.shadow"
# Bytes of the running requests that are kept until they finish, and of one request. Requests beyond are dropped.
OPEN_BYTES, REQUEST_BYTES = 64 << 20, 16 << 20
# Finished requests that may wait for the process. Few, so that what is scored is recent.
WAITING = 8
STOP_SECONDS = 2.0

log = logging.getLogger("vllm.specmoe")


@dataclass
class _OpenRequest:
    """The rows of a running request, in pieces: positions, expert ids, weights, vocabulary ids."""

    prompt_tokens: int
    pieces: list[tuple[npt.NDArray[Any], ...]] = field(default_factory=list)
    nbytes: int = 0

    def finish(self, engine_tokens: int) -> ShadowRequest:
        """Join the pieces. Of a position that was computed again, the last row counts."""
        positions_N, ids_NLK, weights_NLK, vocab_N = (np.concatenate(each) for each in zip(*self.pieces, strict=True))
        positions_T, last_T = np.unique(positions_N[::-1], return_index=True)
        rows_T = len(positions_N) - 1 - last_T
        return ShadowRequest(
            expert_ids_TLK=ids_NLK[rows_T].astype(np.uint16),
            weights_TLK=weights_NLK[rows_T].astype(np.float16),
            positions_T=positions_T.astype(np.int32),
            vocab_ids_T=vocab_N[rows_T].astype(np.int32),
            prompt_tokens=self.prompt_tokens,
            engine_tokens=engine_tokens,
        )


class ShadowFeed:
    """Collects the rows of sampled requests and passes each request on when it has finished.

    Args:
        options: What is scored, and how much.
        model: The loaded model.
        published: The file in which the process publishes its metrics.
        command: The program to start, for tests; default: `speculation.shadow`.
    """

    def __init__(self, options: ShadowOptions, model: ShadowModel, published: Path, command: list[str] | None = None) -> None:
        self._options, self._published = options, published
        # Always the same requests in the same order of arrival; independent of any period in the traffic.
        self._random = random.Random(0)
        self._open: dict[int, _OpenRequest] = {}
        self._open_bytes = 0
        self._sent = self._dropped = 0
        self._failed = False
        self._waiting: queue.Queue[ShadowRequest | None] = queue.Queue(WAITING)
        arguments = json.dumps({"options": asdict(options), "published": str(published), "cores": _cores()})
        self._process = subprocess.Popen(
            [*(command or [sys.executable, "-m", PROGRAM]), arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=_environment(),
        )
        self._thread = threading.Thread(target=self._send, args=(model,), name="specmoe-shadow", daemon=True)
        self._thread.start()

    def take(self, rows: CapturedRows, engine_tokens: int) -> None:
        """Take what belongs to sampled requests from a batch. engine_tokens: all tokens that were counted so far."""
        for request in rows.requests:
            if self._random.random() < self._options.share and not self._failed:
                self._open[request.number] = _OpenRequest(len(request.prompt_token_ids))
        if self._open and len(rows.numbers_T):
            self._collect(rows)
        for number in rows.finished:
            found = self._close(number)
            if found is not None and found.pieces:
                self._pass_on(found.finish(engine_tokens))

    def shed(self) -> None:
        """Drop all requests that are not finished: the engine is busy."""
        self._dropped += len(self._open)
        self._open.clear()
        self._open_bytes = 0

    def samples(self, samples: Samples) -> None:
        """Add the counts of sampled requests."""
        samples.add(SAMPLED, self._sent, "sent")
        samples.add(SAMPLED, self._dropped, "dropped")

    def close(self) -> None:
        """End the process."""
        self._failed = True
        # The thread, if it waits for the process to read, then gets an error.
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)
        self._thread.join(STOP_SECONDS)
        self._published.unlink(missing_ok=True)

    def _collect(self, rows: CapturedRows) -> None:
        sampled_T = np.flatnonzero(np.isin(rows.numbers_T, list(self._open)))
        if not len(sampled_T):
            return
        ids_TLK, weights_TLK = (
            np.concatenate([arrays[name] for arrays in rows.steps])[sampled_T] for name in ("expert_ids", "weights")
        )
        vocab_T = np.full(len(rows.numbers_T), -1, dtype=np.int32)
        if all("input_ids" in arrays for arrays in rows.steps):
            vocab_T[:] = np.concatenate([arrays["input_ids"] for arrays in rows.steps])
        numbers_T, positions_T, vocab_T = rows.numbers_T[sampled_T], rows.positions_T[sampled_T], vocab_T[sampled_T]
        for number in np.unique(numbers_T).tolist():
            own = np.flatnonzero(numbers_T == number)
            piece = positions_T[own], ids_TLK[own], weights_TLK[own], vocab_T[own]
            size = sum(array.nbytes for array in piece)
            found = self._open[number]
            if found.nbytes + size > REQUEST_BYTES or self._open_bytes + size > OPEN_BYTES:
                self._close(number)
                self._dropped += 1
                continue
            found.pieces.append(piece)
            found.nbytes += size
            self._open_bytes += size

    def _close(self, number: int) -> _OpenRequest | None:
        found = self._open.pop(number, None)
        if found is not None:
            self._open_bytes -= found.nbytes
        return found

    def _pass_on(self, request: ShadowRequest) -> None:
        try:
            self._waiting.put_nowait(request)
            self._sent += 1
        except queue.Full:
            self._dropped += 1

    def _send(self, model: ShadowModel) -> None:
        stream = self._process.stdin
        assert stream is not None
        try:
            write_model(stream, model)
            while (request := self._waiting.get()) is not None:
                write_request(stream, request)
        except OSError:
            if not self._failed:
                log.error("the predictor is no longer scored: its process has ended, and the engine continues")
        self._failed = True
        with contextlib.suppress(OSError):
            stream.close()


def _environment() -> dict[str, str]:
    """The process computes on one thread of the CPU, and loads no plugin of vLLM's."""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**os.environ, **one_thread, "CUDA_VISIBLE_DEVICES": ""}


def _cores() -> list[int]:
    """The cores that the process may use: its own are often one, because vLLM binds the engine's threads to cores."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    with contextlib.suppress(OSError):
        return sorted(os.sched_getaffinity(os.getppid()))
    return []
