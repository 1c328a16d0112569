"""Hash the tokens of a source's problems, so that problems with the same prompt are recognized without its text."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from profiler.trace.schema import PREFILL


def content_hashes(tokens: pa.Table) -> dict[int, str]:
    """Problem id -> SHA-256 of its prompt's tokens: where they begin, and their vocabulary ids or, if one is unknown, texts.

    A problem without prompt tokens is identified by the tokens it has; one of whose tokens nothing is known is left out.
    tokens: as `tokens.parquet`, sorted by problem and position, with `text` where the source has it.
    """
    is_prompt_N = pc.equal(tokens.column("phase").cast(pa.string()), PREFILL).to_numpy()
    problem_N = tokens.column("problem_id").to_numpy()
    has_prompt_N = np.isin(problem_N, problem_N[is_prompt_N])
    tokens = tokens.filter(pa.array(is_prompt_N | ~has_prompt_N))
    problem_N, position_N = (tokens.column(name).to_numpy() for name in ("problem_id", "token_id"))
    problems, starts = np.unique(problem_N, return_index=True)
    columns = [tokens.column(name).combine_chunks() for name in ("vocab_id", "text") if name in tokens.column_names]
    hashes = {}
    for problem, start, end in zip(problems.tolist(), starts.tolist(), [*starts[1:].tolist(), len(problem_N)], strict=True):
        for column in columns:
            values = column.slice(start, end - start)
            if not values.null_count:
                named = f"{column.type} from {position_N[start]}\n".encode()
                hashes[problem] = hashlib.sha256(named + _bytes(values)).hexdigest()
                break
    return hashes


def _bytes(values: pa.Array) -> bytes:
    """An encoding of the values that differs for different values."""
    if pa.types.is_integer(values.type):
        return bytes(np.ascontiguousarray(values.to_numpy(), dtype="<i4").tobytes())
    return b"".join(len(text).to_bytes(4, "little") + text for text in values.cast(pa.binary()).to_pylist())
