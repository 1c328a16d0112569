"""Writing and reading a trace against a logger that writes one `json.dumps` per row, side by side in one run.

    python benchmarks/trace_io.py [--tokens 100000]

Routing is uniform and independent, Mixtral-shaped (32 layers, 8 experts, top-2): the worst case for compression.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from profiler.capture_stream import RoutingWriter
from profiler.reader import Trace
from profiler.schema import Metadata, ModelMetadata
from profiler.sealing import run_folder, seal
from profiler.writer import write_manifest, write_metadata

LAYERS, EXPERTS, TOP_K = 32, 8, 2
TOKENS_PER_PROBLEM = 500
# The plain logger is timed on this many tokens: its cost per row does not depend on their number.
LOGGER_TOKENS = 2_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000)
    problems = max(1, parser.parse_args().tokens // TOKENS_PER_PROBLEM)
    random = np.random.default_rng(0)
    ids = random.random((TOKENS_PER_PROBLEM, LAYERS, EXPERTS), dtype=np.float32).argsort(-1)[:, :, :TOP_K].astype(np.int16)
    weights = random.dirichlet(np.ones(TOP_K), size=(TOKENS_PER_PROBLEM, LAYERS)).astype(np.float32)
    rows = problems * TOKENS_PER_PROBLEM * LAYERS
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace"
        write = timed(lambda: write_trace(trace, problems, ids, weights))
        read = timed(lambda: sum(len(chunk) for chunk in Trace.open(trace).chunks()))
        log = Path(folder) / "log.jsonl"
        logger = timed(lambda: write_log(log, ids, weights))
        size = sum(path.stat().st_size for path in trace.rglob("*") if path.is_file())
        log_rows = LOGGER_TOKENS * LAYERS
        print(f"{rows:,} rows, {sys.platform}, one process")
        ratio = (rows / write) / (log_rows / logger)
        print(f"write and seal   {rows / write / 1e6:8.2f} M rows/s   {ratio:8.1f} x the plain logger")
        print(f"read and check   {rows / read / 1e6:8.2f} M rows/s")
        print(f"json.dumps log   {log_rows / logger / 1e6:8.2f} M rows/s")
        print(
            f"size             {size / rows:8.2f} bytes/row   1/{log.stat().st_size / log_rows / (size / rows):.1f} of the log"
        )


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def write_trace(directory: Path, problems: int, ids: np.ndarray, weights: np.ndarray) -> None:
    """As `specmoe collect` does: capture in the order of finishing, seal, manifest."""
    directory.mkdir()
    model = ModelMetadata(id="made", moe_layers=list(range(LAYERS)), num_experts=EXPERTS, top_k=TOP_K)
    write_metadata(directory, Metadata(model=model, engine="none", hook="none"))
    with RoutingWriter(run_folder(directory, 0), model) as writer:
        for problem_id in range(problems):
            # Another order of tokens for every problem, so that compression finds no repeated problem.
            order = np.random.default_rng(problem_id).permutation(TOKENS_PER_PROBLEM)
            writer.add(problem_id, np.arange(TOKENS_PER_PROBLEM), ids[order], weights[order])
    seal(directory, model, dict.fromkeys(range(problems), TOKENS_PER_PROBLEM + 1))
    write_manifest(directory)


def write_log(path: Path, ids: np.ndarray, weights: np.ndarray) -> None:
    """One JSON line per row, as published patches write them."""
    with path.open("w", encoding="utf-8") as file:
        for token in range(LOGGER_TOKENS):
            ids_LK, weights_LK = ids[token % len(ids)].tolist(), weights[token % len(weights)].tolist()
            for layer in range(LAYERS):
                row = {"problem_id": 0, "layer": layer, "token_id": token}
                file.write(json.dumps({**row, "expert_ids": ids_LK[layer], "weights": weights_LK[layer]}) + "\n")


if __name__ == "__main__":
    main()
