"""Parquet with the trace's own columns but without its metadata: `problem_id, layer, token_id, expert_ids[, weights]`.

One file, or a folder with `routing.parquet` or `routing/*.parquet`; beside it, if there are, `problems.parquet` (problem_id,
dataset, and whatever else is known) and `tokens.parquet` (problem_id, token_id, and vocab_id or the token's text).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from profiler.errors import UNREADABLE, TraceError
from profiler.importers.flame_moe import batches, lists
from profiler.importers.target import ProblemFacts, Rows, Target
from profiler.schema import DECODE, METADATA_FILE, PREFILL

NAME = "parquet"
ABOUT = "Parquet with problem_id, layer, token_id, expert_ids[, weights]: a file, or a folder with routing.parquet"

_KEYS = ["problem_id", "layer", "token_id", "expert_ids"]
BATCH_ROWS = 1 << 17
# Names of a hash or key of the prompt, which decides the side of a split where the prompt itself is not known.
_PROMPT_KEYS = ("source_key", "prompt_sha256", "prompt_md5", "prompt_hash", "prompt")


def detect(source: Path) -> bool:
    files = _files(source)
    if not files or (source.is_dir() and (source / METADATA_FILE).exists()):
        return False
    try:
        return set(_KEYS) <= set(pq.read_schema(files[0]).names)
    except UNREADABLE:
        return False


def read(source: Path, target: Target) -> None:
    files = _files(source)
    if not files:
        raise TraceError(f"{source}: no routing.parquet and no routing/*.parquet")
    seen: set[int] = set()
    for path in files:
        row = 0
        has_weights = "weights" in _names(path)
        for batch in batches(path, [*_KEYS, *(["weights"] if has_weights else [])], BATCH_ROWS):
            where = f"{path}, rows {row}..{row + len(batch) - 1}"
            row += len(batch)
            keys = [batch.column(name) for name in _KEYS[:3]]
            if any(not pa.types.is_integer(column.type) or column.null_count for column in keys):
                raise TraceError(f"{where}: problem_id, layer and token_id must be whole numbers, and not null")
            problem_N, layer_N, token_N = (column.to_numpy() for column in keys)
            ids_NK = lists(batch.column("expert_ids"), f"{where}: expert_ids")
            weights_NK = lists(batch.column("weights"), f"{where}: weights") if has_weights else None
            if (weights_NK is not None and weights_NK.shape != ids_NK.shape) or ids_NK.dtype.kind not in "iu":
                raise TraceError(f"{where}: expert_ids of {ids_NK.shape[1]} whole numbers and as many weights are expected")
            target.add(Rows(problem_N, token_N, layer_N, ids_NK.astype(np.int64), weights_NK), where)
            seen |= set(np.unique(problem_N).tolist())
    if source.is_dir():
        _read_problems(source / "problems.parquet", seen, target)
        _read_tokens(source / "tokens.parquet", target)


def _files(source: Path) -> list[Path]:
    if source.is_dir():
        single = source / "routing.parquet"
        return [single] if single.is_file() else sorted((source / "routing").glob("*.parquet"))
    return [source] if source.suffix == ".parquet" and source.is_file() else []


def _names(path: Path) -> list[str]:
    try:
        return list(pq.read_schema(path).names)
    except UNREADABLE as error:
        raise TraceError(f"{path} is not a readable Parquet file: {error}") from error


def _read_problems(path: Path, seen: set[int], target: Target) -> None:
    if not path.is_file():
        return
    names = [name for name in _names(path) if name != "problem_id"]
    for batch in batches(path, ["problem_id", *names], 1024):
        plain = [f.name for f in batch.schema if pa.types.is_string(f.type) or pa.types.is_primitive(f.type)]
        for row in batch.select(plain).to_pylist():
            number = row.pop("problem_id", None)
            if not isinstance(number, int):
                raise TraceError(f"{path}: a problem_id that is no whole number")
            if number in seen:
                key = next((str(row[name]) for name in _PROMPT_KEYS if row.get(name) is not None), str(number))
                target.problems[number] = ProblemFacts(str(row.pop("dataset", None) or "unknown"), key, row)


def _read_tokens(path: Path, target: Target) -> None:
    if not path.is_file():
        return
    names = _names(path)
    text = next((name for name in ("text", "token") if name in names), None)
    phase = "phase" if "phase" in names else None
    columns = ["problem_id", "token_id", *(["vocab_id"] if "vocab_id" in names else []), *filter(None, [text, phase])]
    for batch in batches(path, columns, BATCH_ROWS):
        problem_N = batch.column("problem_id").to_numpy(zero_copy_only=False)
        phases = (
            batch.column("phase").cast(pa.string()).to_numpy(zero_copy_only=False) if phase else np.full(len(batch), DECODE)
        )
        for problem in np.unique(problem_N).tolist():
            for name in (PREFILL, DECODE):
                mine = pa.array((problem_N == problem) & (phases == name))
                part = batch.filter(mine)
                if len(part):
                    target.add_tokens(
                        problem,
                        part.column("token_id").to_numpy(),
                        name,
                        vocab_ids_T=part.column("vocab_id").to_numpy(zero_copy_only=False) if "vocab_id" in names else None,
                        texts_T=part.column(text).cast(pa.string()).to_pylist() if text else None,
                    )
