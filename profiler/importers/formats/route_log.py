"""Import logs with a meta header: JSON lines of a patched vLLM, a header and then one line per (row, layer).

{"type": "meta", "model_id": "Qwen/Qwen1.5-MoE-A2.7B-Chat", "top_k": 2, "layers_logged": [0], ...}
{"type": "route", "req_id": "r1", "token_idx": 17, "layer": 0, "topk_ids": [3, 12], "topk_weights": [0.72, 0.28]}

In public logs, `req_id` is a constant or numbers the forward pass, and `token_idx` is the row in the batch, which restarts at
every step. In such a log, the n-th row of a request and layer is taken as its n-th token, up to the first row where layers
disagree on `token_idx`. Requests that ran together then cannot be distinguished, and a gap of the trace says so.

A folder is one log if each of its files has layers of its own (a log for each layer). Otherwise every file is a log of its own,
whose requests are not those of the other files (a log for each request or process).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from profiler.errors import TraceError, counted
from profiler.importers.reading import JsonObjects, files_of, first_object, json_lines, sources_of
from profiler.importers.rows import MAX_LAYER, ImportedRows, running_count
from profiler.importers.target import Target

NAME = "route-log"
ABOUT = 'JSON lines that begin with {"type": "meta"}, then {"type": "route", "req_id", "token_idx", "layer", "topk_ids", ...}'
KINDS = ("file", "folder")
PATTERNS = ("*.jsonl", "*.json", "*.log")


def detect(source: Path) -> bool:
    files = files_of(source, *PATTERNS)
    return bool(files) and first_object(files[0]).get("type") in {"meta", "route"}


def read(source: Path, target: Target) -> None:
    files = sources_of(source, *PATTERNS)
    layers = [_layers(path) for path in files] if len(files) > 1 else []
    if sum(map(len, layers)) == len(set().union(*layers)):
        _read_log(files, (), target)
    else:
        for path in files:
            _read_log([path], (path.stem,), target)


def _layers(path: Path) -> set[int]:
    return {layer for routes in _routes([path]) for layer in np.unique(routes.integers("layer")).tolist()}


def _read_log(files: list[Path], name: tuple[str, ...], target: Target) -> None:
    """Read a log in one or several files; `name` precedes its requests in the names of problems."""
    for path in files:
        meta = first_object(path)
        if meta.get("type") == "meta":
            experts = meta.get("num_experts")
            model_id = str(meta["model_id"]) if "model_id" in meta else None
            target.of_model(path, model_id=model_id, num_experts=experts if type(experts) is int else None)
            if isinstance(meta.get("vllm_version"), str):
                target.versions["vllm"] = meta["vllm_version"]
    agreed = _agreed_rows(files)
    counts: dict[int, int] = {}
    drifted = 0
    for routes in _routes(files):
        requests = routes.texts("req_id")
        problem_N = np.array([target.problem("logged", *name, request) for request in requests], dtype=np.int64)
        layer_N, token_N = routes.integers("layer"), routes.integers("token_idx")
        ids_NK = routes.expert_ids("topk_ids")
        weights_NK = routes.weights("topk_weights", ids_NK) if routes.have("topk_weights") else None
        rows = ImportedRows(problem_N, token_N, layer_N, ids_NK, weights_NK)
        if agreed is not None:
            rows.token_ids_N = running_count(problem_N << 16 | layer_N, counts)
            keep_N = rows.token_ids_N < np.array([agreed[request] for request in requests])
            drifted += int((~keep_N).sum())
            rows = rows.where(keep_N)
        target.add(rows, routes.where)
    if agreed is not None:
        gap = "token_idx restarts in the log: tokens are numbered as logged, regardless of their requests"
        target.gaps += [gap] * (gap not in target.gaps)
    if drifted:
        where = f"{'/'.join(name)}: " if name else ""
        target.gaps.append(f"{where}{counted(drifted, 'row')} dropped: behind a row where the layers disagree on token_idx")


def _routes(files: list[Path]) -> Iterator[JsonObjects]:
    """The route lines, block by block. Raises `TraceError` if one has no valid layer."""
    for found in (found for path in files for found in json_lines(path)):
        routes = found.having("type", "route")
        if routes.objects:
            layer_N = routes.integers("layer")
            if layer_N.min() < 0 or layer_N.max() > MAX_LAYER:
                raise TraceError(f"{routes.where}: layer {layer_N.min()}..{layer_N.max()}, expected 0..{MAX_LAYER}")
            yield routes


def _agreed_rows(files: list[Path]) -> dict[str, int] | None:
    """Request -> the number of rows for which all of its layers agree on `token_idx`.

    None if `token_idx` never restarts, and so is a position.
    """
    pieces: dict[str, dict[int, list[npt.NDArray[np.int64]]]] = {}
    for routes in _routes(files):
        names, request_N = np.unique(np.array(routes.texts("req_id"), dtype=object), return_inverse=True)
        keys_N = request_N.astype(np.int64) << 16 | routes.integers("layer")
        order_N = np.argsort(keys_N, kind="stable")
        keys, starts = np.unique(keys_N[order_N], return_index=True)
        for key, tokens in zip(keys.tolist(), np.split(routes.integers("token_idx")[order_N], starts[1:]), strict=True):
            pieces.setdefault(str(names[key >> 16]), {}).setdefault(key & 0xFFFF, []).append(tokens)
    logged = {request: [np.concatenate(arrays) for arrays in layers.values()] for request, layers in pieces.items()}
    if all((np.diff(tokens) > 0).all() for layers in logged.values() for tokens in layers):
        return None
    agreed: dict[str, int] = {}
    for request, layers in logged.items():
        common = min(map(len, layers))
        differ = np.flatnonzero((np.stack([tokens[:common] for tokens in layers]) != layers[0][:common]).any(0))
        # If nothing differs, keep the surplus rows of longer layers: they are then counted as incomplete tokens.
        agreed[request] = int(differ[0]) if len(differ) else max(map(len, layers))
    return agreed
