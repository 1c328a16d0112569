"""The files of a running capture: a single folder, or a sequence of folders for servers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from profiler.capture.requests import REQUESTS_FILE, CapturedRequest
from profiler.trace.stream import InputsWriter, RoutingWriter, ValuesWriter
from vllm_patch.capture.buffers import Arrays

NO_END = np.iinfo(np.int32).max

OpenWriters = Callable[[Path], tuple[RoutingWriter, dict[str, ValuesWriter]]]
"""Opens the writers of a run's folder: one for routing, and one each for `logits` and `hidden` if they are recorded."""


@dataclass(frozen=True)
class CapturedRows:
    """A batch of rows, whose requests are identified by number.

    numbers_T, positions_T: request number and sequence position of each row. steps: arrays `[T, L, W]` of each step, by name,
    and `input_ids` `[T]` if they are known.
    hidden: for each step, which rows' router inputs are kept `[T]`; None if none are. requests: those that started in this
    batch. finished: the numbers of those that ended.
    """

    numbers_T: npt.NDArray[np.int32]
    positions_T: npt.NDArray[np.int32]
    steps: list[Arrays]
    hidden: list[npt.NDArray[np.bool_] | None]
    requests: list[CapturedRequest]
    finished: list[int]


class Files(Protocol):
    """The destination of the writer thread's rows."""

    @property
    def rows(self) -> int: ...

    def write(self, rows: CapturedRows) -> None: ...

    def close(self) -> None: ...


class CaptureFiles:
    """The open files of one run's folder.

    When `write` returns, everything passed to it is readable, even if the process is killed right after. Routing is written
    last: a position that has routing has everything else that was recorded for it, too.

    first, end: this folder holds the rows of requests numbered `first` to `end` - 1.
    """

    def __init__(self, directory: Path, open_writers: OpenWriters, first: int = 0) -> None:
        self.directory = directory
        self.first, self.end = first, NO_END
        self.rows = 0
        self.nbytes = 0
        self._routing, self._values = open_writers(directory)
        self._inputs = InputsWriter(directory)
        self._requests: IO[str] = (directory / REQUESTS_FILE).open("w", encoding="utf-8")

    def write(self, rows: CapturedRows) -> None:
        lines = [request.to_json() + "\n" for request in rows.requests if self.first <= request.number < self.end]
        if lines:
            self._requests.writelines(lines)
            self._requests.flush()
        # A stable sort keeps each request's rows in the order in which they were computed.
        order_T = np.argsort(rows.numbers_T, kind="stable")
        order_T = order_T[slice(*np.searchsorted(rows.numbers_T[order_T], [self.first, self.end]))]
        if not len(order_T):
            return
        numbers_T, positions_T = rows.numbers_T[order_T], rows.positions_T[order_T]
        ids_TLK, weights_TLK = (_joined(rows.steps, name)[order_T] for name in ("expert_ids", "weights"))
        if "logits" in self._values:
            self._values["logits"].add(numbers_T, positions_T, _joined(rows.steps, "logits")[order_T])
        if "hidden" in self._values:
            self._write_hidden(rows)
        inputs = [arrays["input_ids"] for arrays in rows.steps if "input_ids" in arrays]
        if sum(map(len, inputs)) == len(rows.numbers_T):
            self._inputs.add(numbers_T, positions_T, np.concatenate(inputs)[order_T])
        self._routing.add(numbers_T, positions_T, ids_TLK, weights_TLK)
        self.rows += ids_TLK.shape[0] * ids_TLK.shape[1]
        self.nbytes += ids_TLK.nbytes + weights_TLK.nbytes

    def _write_hidden(self, rows: CapturedRows) -> None:
        first = 0
        for hidden_T, step in zip(rows.hidden, rows.steps, strict=True):
            of_step = slice(first, first + len(step["weights"]))
            first = of_step.stop
            if hidden_T is not None:
                numbers_T = rows.numbers_T[of_step]
                kept_T = hidden_T & (numbers_T >= self.first) & (numbers_T < self.end)
                self._values["hidden"].add(numbers_T[kept_T], rows.positions_T[of_step][kept_T], step["hidden"][kept_T])

    def close(self) -> None:
        self._requests.close()
        for writer in (self._routing, self._inputs, *self._values.values()):
            writer.close()


class RotatingFiles:
    """A sequence of `CaptureFiles`. Earlier ones stay open until their last request has finished."""

    def __init__(self, begin: Callable[[], Path], end: Callable[[Path], object], limit: int, open_writers: OpenWriters) -> None:
        self._begin, self._end, self._limit, self._open_writers = begin, end, limit, open_writers
        self._open = [CaptureFiles(begin(), open_writers)]
        self._active: set[int] = set()
        self._closed_rows = 0
        self._next_number = 0

    @property
    def rows(self) -> int:
        return self._closed_rows + sum(files.rows for files in self._open)

    def write(self, rows: CapturedRows) -> None:
        if rows.requests:
            self._active |= {request.number for request in rows.requests}
            self._next_number = rows.requests[-1].number + 1
        for files in self._open:
            files.write(rows)
        self._active -= set(rows.finished)
        current = self._open[-1]
        if self._limit and current.nbytes >= self._limit:
            current.end = self._next_number
            self._open.append(CaptureFiles(self._begin(), self._open_writers, first=self._next_number))
        for files in self._open[:-1]:
            if not any(files.first <= number < files.end for number in self._active):
                self._close(files)

    def close(self) -> None:
        for files in list(self._open):
            self._close(files)

    def _close(self, files: CaptureFiles) -> None:
        files.close()
        self._open.remove(files)
        self._closed_rows += files.rows
        self._end(files.directory)


def _joined(steps: list[Arrays], name: str) -> npt.NDArray[Any]:
    return np.concatenate([arrays[name] for arrays in steps])
