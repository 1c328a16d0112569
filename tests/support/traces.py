"""Traces for the tests: small, known, and written by the project's own writers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from profiler.capture.sealing import run_folder, seal
from profiler.trace.reader import Trace
from profiler.trace.schema import PROBLEMS_FILE, PROBLEMS_SCHEMA, TOKENS_FILE, TOKENS_SCHEMA, Metadata, ModelMetadata
from profiler.trace.stream import HIDDEN_STREAM, RoutingWriter, ValuesWriter
from profiler.trace.writer import write_manifest, write_metadata, write_table

Problems = list[tuple[np.ndarray, np.ndarray]]
# What the fixtures `make_trace` and `random_problems` give.
MakeTrace = Callable[..., Trace]
MakeProblems = Callable[..., Problems]


def write_synthetic_trace(
    directory: Path,
    problems: Problems,
    num_experts: int,
    *,
    model_id: str = "synthetic",
    first_layer: int = 0,
    prompts: list[str] | None = None,
    datasets: list[str] | None = None,
    vocab_ids: list[np.ndarray] | None = None,
    prompt_tokens: int = 1,
    unrecorded: int = 0,
    hidden: list[np.ndarray] | None = None,
) -> Trace:
    """A complete trace from one (expert_ids `[T, L, K]`, weights `[T, L, K]`) per problem.

    prompt_tokens: of each problem. unrecorded: positions at the end of each problem that have no routing.
    first_layer: the decoder's index of the first MoE layer. hidden: router inputs `[T, L, D]` of each problem.
    """
    directory.mkdir()
    layers, top_k = problems[0][0].shape[1:]
    model = ModelMetadata(
        id=model_id, moe_layers=list(range(first_layer, first_layer + layers)), num_experts=num_experts, top_k=top_k
    )
    write_metadata(directory, Metadata(model=model, engine="none", hook="none"))
    lengths = {}
    with RoutingWriter(run_folder(directory, 0), model) as writer:
        for problem_id, (ids, weights) in enumerate(problems):
            writer.add(problem_id, np.arange(len(ids)), ids, weights)
            lengths[problem_id] = len(ids) + 1 + unrecorded
    if hidden is not None and hidden[0].size:
        path = run_folder(directory, 0) / HIDDEN_STREAM
        with ValuesWriter(path, model.moe_layers, "hidden", hidden[0].shape[-1]) as inputs:
            for problem_id, values in enumerate(hidden):
                inputs.add(problem_id, np.arange(len(values)), values.astype(np.float16))
    seal(directory, model, lengths)
    rows = []
    tokens: dict[str, list[object]] = {name: [] for name in TOKENS_SCHEMA.names}
    for problem_id, length in lengths.items():
        vocab = vocab_ids[problem_id] if vocab_ids else np.zeros(length, dtype=np.int32)
        tokens["problem_id"] += [problem_id] * length
        tokens["token_id"] += range(length)
        tokens["vocab_id"] += np.resize(vocab, length).tolist()
        tokens["phase"] += ["prefill"] * prompt_tokens + ["decode"] * (length - prompt_tokens)
        rows.append(
            {
                "problem_id": problem_id,
                "dataset": datasets[problem_id] if datasets else "synthetic",
                "source_key": str(problem_id),
                "prompt": prompts[problem_id] if prompts else f"prompt {problem_id}",
                "output": "",
                "prompt_tokens": prompt_tokens,
                "output_tokens": length - prompt_tokens,
                "truncated_tokens": 0,
                "cached_tokens": 0,
                "finish_reason": "length",
            }
        )
    write_table(directory / TOKENS_FILE, pa.table(tokens, schema=TOKENS_SCHEMA))
    write_table(directory / PROBLEMS_FILE, pa.Table.from_pylist(rows, schema=PROBLEMS_SCHEMA))
    write_manifest(directory)
    return Trace.open(directory)
