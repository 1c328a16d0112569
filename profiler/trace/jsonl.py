"""Export routing as JSON lines, one per (problem, token, MoE layer):

{"problem_id": 0, "layer": 0, "token_id": 0, "expert_ids": [3, 7], "weights": [0.6, 0.4]}
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from profiler.trace.reader import Trace
from profiler.trace.schema import RoutingChunk

_LINE = '{{"problem_id": {}, "layer": {}, "token_id": {}, "expert_ids": [{}]{}}}\n'
_WEIGHTS = ', "weights": [{}]'


def write_jsonl(trace: Trace, path: Path) -> int:
    """Write the trace's routing to `path` and return the number of lines. Weights round-trip to the same float16.

    Empty slots are left out, so lists may differ in length. A trace without weights gives lines without `weights`.
    """
    model = trace.metadata.model
    empty = model.num_experts if trace.metadata.record.empty_slots else None
    chunks = trace.chunks(whole_problems=False)
    return _write(chunks, model.moe_layers, empty, path)


def _write(chunks: Iterator[RoutingChunk], moe_layers: list[int], empty: int | None, path: Path) -> int:
    temporary = path.with_name(path.name + ".tmp")
    lines = 0
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for chunk in chunks:
                lines += _write_chunk(chunk, moe_layers, empty, file)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    return lines


def _write_chunk(chunk: RoutingChunk, moe_layers: list[int], empty: int | None, file: TextIO) -> int:
    ids_TLK = chunk.expert_ids_TLK.tolist()
    weights_TLK = None if chunk.weights_TLK is None else _float16_texts()[chunk.weights_TLK.view(np.uint16)].tolist()
    keys = zip(chunk.problem_ids_T.tolist(), chunk.token_ids_T.tolist(), strict=True)
    for token, (problem_id, token_id) in enumerate(keys):
        for position, layer in enumerate(moe_layers):
            ids_K = [expert for expert in ids_TLK[token][position] if expert != empty]
            weights_K = "" if weights_TLK is None else _WEIGHTS.format(", ".join(weights_TLK[token][position][: len(ids_K)]))
            file.write(_LINE.format(problem_id, layer, token_id, ", ".join(map(str, ids_K)), weights_K))
    return len(chunk) * len(moe_layers)


@functools.cache
def _float16_texts() -> npt.NDArray[Any]:
    """The shortest decimal text of every float16, indexed by its bit pattern."""
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    return np.array([np.format_float_positional(value, trim="0") for value in values])
