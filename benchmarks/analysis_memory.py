"""Peak memory of `specmoe analyze`, from files to report, on traces of difficult shapes.

    python -m benchmarks.analysis_memory [--only NAME] [--trace DIR ...]

Each synthetic trace is written, analyzed by the command in a separate process with its default number of threads, and deleted.
The measurement includes writing the report. Routing is random, since memory does not depend on it. Needs 8 GB of disk and half
an hour.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from profiler.trace.reader import Trace
from profiler.trace.schema import (
    LOGITS_FOLDER,
    PROBLEMS_FILE,
    PROBLEMS_SCHEMA,
    ROUTING_FOLDER,
    TOKENS_FILE,
    TOKENS_SCHEMA,
    Metadata,
    ModelMetadata,
    expert_dtype,
    routing_schema,
    values_schema,
)
from profiler.trace.writer import TEXT_PER_GROUP, BlockWriter, write_manifest, write_metadata

LIMIT_MIB = 1024
# Runs the command and prints its peak memory. `getrusage` of a child would include what its parent had.
CHILD = """
import sys
from pathlib import Path
from specmoe import main
try:
    main()
finally:
    peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    print("PEAK", int(peak) / 1024, file=sys.stderr)
"""


@dataclass(frozen=True)
class Case:
    """A trace of `problems` x `tokens` tokens.

    prompt_bytes: length of each problem's text. vocabulary: number of vocabulary ids that tokens are drawn from.
    one_group: `problems.parquet` has a single row group, as a careless writer would leave it, and text that does not repeat.
    """

    layers: int
    experts: int
    top_k: int
    problems: int
    tokens: int
    prompt_bytes: int = 20
    vocabulary: int = 50_000
    logits: bool = False
    datasets: int = 3
    one_group: bool = False


CASES = {
    "Mixtral": Case(32, 8, 2, 2_000, 500),
    "OLMoE, many problems": Case(16, 64, 8, 60_000, 20),
    "Qwen3-30B": Case(48, 128, 8, 100, 300),
    "Qwen3-30B, many problems": Case(48, 128, 8, 5_000, 5),
    "Qwen3-30B with logits": Case(48, 128, 8, 32, 256, logits=True),
    "DeepSeek-V3": Case(58, 256, 8, 20, 300),
    "DeepSeek-V3, many problems": Case(58, 256, 8, 1_300, 5),
    "DeepSeek-V3, many datasets": Case(58, 256, 8, 1_000, 5, datasets=40),
    "48 layers of 512 experts": Case(48, 512, 8, 10, 200),
    "48 layers of 512 experts, many problems": Case(48, 512, 8, 1_000, 4),
    "one layer of 6,000 experts": Case(1, 6_000, 4, 20, 500),
    "one layer of 6,000 experts, many problems": Case(1, 6_000, 4, 5_000, 5),
    "two million problems": Case(1, 4, 1, 2_000_000, 1),
    "long texts": Case(4, 8, 2, 20_000, 10, prompt_bytes=200_000),
    "all text in one row group": Case(1, 4, 1, 400_000, 1, prompt_bytes=1_000, one_group=True),
    "pages of 200 MB": Case(58, 256, 8, 1_300, 5, prompt_bytes=200_000, one_group=True),
    "all tokens distinct": Case(4, 8, 2, 3_000, 1_000, vocabulary=2**31 - 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--trace", type=Path, action="append", default=[], help="a trace directory; may be repeated")
    arguments = parser.parse_args()
    for path in arguments.trace:
        print(f"{path.name}: {measure(path)}", flush=True)
    for name, case in CASES.items():
        if arguments.only in {None, name}:
            with tempfile.TemporaryDirectory() as folder:
                trace = write_synthetic_trace(Path(folder) / "synthetic", case)
                print(f"{name}, {describe(case)}: {measure(trace)}", flush=True)


def describe(case: Case) -> str:
    return f"{case.layers} x {case.experts}, K = {case.top_k}, {case.problems:,} problems of {case.tokens} tokens"


def measure(path: Path) -> str:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-c", CHILD, "analyze", str(path), "--out", f"{out}/report"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f"failed: {done.stderr[-500:]}"
    peak = float(done.stderr.split("PEAK ")[1])
    return f"peak {peak:,.0f} MiB, {time.perf_counter() - began:.0f} s{'' if peak < LIMIT_MIB else f', more than {LIMIT_MIB}'}"


def write_synthetic_trace(path: Path, case: Case) -> Path:
    """Write a complete trace. Files are written in pieces, so that this process stays small in every case."""
    path.mkdir()
    model = ModelMetadata(id="synthetic", moe_layers=list(range(case.layers)), num_experts=case.experts, top_k=case.top_k)
    write_metadata(path, Metadata(model=model, engine="none", hook="none"))
    random = np.random.default_rng(0)
    routing = BlockWriter(path / ROUTING_FOLDER, model.moe_layers, routing_schema(case.experts, case.top_k))
    for ids_T, positions_T in tokens_of(case, routing.tokens_per_group):
        routing.write(ids_T, positions_T, random_routes(random, case, len(ids_T)))
    routing.close()
    if case.logits:
        logits = BlockWriter(path / LOGITS_FOLDER, model.moe_layers, values_schema("logits", case.experts))
        for ids_T, positions_T in tokens_of(case, logits.tokens_per_group):
            values = random.normal(size=(len(ids_T), case.layers, case.experts)).astype(np.float16)
            logits.write(ids_T, positions_T, {"logits": values})
        logits.close()
    with pq.ParquetWriter(path / TOKENS_FILE, TOKENS_SCHEMA, compression="zstd") as tokens:
        for ids_T, positions_T in tokens_of(case, 100_000):
            vocabulary_T = random.integers(case.vocabulary, size=len(ids_T))
            columns = [ids_T, positions_T, vocabulary_T, pa.array(["decode"] * len(ids_T))]
            tokens.write_table(pa.table(columns, names=TOKENS_SCHEMA.names).cast(TOKENS_SCHEMA))
    with pq.ParquetWriter(path / PROBLEMS_FILE, PROBLEMS_SCHEMA, compression="zstd") as problems:
        at_once = case.problems if case.one_group else max(1, min(50_000, TEXT_PER_GROUP // case.prompt_bytes))
        for start in range(0, case.problems, at_once):
            numbers = range(start, min(start + at_once, case.problems))
            rows = [
                dict.fromkeys(PROBLEMS_SCHEMA.names)
                | {
                    "problem_id": n,
                    "dataset": f"d{n % case.datasets}",
                    "source_key": str(n),
                    "prompt": random.bytes(case.prompt_bytes // 2).hex()
                    if case.one_group
                    else f"{n} ".ljust(case.prompt_bytes, "x"),
                }
                for n in numbers
            ]
            problems.write_table(pa.Table.from_pylist(rows, schema=PROBLEMS_SCHEMA), row_group_size=len(rows))
    write_manifest(path)
    assert Trace.open(path).faults(verify=True) == []
    return path


def tokens_of(case: Case, at_once: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Problem ids and positions of the tokens, at most `at_once` tokens at a time."""
    for start in range(0, case.problems * case.tokens, at_once):
        token = np.arange(start, min(start + at_once, case.problems * case.tokens))
        yield (token // case.tokens).astype(np.int32), (token % case.tokens).astype(np.int32)


def random_routes(random: np.random.Generator, case: Case, tokens: int) -> dict[str, np.ndarray]:
    """K different experts, in steps of 1 to E / K from a random one, with descending weights."""
    shape = (tokens, case.layers, case.top_k)
    steps_TLK = random.integers(1, max(2, case.experts // case.top_k + 1), size=shape).cumsum(-1)
    ids_TLK = (steps_TLK + random.integers(case.experts, size=(*shape[:2], 1))) % case.experts
    weights_TLK = np.sort(random.random(shape, dtype=np.float32) / case.top_k)[..., ::-1]
    return {"expert_ids": ids_TLK.astype(expert_dtype(case.experts)), "weights": weights_TLK.astype(np.float16)}


if __name__ == "__main__":
    main()
