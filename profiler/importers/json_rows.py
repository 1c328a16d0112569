"""JSON lines, one per (problem, token, MoE layer): the project's own, and the older spelling of loggers like it.

{"problem_id": 0, "layer": 0, "token_id": 0, "expert_ids": [3, 7], "weights": [0.6, 0.4]}
{"dataset": "gsm8k", "problem_id": 0, "layer": 0, "token_idx": 0, "experts": [7, 0], "gating_probs": [0.8, 0.2]}

In the older one, `token_idx` (or `token_pos`) counts generated tokens, problems are numbered within their dataset, and rows may
be missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from profiler.errors import TraceError
from profiler.importers.lines import first_object, json_batches
from profiler.importers.target import EMPTY, Rows, Target
from profiler.schema import MAX_TOP_K

NAME = "jsonl"
ABOUT = "JSON lines with problem_id, layer, token_id (token_idx, token_pos), expert_ids (experts), weights (gating_probs)"

_SPELLINGS = {
    "token_id": ("token_id", "token_idx", "token_pos"),
    "expert_ids": ("expert_ids", "experts"),
    "weights": ("weights", "gating_probs"),
}


def detect(source: Path) -> bool:
    found = first_object(source)
    return "layer" in found and any(name in found for name in _SPELLINGS["expert_ids"])


def read(source: Path, target: Target) -> None:
    first = first_object(source)
    spelled = {name: next((s for s in options if s in first), options[0]) for name, options in _SPELLINGS.items()}
    problems_are_text = isinstance(first.get("problem_id"), str)
    schema = pa.schema(
        [
            ("dataset", pa.string()),
            ("problem_id", pa.string() if problems_are_text else pa.int64()),
            ("layer", pa.int32()),
            (spelled["token_id"], pa.int64()),
            (spelled["expert_ids"], pa.list_(pa.int32())),
            (spelled["weights"], pa.list_(pa.float32())),
        ]
    )
    named = problems_are_text or "dataset" in first
    if spelled["token_id"] != "token_id":
        target.gaps.append(f"positions are the source's {spelled['token_id']}: whether prompts are included is not known")
    for where, batch in json_batches(source, schema):
        columns = {
            name: batch.column(spelled.get(name, name)) for name in ("problem_id", "layer", "token_id", "expert_ids", "weights")
        }
        for name, column in columns.items():
            if name != "weights" and column.null_count:
                row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
                raise TraceError(f"{where}: its row {row + 1} lacks {spelled.get(name, name)!r}")
        ids_NK = padded(columns["expert_ids"], EMPTY, where)
        weights_NK: npt.NDArray[Any] | None = None
        if columns["weights"].null_count < len(batch):
            weights_NK = padded(columns["weights"], np.nan, where)
            differs = pc.not_equal(pc.list_value_length(columns["weights"]), pc.list_value_length(columns["expert_ids"]))
            if columns["weights"].null_count or pc.any(differs).as_py():
                raise TraceError(f"{where}: a row with another number of weights than of experts")
        problem_N = columns["problem_id"].to_numpy(zero_copy_only=False)
        if named:
            dataset_N = batch.column("dataset").fill_null("unknown").to_pylist()
            problem_N = np.array([target.problem(d, str(p)) for d, p in zip(dataset_N, problem_N, strict=True)])
        layer_N, token_N = columns["layer"].to_numpy(), columns["token_id"].to_numpy()
        target.add(Rows(problem_N, token_N, layer_N, ids_NK, weights_NK), where)


def padded(column: pa.ListArray, fill: float, where: str) -> npt.NDArray[Any]:
    """Lists of differing length as `[N, K]`. Raises `TraceError` on nulls inside, and on more entries than a token can have."""
    lengths_N = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    width = int(lengths_N.max(initial=0))
    if width > MAX_TOP_K:
        raise TraceError(f"{where}: {width} experts in a row, expected at most {MAX_TOP_K}")
    values = column.flatten()
    if values.null_count:
        raise TraceError(f"{where}: null in a list")
    flat = values.to_numpy(zero_copy_only=False)
    padded_NK = np.full((len(column), width), fill, dtype=flat.dtype)
    padded_NK[np.arange(width) < lengths_N[:, None]] = flat
    return padded_NK
