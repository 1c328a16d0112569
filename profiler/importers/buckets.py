"""Rows of an import, spread over files so that each can be sorted in memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import ipc

from profiler.importers.rows import EMPTY, ImportedRows

# Tokens of one problem may be spread over several buckets, rows of one token are not.
BUCKETS = 64
TOKENS_PER_BUCKET_TURN = 4096
BUCKETS_FOLDER = "rows"

_ROWS_SCHEMA = pa.schema(
    [
        ("problem_id", pa.int32()),
        ("token_id", pa.int32()),
        ("layer", pa.int32()),
        ("expert_ids", pa.list_(pa.int32())),
        ("weights", pa.list_(pa.float32())),
    ]
)


class RowBuckets:
    """Files of rows in a folder of the trace. Rows of one token are in one file; `remove` deletes them."""

    def __init__(self, directory: Path) -> None:
        self._folder = directory / BUCKETS_FOLDER
        self._files: dict[int, Any] = {}

    def add(self, rows: ImportedRows) -> None:
        """Append the rows to the buckets of their tokens. `expert_ids_NK` is int32."""
        present_NK = rows.expert_ids_NK != EMPTY
        offsets = np.concatenate([[0], np.cumsum(present_NK.sum(1))]).astype(np.int32)
        weights = np.ones(present_NK.sum()) if rows.weights_NK is None else rows.weights_NK[present_NK]
        batch = pa.RecordBatch.from_arrays(
            [
                pa.array(rows.problem_ids_N.astype(np.int32)),
                pa.array(rows.token_ids_N.astype(np.int32)),
                pa.array(rows.layers_N.astype(np.int32)),
                pa.ListArray.from_arrays(offsets, rows.expert_ids_NK[present_NK]),
                pa.ListArray.from_arrays(offsets, weights.astype(np.float32)),
            ],
            schema=_ROWS_SCHEMA,
        )
        turn_N = rows.problem_ids_N.astype(np.int64) * 31 + rows.token_ids_N // TOKENS_PER_BUCKET_TURN
        bucket_N = turn_N % BUCKETS
        for number in np.unique(bucket_N).tolist():
            if number not in self._files:
                self._folder.mkdir(exist_ok=True)
                self._files[number] = ipc.new_stream(pa.OSFile(str(self._path(number)), "wb"), _ROWS_SCHEMA)
            mine_N = bucket_N == number
            self._files[number].write_batch(batch if mine_N.all() else batch.take(pa.array(np.flatnonzero(mine_N))))

    def read(self) -> Iterator[pa.Table]:
        """Read the buckets one after the other, each with its rows in the order of `add`, which cannot be called any more."""
        for bucket in self._files.values():
            bucket.close()
        for number in sorted(self._files):
            with pa.OSFile(str(self._path(number))) as file:
                yield ipc.open_stream(file).read_all().combine_chunks()

    def remove(self) -> None:
        """Remove the files."""
        shutil.rmtree(self._folder)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:03d}.arrows"


def padded(table: pa.Table, top_k: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The lists as `[N, K]`, with `EMPTY` and NaN behind shorter ones."""
    ids, weights = (table.column(name).combine_chunks() for name in ("expert_ids", "weights"))
    if isinstance(ids, pa.ChunkedArray):
        ids, weights = pa.concat_arrays(ids.chunks), pa.concat_arrays(weights.chunks)
    counts_N = np.diff(ids.offsets.to_numpy())
    ids_NK = np.full((len(counts_N), top_k), EMPTY, dtype=np.int32)
    weights_NK = np.full((len(counts_N), top_k), np.nan, dtype=np.float32)
    there_NK = np.arange(top_k) < counts_N[:, None]
    ids_NK[there_NK] = ids.flatten().to_numpy()
    weights_NK[there_NK] = weights.flatten().to_numpy(zero_copy_only=False)
    return ids_NK, weights_NK
