"""Import Megatron-LM's `RouterTracer`: JSON lines, one per forward pass and MoE layer, in `router_trace_rank<r>.jsonl`.

{"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": 3, "rank": 0, "num_tokens": 2, "topk": 2,
 "top_indices": [[12, 45], [3, 7]]}

Enabled with `--moe-routing-trace-path` (github.com/NVIDIA/Megatron-LM, megatron/core/transformer/moe/router_trace.py, pull
request 5220, commit 059f0f5). There are no weights, and where the router returns a mask, experts are in the order of their ids.
`layer` is the index within the rank's part of the model: with pipeline parallelism, ranks number different layers alike.

There are no requests and no positions: each forward pass is a problem, and a token's position is its row in the batch. With
recomputation of activations, a training step has every pass twice, which the files do not show. Layers of multi-token
prediction (`block` "mtp") are left out.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from profiler.errors import TraceError, counted
from profiler.importers.reading import files_of, head, json_lines, pad_lists, sources_of
from profiler.importers.rows import MAX_LAYER
from profiler.importers.target import Target

NAME = "megatron"
ABOUT = "Megatron-LM RouterTracer JSON lines, a file or a folder of ranks: step, block, layer, top_indices; no weights"
KINDS = ("file", "folder")
PATTERN = "router_trace_rank*.jsonl"


def detect(source: Path) -> bool:
    files = files_of(source, PATTERN)
    # A line with the tokens of a batch may be longer than what is looked at.
    text = head(files[0]) if files else ""
    return text.lstrip().startswith("{") and all(name in text for name in ('"step"', '"layer"', '"top_indices"'))


def read(source: Path, target: Target) -> None:
    files = sources_of(source, PATTERN)
    target.gaps += [
        "each forward pass is a problem and a position is a row of the batch: the source has no requests",
        "if activations were recomputed, every pass of a training step is there twice, which the source does not show",
        "if the router returned a mask, experts are in the order of their ids, not of their scores",
    ]
    digests = [_digest(path) for path in files]
    copies = len(files) - len(set(digests))
    if copies:
        target.gaps.append(f"{copies} of {len(files)} files are copies of other ranks' files and were left out")
    if len(files) - copies > 1:
        target.gaps.append("with pipeline parallelism, ranks number different layers alike, which the source does not show")
    left_out = sum(_read_rank(path, target) for n, path in enumerate(files) if digests[n] not in digests[:n])
    if left_out:
        target.gaps.append(f"{counted(left_out, 'record')} of multi-token prediction left out")


def _digest(path: Path) -> bytes:
    """A hash of what is identical in copies of a file by other ranks."""
    digest = hashlib.sha256()
    for lines in json_lines(path):
        for found in lines.objects:
            digest.update(repr([found.get(name) for name in ("step", "block", "layer", "top_indices")]).encode())
    return digest.digest()


def _read_rank(path: Path, target: Target) -> int:
    """Read the file of a rank; returns the number of records that were left out."""
    passes: dict[tuple[int, int], int] = defaultdict(int)
    left_out = 0
    for lines in json_lines(path):
        steps, layers = lines.integers("step").tolist(), lines.integers("layer").tolist()
        for number, found, step, layer in zip(lines.numbers, lines.objects, steps, layers, strict=True):
            where = f"{path}, line {number}"
            if found.get("block", "decoder") != "decoder":
                left_out += 1
                continue
            if not 0 <= layer <= MAX_LAYER:
                raise TraceError(f"{where}: layer {layer}, expected 0..{MAX_LAYER}")
            ids_TK = _indices(found, where)
            # A layer that comes again within a step is the next micro-batch.
            times = passes[step, layer]
            passes[step, layer] += 1
            problem_id = target.problem("megatron", path.stem, str(step), *([str(times)] if times else []))
            if len(ids_TK):
                target.add_arrays(problem_id, np.arange(len(ids_TK)), [layer], ids_TK[:, None], None, where)
    return left_out


def _indices(found: dict[str, Any], where: str) -> np.ndarray:
    """The experts of each token `[T, K]`. Raises `TraceError`, naming `where`, unless all tokens have equally many."""
    rows = found.get("top_indices")
    if not isinstance(rows, list) or not {*map(type, rows)} <= {list}:
        raise TraceError(f"{where}: expected lists of expert ids 'top_indices'")
    # Lists of different length are not padded: one long list among many short ones would exhaust the memory.
    ids_TK = pad_lists(rows) if len({*map(len, rows)}) <= 1 else None
    if ids_TK is None:
        raise TraceError(f"{where}: 'top_indices' are not expert ids, or not equally many for each token")
    if type(found.get("num_tokens", len(ids_TK))) is not int or found.get("num_tokens", len(ids_TK)) != len(ids_TK):
        given = found["num_tokens"]
        raise TraceError(f"{where}: 'top_indices' of {counted(len(ids_TK), 'token')}, but num_tokens is {given!r}")
    return ids_TK
