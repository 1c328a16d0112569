"""The cost of large collections: measured on this machine for the parts that run on a CPU, estimated for the GPU.

    python -m benchmarks.scaling [--tokens 100000 1000000 10000000] [--folder DIR]

Measured on one core: capturing and sealing every shard, with its tables; merging; reading everything back, with checks. Routing
has Mixtral's shape (32 layers, 8 experts, top-2) and is uniform and independent, the worst case for compression. Problems have
500 tokens, in shards of 8,192 problems as on Modal. Estimated: `profiler.plan.estimate`, for every model of the registry.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.trace_io import MIXTRAL, TOKENS_PER_PROBLEM, synthetic_blocks
from profiler.capture.finish import finish_trace
from profiler.capture.requests import Sequence
from profiler.capture.sealing import run_folder
from profiler.errors import ModelError, TraceError
from profiler.models.gpus import find_gpu
from profiler.models.registry import MODELS, preset
from profiler.plan.estimate import estimate_tokens
from profiler.plan.job import DEFAULT_GPU, LARGE_SHARD
from profiler.trace.merge import merge_traces
from profiler.trace.reader import Trace
from profiler.trace.schema import Metadata
from profiler.trace.stream import RoutingWriter

SIZES = [10**6, 10**8, 10**10]
# (share of prompt tokens, tokens per problem): a question with a short answer; and texts that the model only reads.
MIXES = {"400 + 100": (0.8, 500), "texts of 1,000": (0.999, 1001)}
PROMPT = "x" * 1600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[10**5, 10**6, 10**7])
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--child", nargs=2, metavar=("TOKENS", "DIR"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(int(arguments.child[0]), Path(arguments.child[1]))))
        return
    print("measured: tokens; seconds to capture and seal, merge, read; M rows/s of each; bytes per token; peak MiB of each")
    for tokens in arguments.tokens:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            command = [sys.executable, "-m", "benchmarks.scaling", "--child", str(tokens), folder]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows = tokens * len(MIXTRAL.moe_layers) / 1e6
        steps = ("write", "merge", "read")
        print(
            f"{tokens:>12,}  "
            + " ".join(f"{found[step]:7.2f}" for step in steps)
            + "  "
            + " ".join(f"{rows / found[step]:7.1f}" for step in steps)
            + f"  {found['bytes'] / tokens:.1f} (tokens.parquet {found['token_bytes'] / tokens:.2f}, "
            + f"problems.parquet {found['problem_bytes'] / tokens:.2f})  "
            + " ".join(f"{found[f'{step}_mib']:5.0f}" for step in steps)
            + f"  tokens table: {found['tokens_table']}"
        )
    print()
    print_estimates()


def measure(tokens: int, folder: Path) -> dict[str, object]:
    """Measure one size. `main` runs it in a separate process, so that sizes do not share their peak memory."""
    pa.set_cpu_count(1)
    found: dict[str, object] = {}
    problems = tokens // TOKENS_PER_PROBLEM
    blocks = list(synthetic_blocks(64))
    parts = []
    began = time.monotonic()
    for first in range(0, problems, LARGE_SHARD):
        parts.append(folder / f"shard-{first:09d}")
        write_shard(parts[-1], range(first, min(first + LARGE_SHARD, problems)), blocks)
    found |= {"write": time.monotonic() - began, "write_mib": peak_mib()}
    began = time.monotonic()
    trace = merge_traces(parts, folder / "whole")
    found |= {"merge": time.monotonic() - began, "merge_mib": peak_mib()}
    for part in parts:
        shutil.rmtree(part)
    began = time.monotonic()
    read = sum(len(chunk) for chunk in trace.chunks())
    found |= {"read": time.monotonic() - began, "read_mib": peak_mib()}
    assert read == problems * (TOKENS_PER_PROBLEM - 1)
    assert trace.manifest is not None
    sizes = {name: entry.bytes for name, entry in trace.manifest.files.items()}
    found |= {
        "bytes": sum(sizes.values()),
        "token_bytes": sizes["tokens.parquet"],
        "problem_bytes": sizes["problems.parquet"],
    }
    try:
        found["tokens_table"] = f"{trace.tokens.nbytes / 2**20:.0f} MiB in memory"
    except TraceError as error:
        found["tokens_table"] = f"refused: {error}"
    return found


def write_shard(path: Path, problems: range, blocks: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]) -> Trace:
    """Write a shard of problems of `TOKENS_PER_PROBLEM` tokens that cycle through the blocks of routing."""
    path.mkdir(parents=True)
    routed = TOKENS_PER_PROBLEM - 1
    sequences = []
    random = np.random.default_rng(problems.start)
    with RoutingWriter(run_folder(path, 0), MIXTRAL) as writer:
        for problem in problems:
            _, positions, ids, weights = blocks[problem % len(blocks)]
            writer.add(problem, positions[:routed], ids[:routed], weights[:routed])
            vocab = random.integers(0, 32_000, TOKENS_PER_PROBLEM).tolist()
            sequences.append(
                Sequence(
                    problem_id=problem,
                    captured_as=(0, problem),
                    dataset="synthetic",
                    source_key=str(problem),
                    prompt=PROMPT,
                    output="",
                    prompt_token_ids=vocab[:400],
                    output_token_ids=vocab[400:],
                )
            )
    return finish_trace(path, Metadata(model=MIXTRAL, engine="none", hook="none"), sequences)


def print_estimates() -> None:
    """Print time, cost and trace size for every model of the registry on the default GPU."""
    gpu = find_gpu(DEFAULT_GPU)
    print(f"estimated, not measured: one {gpu.name}; GPU hours, dollars and trace size by number of tokens")
    for name, (share, length) in MIXES.items():
        print(f"{name:<28}{'tokens/s':>10}" + "".join(f"{f'10^{len(str(size)) - 1} tokens':>34}" for size in SIZES))
        for entry in MODELS.values():
            try:
                chosen = preset(entry, gpu)
            except ModelError as error:
                print(f"  {error}")
                continue
            cells = []
            for size in SIZES:
                found = estimate_tokens(
                    entry,
                    gpu,
                    chosen,
                    prompt_tokens=round(size * share),
                    new_tokens=round(size * (1 - share)),
                    num_problems=size // length,
                    batch=chosen.batch,
                )
                trace = found.trace_bytes / 1e9
                cells.append(f"{found.gpu_hours:9,.1f} h {f'${found.dollars:,.2f}':>10} {trace:9,.1f} GB")
            print(f"  {entry.name + ' ' + chosen.precision:<28}{found.tokens_per_second:>8,.0f}" + "".join(cells))


def peak_mib() -> float:
    """Peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
