"""Import Parquet with the columns of a trace but without its metadata: `problem_id, layer, token_id, expert_ids[, weights]`.

One file, or a folder with `routing.parquet` or `routing/*.parquet`. The folder may also contain `problems.parquet` (problem_id,
dataset, and whatever else is known) and `tokens.parquet` (problem_id, token_id, and vocab_id or the token's text).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from profiler.errors import UNREADABLE, TraceError, counted, first_line
from profiler.importers.reading import batches, column_names, files_in, has_columns, id_lists, integer_column, is_text, lists
from profiler.importers.rows import ImportedProblem, ImportedRows
from profiler.importers.target import Target
from profiler.trace.schema import DECODE, METADATA_FILE, PREFILL, PROBLEMS_SCHEMA

NAME = "parquet"
ABOUT = "Parquet with problem_id, layer, token_id, expert_ids[, weights]: a file, or a folder with routing.parquet"
KINDS = ("file", "folder")

_KEYS = ["problem_id", "layer", "token_id"]
BATCH_ROWS = 1 << 17
# Columns with a key or hash of the prompt, which identifies a problem where the prompt itself is unknown.
_PROMPT_KEYS = ("source_key", "prompt_sha256", "prompt_md5", "prompt_hash")


def detect(source: Path) -> bool:
    files = _files(source)
    if not files or (source.is_dir() and (source / METADATA_FILE).exists()):
        return False
    return has_columns(files[0], {*_KEYS, "expert_ids"})


def read(source: Path, target: Target) -> None:
    files = _files(source)
    if not files:
        raise TraceError(f"{source}: no routing.parquet and no routing/*.parquet")
    first_tokens: dict[int, int] = {}
    for path in files:
        row = 0
        has_weights = "weights" in column_names(path)
        for batch in batches(path, [*_KEYS, "expert_ids", *(["weights"] if has_weights else [])], BATCH_ROWS):
            where = f"{path}, rows {row}..{row + len(batch) - 1}"
            row += len(batch)
            problem_N, layer_N, token_N = (integer_column(batch.column(name), f"{where}: {name}") for name in _KEYS)
            ids_NK = id_lists(batch.column("expert_ids"), f"{where}: expert_ids")
            weights_NK = lists(batch.column("weights"), f"{where}: weights") if has_weights else None
            if weights_NK is not None and weights_NK.shape != ids_NK.shape:
                raise TraceError(f"{where}: {counted(weights_NK.shape[1], 'weight')} for {counted(ids_NK.shape[1], 'expert')}")
            target.add(ImportedRows(problem_N, token_N, layer_N, ids_NK, weights_NK), where)
            order_N = np.lexsort((token_N, problem_N))
            problems, at = np.unique(problem_N[order_N], return_index=True)
            for problem, first in zip(problems.tolist(), token_N[order_N][at].tolist(), strict=True):
                first_tokens[problem] = min(first_tokens.get(problem, first), first)
    if source.is_dir():
        _read_problems(source / "problems.parquet", first_tokens, target)
        _read_tokens(source / "tokens.parquet", first_tokens, target)


def _files(source: Path) -> list[Path]:
    if source.is_dir():
        single = source / "routing.parquet"
        return [single] if single.is_file() else files_in(source / "routing", "*.parquet")
    return [source] * source.is_file()


def _read_problems(path: Path, seen: dict[int, int], target: Target) -> None:
    """Read facts of problems that have routing. Columns that are neither text nor numbers are left out and named in a gap."""
    if not path.is_file():
        return
    for batch in batches(path, column_names(path), 1024):
        plain = {field.name: field.type for field in batch.schema if is_text(field.type) or _is_number(field.type)}
        if len(plain) < batch.num_columns:
            others = ", ".join(name for name in batch.schema.names if name not in plain)
            gap = f"columns of problems.parquet that are neither text nor numbers were left out: {others}"
            target.gaps += [] if gap in target.gaps else [gap]
        number_N = integer_column(_column(batch, "problem_id", path), f"{path}: problem_id")
        columns = {
            name: _cast(batch.column(name), _wanted(name, kind), f"{path}: {name}").to_pylist()
            for name, kind in plain.items()
            if name != "problem_id"
        }
        for row, number in enumerate(number_N.tolist()):
            if number in seen:
                facts: dict[str, Any] = {name: values[row] for name, values in columns.items()}
                key = next((str(facts[name]) for name in _PROMPT_KEYS if facts.get(name) is not None), str(number))
                target.problems[number] = ImportedProblem(facts.pop("dataset", None) or "unknown", key, facts)


def _read_tokens(path: Path, first_tokens: dict[int, int], target: Target) -> None:
    """Read vocabulary ids or text, and phases, of the tokens of problems that have routing."""
    if not path.is_file():
        return
    names = column_names(path)
    text = next((name for name in ("text", "token") if name in names), None)
    columns = ["problem_id", "token_id", *(name for name in ("vocab_id", text, "phase") if name is not None and name in names)]
    generated = "phase" not in names and min(first_tokens.values(), default=0) > 0
    if "phase" not in names:
        guess = (
            "every problem begins after position 0, so all count as generated" if generated else "all count as prompt tokens"
        )
        target.gaps.append(f"the phases of tokens are unknown: {guess}")
    for batch in batches(path, columns, BATCH_ROWS):
        problem_N = integer_column(_column(batch, "problem_id", path), f"{path}: problem_id")
        integer_column(_column(batch, "token_id", path), f"{path}: token_id")
        phases = pa.array([DECODE if generated else PREFILL] * len(batch))
        if "phase" in names:
            phases = _cast(batch.column("phase"), pa.string(), f"{path}: phase")
            if not pc.all(pc.is_in(phases, pa.array([PREFILL, DECODE]))).as_py():
                raise TraceError(f"{path}: a phase that is neither {PREFILL!r} nor {DECODE!r}")
        for problem in np.unique(problem_N).tolist():
            for phase in (PREFILL, DECODE):
                part = batch.filter(pc.and_(pa.array(problem_N == problem), pc.equal(phases, phase)))
                if len(part) and problem in first_tokens:
                    target.add_tokens(
                        problem,
                        part.column("token_id").to_numpy(),
                        phase,
                        vocab_ids_T=_cast(part.column("vocab_id"), pa.int32(), f"{path}: vocab_id")
                        if "vocab_id" in names
                        else None,
                        texts_T=_cast(part.column(text), pa.string(), path) if text else None,
                    )


def _column(batch: pa.RecordBatch, name: str, path: Path) -> pa.Array:
    if name not in batch.schema.names:
        raise TraceError(f"{path} lacks the column {name!r}")
    return batch.column(name)


def _wanted(name: str, kind: pa.DataType) -> pa.DataType:
    """The type that a column gets: the format's type for a column of the format, otherwise its own, with text as plain text."""
    if name in PROBLEMS_SCHEMA.names:
        return PROBLEMS_SCHEMA.field(name).type
    return pa.string() if is_text(kind) else kind


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _cast(column: pa.Array, kind: pa.DataType, what: object) -> pa.Array:
    try:
        return column.cast(kind)
    except UNREADABLE as error:
        raise TraceError(f"{what}: a column of {column.type}, expected {kind}: {first_line(error)}") from error
