"""Write speed, read speed and size of traces, compared in one run with a logger that writes one `json.dumps` per row.

    python -m benchmarks.trace_io [--trace DIR ...] [--tokens 100000] [--encodings] [--rows 100000000]

Synthetic routing is Mixtral-shaped (32 layers, 8 experts, top-2), uniform and independent: the worst case for compression.
--trace adds real traces. --encodings: size and speed of other encodings of the rows. --rows: how time and memory grow up to
this many synthetic rows (100 million take 2 GB of disk).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from profiler.capture.sealing import run_folder, seal
from profiler.trace.jsonl import write_jsonl
from profiler.trace.reader import Trace
from profiler.trace.schema import Metadata, ModelMetadata
from profiler.trace.stream import RoutingWriter
from profiler.trace.writer import write_manifest, write_metadata

MIXTRAL = ModelMetadata(id="synthetic", moe_layers=list(range(32)), num_experts=8, top_k=2)
TOKENS_PER_PROBLEM = 500
# The plain logger is timed on this many rows. Its cost per row does not depend on the number of rows.
LOGGER_ROWS = 100_000
REPEATS = 3
# The number of blocks that are generated before the clock starts and then reused in turn. Together they are larger than a row
# group, so that compression finds no repeats.
SYNTHETIC_BLOCKS = 64


Block = tuple[int, np.ndarray, np.ndarray, np.ndarray]
"""Problem, positions `[T]`, expert ids and weights `[T, L, K]`."""


@dataclass(frozen=True)
class Data:
    """Blocks of routing, and their model."""

    name: str
    model: ModelMetadata
    blocks: list[Block]

    @property
    def rows(self) -> int:
        return sum(len(block[1]) for block in self.blocks) * len(self.model.moe_layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, action="append", default=[], help="a trace directory; may be repeated")
    parser.add_argument("--tokens", type=int, default=100_000, help="number of synthetic tokens")
    parser.add_argument("--encodings", action="store_true")
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--child", nargs=3, metavar=("WORK", "ROWS", "DIR"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], int(arguments.child[1]), Path(arguments.child[2]))
        return
    # The comparison is on one core; pyarrow would use more.
    pa.set_cpu_count(1)
    data = [Data("synthetic, K = 2", MIXTRAL, list(synthetic_blocks(max(1, arguments.tokens // TOKENS_PER_PROBLEM))))]
    data += [real_data(path) for path in arguments.trace]
    for each in data:
        compare(each)
    if arguments.encodings:
        for each in data:
            compare_encodings(each)
    if arguments.rows:
        grow(arguments.rows)


def compare(data: Data) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # The best of three of each measurement, because other programs on the machine disturb single ones.
        directories = [Path(folder) / f"trace-{attempt}" for attempt in range(REPEATS)]
        write = min(timed(partial(write_trace, path, data.model, iter(data.blocks))) for path in directories)
        trace = Trace.open(directories[0])
        read = min(timed(lambda: sum(len(chunk) for chunk in trace.chunks())) for _ in range(REPEATS))
        scan = min(timed(lambda: scan_groups(trace)) for _ in range(REPEATS))
        log = Path(folder) / "log.jsonl"
        logged, logger = min((write_log(log, data) for _ in range(REPEATS)), key=lambda pair: pair[1])
        lines = Path(folder) / "lines.jsonl"
        write_jsonl(trace, lines)
        rows, size = data.rows, sum(path.stat().st_size for path in trace.routing_files)
        log_rate, line_bytes, log_bytes = logged / logger, lines.stat().st_size / rows, log.stat().st_size / logged
        ids_bytes, weights_bytes = entropy_bytes(data)
        print(f"{data.name}: {rows:,} rows, {sys.platform}, one core")
        print(f"  capture and seal     {rows / write / 1e6:7.2f} M rows/s  {rows / write / log_rate:6.1f} x the logger")
        print(f"  read, check, arrays  {rows / read / 1e6:7.2f} M rows/s  {read / scan:6.2f} x the time of pyarrow alone")
        print(f"  json.dumps logger    {log_rate / 1e6:7.2f} M rows/s")
        print(f"  size                 {size / rows:7.2f} bytes/row   1/{line_bytes / (size / rows):.1f} of our JSON lines,")
        print(f"                               1/{log_bytes / (size / rows):.1f} of the logger's (float64 text)")
        both = ids_bytes + weights_bytes
        print(f"  entropy              {both:7.2f} bytes/row   ids {ids_bytes:.2f}, weights {weights_bytes:.2f}")


def scan_groups(trace: Trace) -> None:
    """Decode every row group and discard the result."""
    for path in trace.routing_files:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                file.read_row_group(group)


def synthetic_blocks(problems: int) -> Iterator[Block]:
    random = np.random.default_rng(0)
    routing = []
    for _ in range(min(problems, SYNTHETIC_BLOCKS)):
        shape = (TOKENS_PER_PROBLEM, len(MIXTRAL.moe_layers))
        ids = random.random((*shape, MIXTRAL.num_experts), dtype=np.float32).argsort(-1)[:, :, : MIXTRAL.top_k]
        routing.append((ids.astype(np.int16), random.dirichlet(np.ones(MIXTRAL.top_k), size=shape).astype(np.float32)))
    positions = np.arange(TOKENS_PER_PROBLEM)
    for problem in range(problems):
        yield problem, positions, *routing[problem % len(routing)]


def real_data(path: Path) -> Data:
    trace = Trace.open(path)
    blocks = []
    for chunk in trace.chunks():
        assert chunk.weights_TLK is not None
        starts = np.flatnonzero(np.diff(chunk.problem_ids_T, prepend=-1))
        for first, end in zip(starts.tolist(), [*starts[1:].tolist(), len(chunk)], strict=True):
            part = chunk.take(slice(first, end))
            assert part.weights_TLK is not None
            # The types in which an engine delivers them: int16 ids, float32 weights.
            ids, weights = part.expert_ids_TLK.astype(np.int16), part.weights_TLK.astype(np.float32)
            blocks.append((int(part.problem_ids_T[0]), part.token_ids_T, ids, weights))
    return Data(f"{path.name}, K = {trace.metadata.model.top_k}", trace.metadata.model, blocks)


def write_trace(directory: Path, model: ModelMetadata, blocks: Iterator[Block]) -> None:
    """Write a trace as `specmoe collect` does: capture problems in the order in which they finish, seal, hash."""
    directory.mkdir()
    write_metadata(directory, Metadata(model=model, engine="none", hook="none"))
    tokens = {}
    with RoutingWriter(run_folder(directory, 0), model) as writer:
        for problem, positions, ids, weights in blocks:
            writer.add(problem, positions, ids, weights)
            tokens[problem] = int(positions[-1]) + 2
    seal(directory, model, tokens)
    write_manifest(directory)


def write_log(path: Path, data: Data) -> tuple[int, float]:
    """Write one JSON line per row, as published patches do. Returns rows and seconds."""
    rows = 0
    began = time.perf_counter()
    with path.open("w", encoding="utf-8") as file:
        for problem, positions, ids, weights in data.blocks:
            for position, ids_LK, weights_LK in zip(positions.tolist(), ids.tolist(), weights.tolist(), strict=True):
                for layer, ids_K, weights_K in zip(data.model.moe_layers, ids_LK, weights_LK, strict=True):
                    row = {"problem_id": problem, "layer": layer, "token_id": position}
                    file.write(json.dumps({**row, "expert_ids": ids_K, "weights": weights_K}) + "\n")
                rows += len(ids_LK)
                if rows >= LOGGER_ROWS:
                    return rows, time.perf_counter() - began
    return rows, time.perf_counter() - began


def entropy_bytes(data: Data) -> tuple[float, float]:
    """Bytes per row of ids and of weights, for an ideal code without context.

    Such a code knows how often each id occurs at each layer and rank, and how often each float16 occurs at each rank, but no
    dependencies between them.
    """
    ids = np.concatenate([block[2] for block in data.blocks])
    bits = np.concatenate([block[3] for block in data.blocks]).astype(np.float16).view(np.uint16)
    _, layers, top_k = ids.shape
    of_ids = np.mean([sum(entropy_bits(ids[:, layer, k]) for k in range(top_k)) for layer in range(layers)])
    return float(of_ids) / 8, sum(entropy_bits(bits[:, :, k]) for k in range(top_k)) / 8


def entropy_bits(values: np.ndarray) -> float:
    shares = np.bincount(values.reshape(-1)) / values.size
    return float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum())


def compare_encodings(data: Data) -> None:
    """Compare encodings, with row groups of the same size; the encoding that traces use comes first."""
    with tempfile.TemporaryDirectory() as folder:
        write_trace(Path(folder) / "trace", data.model, iter(data.blocks))
        table = Trace.open(Path(folder) / "trace").to_arrow().combine_chunks()
        ids, weights = "expert_ids.list.element", "weights.list.element"
        keys = dict.fromkeys(("problem_id", "layer", "token_id"), "DELTA_BINARY_PACKED")
        chosen = {**keys, ids: "BYTE_STREAM_SPLIT", weights: "PLAIN"}
        zstd = {"compression": "zstd", "compression_level": 1, "use_dictionary": False, "column_encoding": chosen}
        variants: list[tuple[str, dict[str, Any]]] = [
            ("chosen: deltas, ids by byte streams, plain weights, zstd 1", zstd),
            ("weights by byte streams too (not for DuckDB)", {**zstd, "column_encoding": {**chosen, weights: chosen[ids]}}),
            ("zstd 3", {**zstd, "compression_level": 3}),
            ("zstd 6", {**zstd, "compression_level": 6}),
            ("lz4", {**zstd, "compression": "lz4", "compression_level": None}),
            ("no compression", {**zstd, "compression": "none", "compression_level": None}),
            ("ids as dictionaries", {**zstd, "column_encoding": {**keys, weights: "PLAIN"}, "use_dictionary": [ids]}),
            ("all as dictionaries", {"compression": "zstd", "compression_level": 1}),
        ]
        print(f"{data.name}: M rows/s written and read, bytes per row, of {table.num_rows:,} rows")
        for name, settings in variants:
            measure_encoding(name, table, Path(folder) / "rows.parquet", settings)
        may_be_null = [
            pa.field(field.name, pa.list_(field.type.value_type, field.type.list_size))
            if pa.types.is_fixed_size_list(field.type)
            else pa.field(field.name, field.type)
            for field in table.schema
        ]
        table = table.cast(pa.schema(may_be_null))
        measure_encoding("the same, with nullable columns", table, Path(folder) / "rows.parquet", variants[-1][1])


def measure_encoding(name: str, table: pa.Table, path: Path, settings: dict[str, Any]) -> None:
    write = min(timed(lambda: pq.write_table(table, path, row_group_size=1 << 17, **settings)) for _ in range(3))
    read = min(timed(lambda: pq.read_table(path, use_threads=False)) for _ in range(3))
    rows = table.num_rows
    print(f"  {name:58} {rows / write / 1e6:6.1f} {rows / read / 1e6:6.1f} {path.stat().st_size / rows:6.2f}")


def grow(most: int) -> None:
    """Measure time and peak memory of writing and of scanning, each in a separate process."""
    with tempfile.TemporaryDirectory() as folder:
        for rows in (most // 10, most // 3, most):
            for work in ("write", "scan"):
                command = [sys.executable, "-m", "benchmarks.trace_io", "--child", work, str(rows), f"{folder}/{rows}"]
                print(subprocess.run(command, check=True, capture_output=True, text=True).stdout, end="", flush=True)
            for path in (Path(folder) / str(rows) / "routing").iterdir():
                path.unlink()


def child(work: str, rows: int, directory: Path) -> None:
    pa.set_cpu_count(1)
    problems = max(1, rows // TOKENS_PER_PROBLEM // len(MIXTRAL.moe_layers))
    rows = problems * TOKENS_PER_PROBLEM * len(MIXTRAL.moe_layers)
    if work == "write":
        seconds = timed(lambda: write_trace(directory, MIXTRAL, synthetic_blocks(problems)))
    else:
        seconds = timed(lambda: sum(len(chunk) for chunk in Trace.open(directory).chunks()))
    # The peak of getrusage would include that of the process that started this one.
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    print(f"{work:6} {rows:>12,} rows: {seconds:6.1f} s, {rows / seconds / 1e6:6.2f} M rows/s, peak {peak:4.0f} MiB")


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
