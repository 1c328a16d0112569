"""Meta-header loggers: JSON lines of a patched vLLM, a header and then one line per (row, layer).

{"type": "meta", "model_id": "Qwen/Qwen1.5-MoE-A2.7B-Chat", "top_k": 2, "layers_logged": [0], ...}
{"type": "route", "req_id": "r1", "token_idx": 17, "layer": 0, "topk_ids": [3, 12], "topk_weights": [0.72, 0.28]}

In the logs that are public, `req_id` is a constant or numbers the forward pass, and `token_idx` is the row in the batch: it
restarts with every step. Where it does, the n-th row of a request and layer is taken for its n-th token, for as long as all
layers agree on `token_idx`; requests that ran together cannot be told apart then, and the trace says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from profiler.errors import TraceError
from profiler.importers.json_rows import padded
from profiler.importers.lines import first_object, json_batches, objects
from profiler.importers.target import EMPTY, MAX_LAYER, Rows, Target

NAME = "route-log"
ABOUT = 'JSON lines that begin with {"type": "meta"}, then {"type": "route", "req_id", "token_idx", "layer", "topk_ids", ...}'

_SCHEMA = pa.schema(
    [
        ("type", pa.string()),
        ("req_id", pa.string()),
        ("token_idx", pa.int64()),
        ("layer", pa.int32()),
        ("topk_ids", pa.list_(pa.int32())),
        ("topk_weights", pa.list_(pa.float32())),
    ]
)


def detect(source: Path) -> bool:
    return first_object(source).get("type") in {"meta", "route"}


def read(source: Path, target: Target) -> None:
    meta = next((found for _, found in objects(source)), {})
    if meta.get("type") == "meta":
        target.model_id = str(meta.get("model_id", "unknown"))
        if isinstance(meta.get("num_experts"), int):
            target.num_experts = meta["num_experts"]
        if meta.get("vllm_version"):
            target.versions["vllm"] = str(meta["vllm_version"])
    agreed = _agreed_rows(source)
    counts: dict[int, int] = {}
    drifted = 0
    for where, routes in _routes(source):
        problem_N = np.array([target.problem("logged", request) for request in routes.column("req_id").to_pylist()])
        layer_N, token_N = routes.column("layer").to_numpy(), routes.column("token_idx").to_numpy()
        if agreed is not None:
            token_N = _running_count(problem_N << 16 | layer_N, counts)
            limit_N = np.array([agreed[request] for request in routes.column("req_id").to_pylist()])
            drifted += int((token_N >= limit_N).sum())
            keep_N = token_N < limit_N
            routes = routes.filter(pa.array(keep_N))
            problem_N, layer_N, token_N = problem_N[keep_N], layer_N[keep_N], token_N[keep_N]
        ids_NK = padded(routes.column("topk_ids"), EMPTY, where)
        weights = routes.column("topk_weights")
        weights_NK = None if weights.null_count == len(weights) else padded(weights, np.nan, where)
        if weights_NK is not None and weights_NK.shape != ids_NK.shape:
            raise TraceError(f"{where}: a row with another number of weights than of experts")
        target.add(Rows(problem_N, token_N, layer_N, ids_NK, weights_NK), where)
    if agreed is not None:
        target.gaps.append("token_idx restarts in the log: tokens are numbered as they were logged, whatever their requests")
    if drifted:
        target.gaps.append(f"{drifted:,} rows come after a place where the layers disagree on token_idx, and were dropped")


def _routes(source: Path) -> Iterator[tuple[str, pa.RecordBatch]]:
    """The route lines, block by block. Raises `TraceError` on one that lacks a field."""
    for where, batch in json_batches(source, _SCHEMA):
        routes = batch.filter(pc.fill_null(pc.equal(batch.column("type"), "route"), False))
        for name in ("req_id", "token_idx", "layer", "topk_ids"):
            if routes.column(name).null_count:
                raise TraceError(f"{where}: a route without {name!r}")
        if routes.num_rows:
            layer_N = routes.column("layer").to_numpy()
            if layer_N.min() < 0 or layer_N.max() > MAX_LAYER:
                raise TraceError(f"{where}: layer {layer_N.min()}..{layer_N.max()}, expected 0..{MAX_LAYER}")
            yield where, routes


def _agreed_rows(source: Path) -> dict[str, int] | None:
    """Request -> up to which row all of its layers agree on `token_idx`; None if it never restarts, and so is a position."""
    pieces: dict[tuple[str, int], list[npt.NDArray[np.int64]]] = {}
    for _, routes in _routes(source):
        request_N = routes.column("req_id").to_numpy(zero_copy_only=False)
        layer_N, token_N = routes.column("layer").to_numpy(), routes.column("token_idx").to_numpy()
        names, request_N = np.unique(request_N.astype(str), return_inverse=True)
        keys_N = request_N.astype(np.int64) << 16 | layer_N
        order_N = np.argsort(keys_N, kind="stable")
        keys, starts = np.unique(keys_N[order_N], return_index=True)
        for key, tokens in zip(keys.tolist(), np.split(token_N[order_N], starts[1:]), strict=True):
            pieces.setdefault((str(names[key >> 16]), key & 0xFFFF), []).append(tokens)
    logged = {key: np.concatenate(arrays) for key, arrays in pieces.items()}
    if all((np.diff(tokens) > 0).all() for tokens in logged.values()):
        return None
    agreed: dict[str, int] = {}
    for request in {request for request, _ in logged}:
        layers = [tokens for (other, _), tokens in logged.items() if other == request]
        common = min(map(len, layers))
        differ = np.flatnonzero((np.stack([tokens[:common] for tokens in layers]) != layers[0][:common]).any(0))
        # Where nothing differs, the rest of longer layers is incomplete, and counted as that.
        agreed[request] = int(differ[0]) if len(differ) else max(map(len, layers))
    return agreed


def _running_count(keys_N: npt.NDArray[np.int64], counts: dict[int, int]) -> npt.NDArray[np.int64]:
    """How often each key came before, here and in earlier blocks; updates `counts`."""
    order_N = np.argsort(keys_N, kind="stable")
    keys, starts, sizes = np.unique(keys_N[order_N], return_index=True, return_counts=True)
    before = np.array([counts.get(key, 0) for key in keys.tolist()], dtype=np.int64)
    running_N = np.empty(len(keys_N), dtype=np.int64)
    running_N[order_N] = np.arange(len(keys_N)) - np.repeat(starts - before, sizes)
    counts.update(zip(keys.tolist(), (before + sizes).tolist(), strict=True))
    return running_N
