"""Which tokens of a trace were generated, read from `tokens.parquet` in pieces."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from profiler.errors import TraceError
from profiler.trace.reader import Trace
from profiler.trace.schema import DECODE, TOKENS_FILE, RoutingChunk
from profiler.trace.untrusted.parquet_files import stream_table

ROWS_AT_A_TIME = 1 << 16
_COLUMNS = pa.schema([("problem_id", pa.int32()), ("token_id", pa.int32()), ("phase", pa.string())])


class GeneratedTokens:
    """Reads `tokens.parquet` along with the routing: both are sorted by problem and position."""

    def __init__(self, trace: Trace) -> None:
        self._path = trace.path / TOKENS_FILE
        self._tables = stream_table(self._path, _COLUMNS, ROWS_AT_A_TIME) if trace.has_tokens else iter(())
        self._keys: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._is_decode: npt.NDArray[np.bool_] = np.empty(0, np.bool_)

    def of(self, chunk: RoutingChunk) -> npt.NDArray[np.bool_]:
        """Whether each token of the chunk was generated, bool `[T]`; false if the trace does not say.

        Chunks must come in order. Raises `TraceError` if the table is not sorted.
        """
        wanted_T = chunk.problem_ids_T.astype(np.int64) << 32 | chunk.token_ids_T
        keep = int(np.searchsorted(self._keys, wanted_T[0]))
        keys, phases = [self._keys[keep:]], [self._is_decode[keep:]]
        last = int(self._keys[-1]) if len(self._keys) else -1
        while last < wanted_T[-1]:
            table = next(self._tables, None)
            if table is None:
                break
            key = table.column("problem_id").to_numpy().astype(np.int64) << 32 | table.column("token_id").to_numpy()
            if key[0] <= last or (np.diff(key) <= 0).any():
                raise TraceError(f"{self._path} is not sorted by (problem_id, token_id)")
            last = int(key[-1])
            behind = int(np.searchsorted(key, wanted_T[0]))
            keys.append(key[behind:])
            phases.append(table.column("phase").to_numpy(zero_copy_only=False)[behind:] == DECODE)
        self._keys, self._is_decode = np.concatenate(keys), np.concatenate(phases)
        is_decode_T = np.zeros(len(chunk), dtype=np.bool_)
        if len(self._keys):
            at_T = np.minimum(np.searchsorted(self._keys, wanted_T), len(self._keys) - 1)
            is_decode_T = (self._keys[at_T] == wanted_T) & self._is_decode[at_T]
        return is_decode_T
