"""Training on a trace that is larger than memory: one group of problems is in memory at a time."""

from __future__ import annotations

from math import ceil

import numpy as np
import numpy.typing as npt

from profiler.errors import EmptyPartError
from profiler.trace.reader import Trace
from speculation.data.routes import Routes, load_problems, problems_of_part


class RouteGroups:
    """One part of the split of `trace`, as a `RouteSource` whose groups are read when they are used.

    Problems stay in order. Each group holds about as many rows as `shards_per_group` shards; a shard is a routing file of the
    trace (`routing/part-*.parquet`, at most 16.8 M rows). The constructor reads the trace once to count the tokens.
    Problems with the digests `without` are left out. Raises `EmptyPartError` if no problem falls into the part.
    """

    def __init__(
        self,
        trace: Trace,
        part: str,
        shards_per_group: int,
        *,
        router_inputs: bool = False,
        without: npt.NDArray[np.uint64] | None = None,
    ) -> None:
        self._trace, self._part, self._router_inputs = trace, part, router_inputs
        wanted = problems_of_part(trace, part, without)
        self._spans: list[range] = []
        self.group_tokens: list[int] = []
        self.problem_ids: npt.NDArray[np.int32] = np.empty(0, dtype=np.int32)
        for span in trace.spans(ceil(len(trace.routing_files) / shards_per_group)):
            ids_T = self._problems_in(span, wanted)
            if len(ids_T):
                self._spans.append(span)
                self.group_tokens.append(len(ids_T))
                self.problem_ids = np.union1d(self.problem_ids, ids_T)
        if not self._spans:
            raise EmptyPartError(f"{trace.path}: no problem falls into the {part} part of the split; collect more problems")
        self._loaded: tuple[int, Routes] | None = None

    def __len__(self) -> int:
        return sum(self.group_tokens)

    def group(self, number: int) -> Routes:
        """Load one group. It stays in memory until another group is requested."""
        if self._loaded is None or self._loaded[0] != number:
            # Release the old group before loading the new one, so that two are never in memory.
            self._loaded = None
            self._loaded = (number, self._load(self._spans[number], self.problem_ids))
        return self._loaded[1]

    def _load(self, span: range, problem_ids: npt.NDArray[np.int32]) -> Routes:
        return load_problems(self._trace, problem_ids, self._part, among=span, router_inputs=self._router_inputs)

    def _problems_in(self, span: range, wanted: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """The problem id of each token in a span of problems `[T]`."""
        if self._router_inputs:
            # Problems without recorded router inputs are left out, so they must be loaded to be counted.
            try:
                return self._load(span, wanted).problem_ids_T
            except EmptyPartError:
                return np.empty(0, dtype=np.int32)
        ids = [chunk.problem_ids_T for chunk in self._trace.chunks(whole_problems=False, problems=span)]
        ids_T = np.concatenate(ids) if ids else np.empty(0, dtype=np.int32)
        return ids_T[np.isin(ids_T, wanted)]
