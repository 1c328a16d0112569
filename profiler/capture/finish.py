"""Turn a finished capture into a complete trace: seal the rows, write tables and gaps, and write the manifest last."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from profiler.capture.inputs import CapturedInputs, check_sequences
from profiler.capture.requests import ABORTED, Sequence
from profiler.capture.sealing import Missing, run_folder, runs_of, seal
from profiler.errors import TraceError, counted
from profiler.trace.jsonl import write_jsonl
from profiler.trace.reader import Trace
from profiler.trace.schema import (
    DECODE,
    JSONL_FILE,
    PREFILL,
    PROBLEMS_FILE,
    PROBLEMS_SCHEMA,
    TOKENS_FILE,
    TOKENS_SCHEMA,
    DatasetMetadata,
    Metadata,
)
from profiler.trace.stream import ROUTING_STREAM
from profiler.trace.writer import write_manifest, write_metadata, write_table

# A gap's line names at most this many problem ids; the tables hold all of them.
NAMED_PROBLEMS = 10


def finish_trace(
    directory: Path,
    metadata: Metadata,
    sequences: list[Sequence],
    *,
    jsonl: bool = False,
    drop_other_requests: bool = False,
    inputs: CapturedInputs | None = None,
) -> Trace:
    """Seal `directory/capture` as the routing of `sequences`, and write the tables, the gaps and the manifest.

    jsonl: also write the routing as JSON lines. drop_other_requests: drop the rows of requests that are not in `sequences`.
    inputs: what the requests of run 0 read, if the caller has read it before.
    Raises `TraceError` if nothing was captured, if there are rows of other requests and `drop_other_requests` is False, or if
    the captured request of a sequence is another sequence's too, or read other tokens (`profiler.capture.inputs`).
    """
    sequences = sorted(sequences, key=lambda sequence: sequence.problem_id)
    if not any((run_folder(directory, run) / ROUTING_STREAM).is_file() for run in runs_of(directory)):
        raise TraceError(f"{directory}: nothing was captured")
    check_sequences(directory, sequences, None if inputs is None else {0: inputs})
    missing = seal(
        directory,
        metadata.model,
        {sequence.problem_id: sequence.tokens for sequence in sequences},
        {s.problem_id: s.captured_as for s in sequences if s.captured_as is not None},
        drop_other_requests=drop_other_requests,
    )
    counts = Counter(sequence.dataset for sequence in sequences)
    datasets = metadata.datasets or [DatasetMetadata(name=name, problems=count) for name, count in counts.items()]
    gaps = [*metadata.gaps, *_gaps(sequences, missing)]
    write_metadata(directory, metadata.model_copy(update={"datasets": datasets, "gaps": gaps}))
    write_table(directory / TOKENS_FILE, _tokens_table(sequences))
    write_table(directory / PROBLEMS_FILE, _problems_table(sequences))
    extra_files = {}
    if jsonl:
        extra_files[JSONL_FILE] = write_jsonl(Trace.open(directory, allow_incomplete=True), directory / JSONL_FILE)
    write_manifest(directory, extra_files)
    return Trace.open(directory)


def _gaps(sequences: list[Sequence], missing: Missing) -> list[str]:
    """Describe what is missing from the routing, one line per cause."""
    cached = {s.problem_id: s.cached_tokens for s in sequences if s.cached_tokens}
    explained, unexplained = 0, {}
    for problem_id, gaps_G2 in missing.items():
        from_cache = np.clip(np.minimum(gaps_G2[:, 1], cached.get(problem_id, 0)) - gaps_G2[:, 0], 0, None).sum()
        explained += int(from_cache)
        others = int((gaps_G2[:, 1] - gaps_G2[:, 0]).sum() - from_cache)
        if others:
            unexplained[problem_id] = others
    gaps = []
    if cached:
        gaps.append(
            f"{counted(explained, 'position')} of {counted(len(cached), 'problem')} came from the prefix cache: "
            f"{_named(cached)}"
        )
    aborted = [s.problem_id for s in sequences if s.finish_reason == ABORTED]
    if aborted:
        gaps.append(f"{counted(len(aborted), 'problem')} aborted and incomplete: {_named(aborted)}")
    if unexplained:
        count = sum(unexplained.values())
        gaps.append(
            f"{counted(count, 'position')} of {counted(len(unexplained), 'problem')} not captured: {_named(unexplained)}"
        )
    return gaps


def list_some(lines: list[str]) -> list[str]:
    """The first lines, and how many more there are."""
    more = len(lines) - NAMED_PROBLEMS
    return lines if more <= 0 else [*lines[:NAMED_PROBLEMS], f"{counted(more, 'more problem')}, for reasons as above"]


def _named(problems: list[int] | dict[int, Any]) -> str:
    ids = sorted(problems)
    more = f" and {len(ids) - NAMED_PROBLEMS} more" if len(ids) > NAMED_PROBLEMS else ""
    return "problem " + ", ".join(map(str, ids[:NAMED_PROBLEMS])) + more


def _tokens_table(sequences: list[Sequence]) -> pa.Table:
    lengths = np.array([sequence.tokens for sequence in sequences])
    decode = [np.arange(s.tokens) >= len(s.prompt_token_ids) for s in sequences]
    vocab_ids = [np.array(s.prompt_token_ids + s.output_token_ids, dtype=np.int32) for s in sequences]
    return pa.table(
        [
            np.repeat(np.array([sequence.problem_id for sequence in sequences], dtype=np.int32), lengths),
            np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
            np.concatenate(vocab_ids),
            pa.DictionaryArray.from_arrays(np.concatenate(decode).astype(np.int8), [PREFILL, DECODE]),
        ],
        schema=TOKENS_SCHEMA,
    )


def _problems_table(sequences: list[Sequence]) -> pa.Table:
    rows = [
        {name: getattr(s, name) for name in PROBLEMS_SCHEMA.names if hasattr(s, name)}
        | {"prompt_tokens": len(s.prompt_token_ids), "output_tokens": len(s.output_token_ids)}
        for s in sequences
    ]
    return pa.Table.from_pylist(rows, schema=PROBLEMS_SCHEMA)
