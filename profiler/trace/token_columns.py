"""Columns of `tokens.parquet` for the tokens of each chunk of routing, read in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from profiler.errors import TraceError
from profiler.trace.reader import Trace
from profiler.trace.schema import TOKENS_FILE, RoutingChunk
from profiler.trace.untrusted.parquet_files import stream_table

ROWS_AT_A_TIME = 1 << 16
_KEYS = (pa.field("problem_id", pa.int32()), pa.field("token_id", pa.int32()))


class TokenColumns:
    """Reads `tokens.parquet` along with the routing: both are sorted by problem and position, so memory stays bounded."""

    def __init__(
        self,
        trace: Trace,
        columns: list[pa.Field],
        values: Callable[[pa.Table], npt.NDArray[Any]],
        missing: npt.ArrayLike,
        *,
        first_problem: int = 0,
    ) -> None:
        """Begin to read the table.

        Args:
            trace: The trace; it may lack the table, in which case every token's value is `missing`.
            columns: The columns that are read besides `problem_id` and `token_id`.
            values: Computes the values `[N, ...]` of the N rows of a table with these columns.
            missing: The value `[...]` of a token that the table does not list, of the same type as the values.
            first_problem: Skip row groups that end before this problem.
        """
        self._path = trace.path / TOKENS_FILE
        schema = pa.schema([*_KEYS, *columns])
        self._tables = stream_table(self._path, schema, ROWS_AT_A_TIME, first_problem) if trace.has_tokens else iter(())
        self._values_of = values
        self._missing = np.asarray(missing)
        # Rows that have been read and may still be needed, by (problem, position) in one number.
        self._keys: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._values: npt.NDArray[Any] = np.empty((0, *self._missing.shape), self._missing.dtype)

    def of(self, chunk: RoutingChunk) -> npt.NDArray[Any]:
        """The values of the chunk's tokens, `[T, ...]`.

        Chunks must come in order. Raises `TraceError` if the table is broken or not sorted by (problem_id, token_id).
        """
        wanted_T = chunk.problem_ids_T.astype(np.int64) << 32 | chunk.token_ids_T
        self._read(wanted_T[0], wanted_T[-1])
        values_T = np.empty((len(chunk), *self._missing.shape), self._missing.dtype)
        values_T[:] = self._missing
        if len(self._keys):
            at_T = np.minimum(np.searchsorted(self._keys, wanted_T), len(self._keys) - 1)
            listed_T = self._keys[at_T] == wanted_T
            values_T[listed_T] = self._values[at_T[listed_T]]
        return values_T

    def _read(self, first: np.int64, last: np.int64) -> None:
        """Read on up to the key `last`, and drop the rows before `first`."""
        keep = int(np.searchsorted(self._keys, first))
        keys, values = [self._keys[keep:]], [self._values[keep:]]
        end = int(self._keys[-1]) if len(self._keys) else -1
        while end < last:
            table = next(self._tables, None)
            if table is None:
                break
            key = table.column("problem_id").to_numpy().astype(np.int64) << 32 | table.column("token_id").to_numpy()
            if key[0] <= end or (np.diff(key) <= 0).any():
                raise TraceError(f"{self._path} is not sorted by (problem_id, token_id)")
            end = int(key[-1])
            before = int(np.searchsorted(key, first))
            keys.append(key[before:])
            values.append(self._values_of(table)[before:])
        self._keys, self._values = np.concatenate(keys), np.concatenate(values)
