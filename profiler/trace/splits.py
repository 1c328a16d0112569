"""Assign problems to the parts of a split by a hash of the prompt, so that copies of a prompt are always in the same part."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pyarrow as pa

from profiler.trace.reader import Trace
from profiler.trace.schema import PROBLEMS_FILE
from profiler.trace.untrusted.parquet_files import open_parquet, stream_table

# Columns in which a converted trace may have a hash of the prompt instead of the prompt.
PROMPT_HASHES = ("prompt_sha256", "prompt_md5")
ROWS_AT_A_TIME = 128


def split_key(trace: Trace) -> str:
    """What problems are split by: the prompt, the source's hash of it, or, without either, a name valid only in this trace.

    Returns "prompt", "prompt_sha256", "prompt_md5", "source key" or "problem id"; the last two mean nothing in another trace.
    """
    if not trace.has_problems:
        return "problem id"
    return next((name for name in ("prompt", *PROMPT_HASHES) if _is_complete(trace, name)), "source key")


def _is_complete(trace: Trace, name: str) -> bool:
    """Whether the column exists and has a value for every problem."""
    path = trace.path / PROBLEMS_FILE
    with open_parquet(path) as file:
        if name not in file.schema_arrow.names:
            return False
    return not any(table.column(0).null_count for table in stream_table(path, pa.schema([(name, pa.string())]), ROWS_AT_A_TIME))


def problem_digests(trace: Trace) -> dict[int, int]:
    """Problem id -> 64-bit digest of its split key, for a trace with a table of problems (split key not "problem id")."""
    return dict(iterate_digests(trace))


def iterate_digests(trace: Trace) -> Iterator[tuple[int, int]]:
    """Problem ids with the digests that `problem_digests` returns, in the order of the table."""
    by = split_key(trace)
    names = ["dataset", "source_key"] if by == "source key" else [by]
    schema = pa.schema([("problem_id", pa.int32()), *((name, pa.string()) for name in names)])
    for table in stream_table(trace.path / PROBLEMS_FILE, schema, ROWS_AT_A_TIME):
        for problem_id, *parts in zip(*(column.to_pylist() for column in table.columns), strict=True):
            yield problem_id, digest("/".join(str(part) for part in parts))


def digest_of_number(problem_id: int) -> int:
    """The digest of a problem that has no name but its id (split key "problem id")."""
    return digest(f"problem {problem_id}")


def digest(key: str) -> int:
    """The first 64 bits of the SHA-256 of a text."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
