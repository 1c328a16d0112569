"""Speed of counting load and transitions, compared with pandas and a loop over Counter; then of the whole analysis.

    python -m benchmarks.analysis [--trace DIR ...] [--rows 100000000]

First, on one core and with all data in memory: expert load, and all K x K pairs of adjacent layers, counted in three ways. The
results must be equal. Then the single pass of `specmoe analyze` over files, with every statistic, in a separate process, on one
core and on all. It runs on synthetic traces of 1/100, 1/10 and all of --rows: Mixtral-shaped, a Markov chain over layers; 100
million rows take 1 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from analysis.counts.frames import Frame
from analysis.counts.load import LoadCounts
from analysis.counts.survey import Axes
from analysis.counts.transitions import TransitionCounts
from profiler.capture.sealing import run_folder, seal
from profiler.trace.decoding import concatenate
from profiler.trace.reader import Trace
from profiler.trace.schema import PROBLEMS_FILE, PROBLEMS_SCHEMA, Metadata, ModelMetadata, RoutingChunk
from profiler.trace.stream import RoutingWriter
from profiler.trace.writer import write_manifest, write_metadata, write_table

MIXTRAL = ModelMetadata(id="synthetic", moe_layers=list(range(32)), num_experts=8, top_k=2)
TOKENS_PER_PROBLEM = 500
# The slow versions are timed on this many tokens. Their cost per row does not depend on the number of rows.
PANDAS_TOKENS, LOOP_TOKENS = 20_000, 1_000
REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, action="append", default=[], help="a trace directory; may be repeated")
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--child", nargs=2, metavar=("DIR", "WORKERS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(Path(arguments.child[0]), int(arguments.child[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        synthetic = [
            write_synthetic_trace(Path(folder) / f"synthetic-{part}", arguments.rows // part // 32) for part in (100, 10, 1)
        ]
        use_one_core()
        for path in [synthetic[0], *arguments.trace]:
            compare(Trace.open(path))
        use_every_core()
        for path in [*arguments.trace, *synthetic]:
            measure(path)


def use_one_core() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def use_every_core() -> None:
    os.sched_setaffinity(0, range(os.cpu_count() or 1))


def compare(trace: Trace) -> None:
    """Time three ways to compute the same counts."""
    model = trace.metadata.model
    pieces, tokens = [], 0
    for piece in trace.chunks():
        pieces.append(piece)
        tokens += len(piece)
        if tokens >= 200_000:
            break
    chunk, layers = concatenate(pieces), len(model.moe_layers)
    rows = len(chunk) * layers
    print(f"{trace.path.name}: {rows:,} rows, K = {model.top_k}, {model.num_experts} experts; load and adjacent transitions")
    ours, _ = best(lambda: count_ours(chunk, model))
    print(f"  compiled loops        {rows / ours / 1e6:9.2f} M rows/s")
    for name, count, limit in (("pandas", count_pandas, PANDAS_TOKENS), ("Counter, product", count_loop, LOOP_TOKENS)):
        part = chunk.take(slice(0, min(limit, len(chunk))))
        prepare(count, part, model)
        seconds, counted = best(partial(count, part, model))
        for expected, actual in zip(count_ours(part, model), counted, strict=True):
            assert (expected == actual).all(), f"the counts of {name} differ"
        rate = len(part) * layers / seconds
        print(f"  {name:<20}  {rate / 1e6:9.3f} M rows/s  compiled loops are {rows / ours / rate:7.1f} x as fast")


Tables = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def count_ours(chunk: RoutingChunk, model: ModelMetadata) -> Tables:
    layers, experts = len(model.moe_layers), model.num_experts
    axes = Axes(tuple(model.moe_layers), experts, model.top_k, 1, False, ("synthetic",), ())
    nothing_T = np.zeros(len(chunk), dtype=np.int32)
    frame = Frame(RoutingChunk(chunk.problem_ids_T, chunk.token_ids_T, chunk.expert_ids_TLK, None), *[nothing_T] * 4)
    load, transitions = LoadCounts(axes), TransitionCounts(axes)
    load.update(frame)
    transitions.update(frame)
    return load.counts.sum((0, 1)), transitions.pairs[:, 0, : layers - 1].sum(0, dtype=np.int64)


def prepare(count: Callable[..., Any], part: RoutingChunk, model: ModelMetadata) -> None:
    """Convert the data to the form that each version works on. Not timed: each version could have read it in that form."""
    layers, top_k = len(model.moe_layers), model.top_k
    if count is count_pandas:
        INPUTS["pandas"] = pd.DataFrame(
            {
                "token": np.repeat(np.arange(len(part)), layers * top_k),
                "layer": np.tile(np.repeat(np.arange(layers), top_k), len(part)),
                "expert": part.expert_ids_TLK.reshape(-1).astype(np.int64),
            }
        )
    else:
        INPUTS["loop"] = part.expert_ids_TLK.tolist()


INPUTS: dict[str, Any] = {}


def count_pandas(_: RoutingChunk, model: ModelMetadata) -> Tables:
    frame, layers, experts = INPUTS["pandas"], len(model.moe_layers), model.num_experts
    load = frame.groupby(["layer", "expert"]).size()
    later = frame.assign(layer=frame["layer"] - 1)
    joined = frame.merge(later, on=["token", "layer"], suffixes=("", "_later"))
    pairs = joined.groupby(["layer", "expert", "expert_later"]).size()
    load_LE = np.zeros((layers, experts), dtype=np.int64)
    pairs_NEE = np.zeros((layers - 1, experts, experts), dtype=np.int64)
    load_LE[tuple(np.array(load.index.tolist()).T)] = load.to_numpy()
    pairs_NEE[tuple(np.array(pairs.index.tolist()).T)] = pairs.to_numpy()
    return load_LE, pairs_NEE


def count_loop(_: RoutingChunk, model: ModelMetadata) -> Tables:
    layers, experts = len(model.moe_layers), model.num_experts
    load: Counter[tuple[int, int]] = Counter()
    pairs: Counter[tuple[int, int, int]] = Counter()
    for token in INPUTS["loop"]:
        for layer, experts_K in enumerate(token):
            for expert in experts_K:
                load[layer, expert] += 1
            if layer + 1 < layers:
                for here, there in product(experts_K, token[layer + 1]):
                    pairs[layer, here, there] += 1
    load_LE = np.zeros((layers, experts), dtype=np.int64)
    pairs_NEE = np.zeros((layers - 1, experts, experts), dtype=np.int64)
    for key, count in load.items():
        load_LE[key] = count
    for key_3, count in pairs.items():
        pairs_NEE[key_3] = count
    return load_LE, pairs_NEE


def best(work: Callable[[], Tables]) -> tuple[float, Tables]:
    """The best time of `REPEATS` runs, after a first one that may compile."""
    result, times = work(), []
    for _attempt in range(REPEATS):
        began = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - began)
    return min(times), result


def write_synthetic_trace(path: Path, tokens: int) -> Path:
    """A trace of a Markov chain: with probability one half, a layer's experts follow from those of the previous layer."""
    random = np.random.default_rng(0)
    path.mkdir(parents=True)
    write_metadata(path, Metadata(model=MIXTRAL, engine="none", hook="none"))
    problems = max(2, tokens // TOKENS_PER_PROBLEM)
    blocks = list(synthetic_blocks(random, min(problems, 64)))
    with RoutingWriter(run_folder(path, 0), MIXTRAL) as writer:
        for problem in range(problems):
            ids, weights = blocks[problem % len(blocks)]
            writer.add(problem, np.arange(TOKENS_PER_PROBLEM), ids, weights)
    seal(path, MIXTRAL, dict.fromkeys(range(problems), TOKENS_PER_PROBLEM + 1))
    rows = [
        dict.fromkeys(PROBLEMS_SCHEMA.names) | {"problem_id": n, "dataset": f"d{n % 3}", "source_key": str(n)}
        for n in range(problems)
    ]
    write_table(path / PROBLEMS_FILE, pa.Table.from_pylist(rows, schema=PROBLEMS_SCHEMA))
    write_manifest(path)
    return path


def synthetic_blocks(random: np.random.Generator, count: int) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    for _ in range(count):
        ids = random.random((TOKENS_PER_PROBLEM, 32, 8)).argsort(-1)[:, :, :2]
        for layer in range(1, 32):
            follows = random.random(TOKENS_PER_PROBLEM) < 0.5
            ids[follows, layer] = (ids[follows, layer - 1] + 3) % 8
        first = 0.5 + random.random((TOKENS_PER_PROBLEM, 32)) / 2
        yield ids, np.stack([first, 1 - first], axis=-1)


def measure(path: Path) -> None:
    """Compute every statistic of a trace, on one core and on all cores."""
    rows = Trace.open(path).num_rows
    shown = []
    for workers in sorted({1, os.cpu_count() or 1}):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.analysis", "--child", str(path), str(workers)],
            check=True,
            capture_output=True,
            text=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        speed = f"{rows / found['count'] / 1e6:5.2f} M rows/s ({found['count']:.1f} s)"
        shown.append(f"{workers} threads: {speed}, peak {found['peak']:.0f} MiB")
        rest = found["rest"]
    print(f"{path.name}: {rows:,} rows, every statistic. {'; '.join(shown)}; plus {rest:.1f} s for any number of rows")


def child(path: Path, workers: int) -> None:
    from analysis.counts.counting import count_trace
    from analysis.statistics.compute import Source, make_statistics

    if workers == 1:
        use_one_core()
    pa.set_cpu_count(workers)
    trace = Trace.open(path)
    # Compiled loops are cached on disk, and loading them must not be timed as counting.
    count_trace(Trace.open(path), workers=1) if trace.num_rows < 2_000_000 else None
    began = time.perf_counter()
    counts = count_trace(trace, workers=workers)
    counted = time.perf_counter()
    make_statistics(counts, Source.of(trace))
    document = {
        "count": counted - began,
        "rest": time.perf_counter() - counted,
        "peak": peak_mib(),
    }
    print(json.dumps(document))


def peak_mib() -> float:
    """Peak memory of this process alone. `getrusage` would include what its parent had when it started this process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
