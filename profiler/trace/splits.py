"""Assign problems to the parts of a split by a hash of the prompt, so that copies of a prompt are always in the same part."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa

from profiler.trace.reader import Trace
from profiler.trace.schema import PROBLEMS_FILE
from profiler.trace.untrusted.parquet_files import open_parquet, stream_table

# Hash of a problem's tokens, in a converted trace that has them.
CONTENT_HASH = "content_sha256"
# Columns in which a converted trace may have a hash of the prompt instead of the prompt.
PROMPT_HASHES = ("prompt_sha256", "prompt_md5", CONTENT_HASH)
ROWS_AT_A_TIME = 128
# Upper bounds in percent of the hash space. A problem's part depends on its prompt alone, so it never changes as a trace grows.
_UP_TO = {"train": 70, "validation": 80, "test": 100}
PARTS = tuple(_UP_TO)


_KEYS: WeakKeyDictionary[Trace, str] = WeakKeyDictionary()


def part_of(prompt: str) -> str:
    """The part that a prompt belongs to: train, validation or test (70 : 10 : 20).

    It depends on the SHA-256 of the prompt alone, so that equal prompts are always in the same part.
    """
    return part_of_digest(digest(prompt))


def part_of_digest(number: int) -> str:
    """The part of a problem with this digest."""
    return next(part for part, limit in _UP_TO.items() if number % 100 < limit)


def split_key(trace: Trace) -> str:
    """What problems are split by: the prompt, a hash of it or of its tokens, or, without any, a name valid only in this trace.

    Returns "prompt", one of `PROMPT_HASHES`, "source key" or "problem id"; the last two mean nothing in another trace.
    The answer is kept for as long as the trace is open.
    """
    if trace not in _KEYS:
        _KEYS[trace] = _find_key(trace)
    return _KEYS[trace]


def _find_key(trace: Trace) -> str:
    """Find the first of the columns that exists and has a value for every problem, in one pass over the table."""
    if not trace.has_problems:
        return "problem id"
    path = trace.path / PROBLEMS_FILE
    with open_parquet(path) as file:
        complete = [name for name in ("prompt", *PROMPT_HASHES) if name in file.schema_arrow.names]
    for table in stream_table(path, pa.schema([(name, pa.string()) for name in complete]), ROWS_AT_A_TIME) if complete else ():
        complete = [name for name in complete if not table.column(name).null_count]
    return complete[0] if complete else "source key"


def problem_digests(trace: Trace) -> dict[int, int]:
    """Problem id -> 64-bit digest of its split key, for a trace with a table of problems (split key not "problem id")."""
    return dict(iterate_digests(trace))


def all_digests(trace: Trace) -> dict[int, int]:
    """Problem id -> digest, for any trace: without a table of problems, of those that have routing."""
    if trace.has_problems:
        return problem_digests(trace)
    return {int(i): digest_of_number(int(i)) for chunk in trace.chunks() for i in np.unique(chunk.problem_ids_T)}


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
