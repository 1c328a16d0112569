"""Traces made by the tests: small, known, and written by the project's own writers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from profiler.capture_stream import RoutingWriter
from profiler.reader import Trace
from profiler.schema import (
    PROBLEMS_FILE,
    PROBLEMS_SCHEMA,
    TOKENS_FILE,
    TOKENS_SCHEMA,
    Metadata,
    ModelMetadata,
)
from profiler.sealing import run_folder, seal
from profiler.writer import write_manifest, write_metadata, write_table

if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # A core for each worker and all that it starts: engines whose threads wait for a shared core take several times as long.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(cores)]})

# Tests must not reach for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules with slow tests first: whichever worker ends last should end with something short."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


Problems = list[tuple[np.ndarray, np.ndarray]]


@pytest.fixture
def make_trace(tmp_path: Path) -> Callable[..., Trace]:
    """Make a complete trace from one (expert_ids `[T, L, K]`, weights `[T, L, K]`) per problem."""

    def make(
        problems: Problems,
        num_experts: int,
        *,
        name: str = "trace",
        prompts: list[str] | None = None,
        datasets: list[str] | None = None,
        vocab_ids: list[np.ndarray] | None = None,
        prompt_tokens: int = 1,
    ) -> Trace:
        directory = tmp_path / name
        directory.mkdir()
        layers, top_k = problems[0][0].shape[1:]
        model = ModelMetadata(id="made", moe_layers=list(range(layers)), num_experts=num_experts, top_k=top_k)
        write_metadata(directory, Metadata(model=model, engine="none", hook="none"))
        lengths = {}
        with RoutingWriter(run_folder(directory, 0), model) as writer:
            for problem_id, (ids, weights) in enumerate(problems):
                writer.add(problem_id, np.arange(len(ids)), ids, weights)
                lengths[problem_id] = len(ids) + 1
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
                    "dataset": datasets[problem_id] if datasets else "made",
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

    return make


@pytest.fixture
def random_problems() -> Callable[..., Problems]:
    """Problems routed uniformly and independently."""

    def make(count: int, tokens: int, layers: int, num_experts: int, top_k: int, seed: int = 0) -> Problems:
        random = np.random.default_rng(seed)
        problems = []
        for _ in range(count):
            ids = random.random((tokens, layers, num_experts)).argsort(-1)[:, :, :top_k]
            problems.append((ids, random.dirichlet(np.ones(top_k), size=(tokens, layers))))
        return problems

    return make
