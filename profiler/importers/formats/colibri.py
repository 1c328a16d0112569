"""Import colibri's `ROUTE_TRACE`: text, one line per MoE call and row of the batch, `<call> <row> <layer> <id>:<gate> ...`.

0 0 3 17:0.4121 4:0.2710
0 1 3 8:0.5012 17:0.1000

`call` counts the calls of MoE layers: one for each layer of a forward pass, whose `row`s are the tokens of the pass. Gates are
those that the layer applies, printed with four decimals (github.com/JustVugg/colibri, c/route_trace.h, commit 003a0b9).

There are no positions and no request ids: rows are numbered as they were computed, as one sequence. That is right for one
conversation without drafts. Several conversations at once (KV_SLOTS), or tokens that were drafted and rejected (MTP), cannot be
distinguished. The draft layer (MTP) is recorded as a layer of its own, which the tokens of the prompt may lack.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from profiler.errors import TraceError
from profiler.importers.reading import files_of, head, sources_of, text_lines
from profiler.importers.rows import EMPTY, ImportedRows
from profiler.importers.target import Target
from profiler.trace.schema import MAX_TOP_K

NAME = "colibri"
ABOUT = "colibri ROUTE_TRACE text: call row layer id:gate ..., one line per MoE call and row"
KINDS = ("file", "folder")
PATTERNS = ("*.txt", "*.trace", "*.log")

_LINE = re.compile(rb"\d{1,9} \d{1,9} \d{1,5}( -?\d{1,9}:-?(\d{1,9}\.\d{4}|nan|inf))*\s*")


def detect(source: Path) -> bool:
    files = files_of(source, *PATTERNS)
    first = head(files[0]).lstrip().partition("\n")[0].encode() if files else b""
    return b":" in first and _LINE.fullmatch(first) is not None


def read(source: Path, target: Target) -> None:
    target.gaps.append(
        "rows are numbered as they were computed, as one sequence: the source has no positions, requests or rejected drafts"
    )
    target.gaps.append("weights were printed with four decimals")
    target.rounded_weights = True
    target.contradiction = "a call has a row twice"
    for path in sources_of(source, *PATTERNS):
        problem_id = target.problem("colibri", path.stem)
        passes = _Passes()
        for where, call_N, row_N, layer_N, ids_NK, weights_NK in _blocks(path):
            token_N = passes.positions(call_N, row_N, layer_N)
            target.add(ImportedRows(np.full(len(call_N), problem_id), token_N, layer_N, ids_NK, weights_NK), where)


class _Passes:
    """The position at which each forward pass begins. A pass ends where the layer does not ascend from one call to the next."""

    def __init__(self) -> None:
        self._call = self._layer = -1
        self._start = self._rows = 0

    def positions(
        self, call_N: npt.NDArray[np.int64], row_N: npt.NDArray[np.int64], layer_N: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """The positions `[N]` of consecutive lines."""
        starts = np.flatnonzero(np.diff(call_N, prepend=self._call) != 0)
        bounds = np.unique(np.concatenate([[0], starts, [len(call_N)]]))
        token_N = np.empty(len(call_N), dtype=np.int64)
        for first, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            if call_N[first] != self._call:
                if layer_N[first] <= self._layer:
                    self._start, self._rows = self._start + self._rows, 0
                self._call, self._layer = int(call_N[first]), int(layer_N[first])
            token_N[first:end] = self._start + row_N[first:end]
            self._rows = max(self._rows, int(row_N[first:end].max()) + 1)
        return token_N


_Columns = tuple[
    str, npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]
]


def _blocks(path: Path) -> Iterator[_Columns]:
    """Lines as text for messages, call, row and layer `[N]`, ids and gates `[N, K]`. Raises `TraceError`, naming the line."""
    for lines in text_lines(path):
        for number, line in lines:
            if not _LINE.fullmatch(line) or line.count(b":") > MAX_TOP_K:
                raise TraceError(f"{path}, line {number}: expected 'call row layer id:gate ...', at most {MAX_TOP_K} experts")
        texts = [line for _, line in lines]
        counts_N = np.array([line.count(b":") for line in texts])
        values = np.array(b" ".join(texts).replace(b":", b" ").split()).astype(np.float64)
        starts_N = np.cumsum(3 + 2 * counts_N) - 3 - 2 * counts_N
        call_N, row_N, layer_N = (values[starts_N + n].astype(np.int64) for n in range(3))
        present_NK = np.arange(counts_N.max()) < counts_N[:, None]
        at = (starts_N[:, None] + 3 + 2 * np.arange(counts_N.max()))[present_NK]
        ids_NK = np.full(present_NK.shape, EMPTY, dtype=np.int64)
        weights_NK = np.full(present_NK.shape, np.nan)
        ids_NK[present_NK], weights_NK[present_NK] = values[at].astype(np.int64), values[at + 1]
        yield f"{path}, lines {lines[0][0]}..{lines[-1][0]}", call_N, row_N, layer_N, ids_NK, weights_NK
