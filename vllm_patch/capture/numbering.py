"""Number requests in the order in which they appear, and label the rows of steps with these numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from profiler.capture.requests import CapturedRequest
from vllm_patch.capture.buffers import Snapshot
from vllm_patch.capture.capture_files import CapturedRows
from vllm_patch.capture.steps import NewRequest, Step


class Numbering:
    """Numbers requests from 0. requests: how many there were. unlabeled: how many of them had no label."""

    def __init__(self) -> None:
        self.requests = 0
        self.unlabeled = 0
        self._numbers: dict[str, int] = {}
        self._last: tuple[list[str], npt.NDArray[np.int32]] = ([], np.empty(0, dtype=np.int32))

    def rows(
        self, steps: Sequence[Step], snapshots: Sequence[Snapshot], hidden: Sequence[npt.NDArray[np.bool_] | None]
    ) -> CapturedRows:
        """Label the rows of consecutive steps. Waits until the snapshots are on the host.

        steps: the labels, in order. snapshots: the rows of the steps. hidden: for each, which rows' router inputs are kept.
        """
        numbers, positions = [np.empty(0, dtype=np.int32)], [np.empty(0, dtype=np.int32)]
        requests: list[CapturedRequest] = []
        finished: list[int] = []
        for step in steps:
            finished += [self._numbers.pop(name) for name in step.finished if name in self._numbers]
            # A preempted request may reappear as a new one.
            requests += [self._add(new) for new in step.new if new.request_id not in self._numbers]
            numbers_B = self._of(step.request_ids, changed=bool(step.new or step.finished))
            starts_B = step.starts_B.astype(np.int32, copy=False)
            if step.rows == len(numbers_B):
                numbers.append(numbers_B)
                positions.append(starts_B)
            else:
                counts_B = np.array([step.scheduled[name] for name in step.request_ids], dtype=np.int32)
                numbers.append(np.repeat(numbers_B, counts_B))
                first_rows_B = np.cumsum(counts_B, dtype=np.int32) - counts_B
                positions.append(np.arange(step.rows, dtype=np.int32) + np.repeat(starts_B - first_rows_B, counts_B))
        arrays = [snapshot.arrays() for snapshot in snapshots]
        return CapturedRows(np.concatenate(numbers), np.concatenate(positions), arrays, list(hidden), requests, finished)

    def _add(self, new: NewRequest) -> CapturedRequest:
        number = self._numbers[new.request_id] = self.requests
        self.requests += 1
        self.unlabeled += new.label is None
        return CapturedRequest(number, new.request_id, new.label, new.prompt_token_ids, new.cached_tokens)

    def _of(self, names: list[str], *, changed: bool) -> npt.NDArray[np.int32]:
        """Numbers of the requests; -1 for those that started before the capture."""
        if changed or names != self._last[0]:
            self._last = (names, np.array([self._numbers.get(name, -1) for name in names], dtype=np.int32))
        return self._last[1]
