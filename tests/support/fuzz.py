"""Feed mutated files to every reader of traces: anything but a result or a `TraceError` is a defect.

    PYTHONPATH=tests python -m support.fuzz [READER ...] [--inputs 10000] [--seed 0]

Prints a line per reader with the results, seconds, and the peak of memory. Exits with 1 if an input caused a reader to raise
another error, to run for more than ten seconds, or to take more than 1 GiB; such inputs are saved, and their paths printed.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from profiler.capture.requests import COMPLETIONS_FILE, PLANNED_FILE, REQUESTS_FILE
from profiler.capture.sealing import run_folder
from profiler.errors import TraceError
from profiler.importers import import_trace
from profiler.trace.reader import Trace
from profiler.trace.schema import PROBLEMS_SCHEMA, TOKENS_SCHEMA
from profiler.trace.stream import ROUTING_STREAM, gather, read_index
from profiler.trace.untrusted.parquet_files import stream_table
from support import samples
from support.samples import new_folder

MAX_SECONDS = 10
MAX_BYTES = 1 << 30
# Numbers at the borders of what fields hold.
WORDS = [n.to_bytes(size, "little") for size in (1, 2, 4, 8) for n in (0, 1, 127, 128, 255) if n < 256**size] + [
    (2 ** (8 * size) - 1).to_bytes(size, "little") for size in (2, 4, 8)
]
WORDS += [(2**31 - 1).to_bytes(4, "little"), (2**31).to_bytes(4, "little"), (2**63 - 1).to_bytes(8, "little")]
TEXTS = [
    b"-1",
    b"1e999",
    b"99999999999999999999",
    b"NaN",
    b"null",
    b"[]",
    b"{}",
    b'"x"',
    b"[[[[[",
    b"true",
    b"0.5",
    b"\xff",
    b"\n",
    b",",
]


@dataclass(frozen=True)
class Reader:
    """make: write a sound source and return the file that is mutated; read: take the source."""

    make: Callable[[Path], Path]
    read: Callable[[Path, Path], object]


def part_of_trace(name: str, *parts: Callable[[Trace], object]) -> Reader:
    """A trace in which the file `name` is mutated; opened as incomplete, because the manifest would show the change."""

    def read(source: Path, _: Path) -> None:
        folder = source.parent.parent if source.parent.name == "routing" else source.parent
        trace = Trace.open(folder, allow_incomplete=True)
        for part in parts:
            part(trace)

    return Reader(lambda folder: samples.make_trace(folder) / name, read)


def streamed(name: str, schema: pa.Schema) -> Reader:
    """A table that is read some rows at a time, from its beginning and from a problem on."""

    def read(trace: Trace) -> None:
        for from_problem in (0, 1):
            for _ in stream_table(trace.path / name, schema, 7, from_problem):
                pass

    return part_of_trace(name, read)


def read_stream(source: Path, _: Path) -> None:
    index = read_index(source)
    if index is not None:
        tokens = np.arange(len(index.token_ids_N))
        shape = (len(tokens), len(index.layout.layers))
        gather(
            index, tokens, {name: np.empty((*shape, width), kind) for name, (kind, width) in index.layout.types.items()}, tokens
        )


def read_capture(source: Path, out: Path) -> None:
    import_trace(source.parent.parent.parent, out, format_name="interrupted")


def imported(make: Callable[[Path], Path], name: str) -> Reader:
    return Reader(make, lambda source, out: import_trace(source, out, format_name=name))


READERS = {
    "metadata": part_of_trace("metadata.json", lambda trace: trace.load()),
    "manifest": part_of_trace("manifest.json", lambda trace: trace.faults(verify=True)),
    "routing": part_of_trace("routing/part-00000.parquet", lambda trace: trace.arrays(1), lambda trace: list(trace.chunks())),
    "tokens": part_of_trace("tokens.parquet", lambda trace: trace.tokens),
    "problems": part_of_trace("problems.parquet", lambda trace: trace.problems),
    "tokens-streamed": streamed("tokens.parquet", TOKENS_SCHEMA),
    "problems-streamed": streamed("problems.parquet", PROBLEMS_SCHEMA),
    "capture": Reader(lambda folder: run_folder(samples.make_capture(folder), 0) / ROUTING_STREAM, read_stream),
    "completions": Reader(lambda folder: run_folder(samples.make_capture(folder), 0) / COMPLETIONS_FILE, read_capture),
    "planned": Reader(lambda folder: run_folder(samples.make_capture(folder), 0) / PLANNED_FILE, read_capture),
    "requests": Reader(lambda folder: run_folder(samples.make_capture(folder), 0) / REQUESTS_FILE, read_capture),
    "jsonl": imported(samples.make_json_rows, "jsonl"),
    "old-jsonl": imported(samples.make_old_rows, "jsonl"),
    "route-log": imported(samples.make_route_log, "route-log"),
    "olmoe": imported(samples.make_olmoe, "olmoe"),
    "moe-beyond": imported(samples.make_moe_beyond, "moe-beyond"),
    "edge-csv": imported(samples.make_edge_csv, "edge-csv"),
    "parquet": imported(samples.make_parquet, "parquet"),
    "flame-moe": imported(samples.make_flame, "flame-moe"),
    "npy": imported(samples.make_npy, "routed-experts"),
    "npz": imported(samples.make_npz, "routed-experts"),
    "sglang": imported(samples.make_sglang, "sglang"),
    "slime": imported(samples.make_slime, "slime"),
    "prime-rl": imported(samples.make_prime_rl, "prime-rl"),
    "sglang-responses": imported(samples.make_sglang_responses, "server-responses"),
    "vllm-responses": imported(samples.make_vllm_responses, "server-responses"),
    "lattice": imported(samples.make_lattice, "lattice"),
    "colibri": imported(samples.make_colibri, "colibri"),
    "llama-cpp": imported(samples.make_llama_cpp, "llama-cpp"),
    "megatron": imported(samples.make_megatron, "megatron"),
}


def mutate(content: bytes, source: random.Random) -> bytes:
    """One to four changes: bits, border numbers, text, pieces cut out, repeated or moved, or the end cut off."""
    data = bytearray(content)
    for _ in range(source.choice((1, 1, 1, 2, 4))):
        at = source.randrange(len(data) + 1)
        size = min(len(data) - at, source.choice((1, 2, 4, 8, 16, 64)))
        kind = source.randrange(8)
        if kind <= 1 and at < len(data):
            data[at] ^= 1 << source.randrange(8)
        elif kind == 2:
            word = source.choice(WORDS)
            data[at : at + len(word)] = word
        elif kind == 3:
            data[at : at + source.randrange(3)] = source.choice(TEXTS)
        elif kind == 4:
            del data[at : at + size]
        elif kind == 5:
            data[at:at] = data[at : at + size]
        elif kind == 6:
            there = source.randrange(len(data) + 1)
            data[there:there] = data[at : at + size]
        elif source.random() < 0.3:
            del data[at:]
    return bytes(data)


def peak_bytes() -> int:
    """The most memory that this process had; from /proc where possible, since getrusage's peak begins with the parent's."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class TooSlowError(Exception):
    """An input took more than its time."""


def fuzz(name: str, inputs: int, seed: int) -> bool:
    """Run one reader; returns whether nothing went wrong."""
    reader = READERS[name]
    outcomes: Counter[str] = Counter()
    began = time.monotonic()
    kept = Path(tempfile.gettempdir()) / "specmoe-fuzz"
    with _scratch() as folder:
        source = reader.make(new_folder(folder / "source"))
        sound = source.read_bytes()
        reader.read(source, folder / "sound")
        signal.signal(signal.SIGALRM, _too_slow)
        for number in range(inputs):
            # Each input has its own seed, so that each can be generated alone.
            content = mutate(sound, random.Random(f"{seed}/{name}/{number}"))
            source.write_bytes(content)
            out = folder / "out"
            signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
            try:
                reader.read(source, out)
                outcomes["read"] += 1
            except TraceError:
                outcomes["refused"] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                outcomes["broke"] += 1
                kept.mkdir(exist_ok=True)
                (kept / f"{name}-{seed}-{number}").write_bytes(content)
                if outcomes["broke"] <= 3:
                    traceback.print_exc()
                    print(f"{name}: input {number} of seed {seed} is {kept / f'{name}-{seed}-{number}'}", file=sys.stderr)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                shutil.rmtree(out, ignore_errors=True)
    peak = peak_bytes()
    seconds = time.monotonic() - began
    counts = ", ".join(f"{outcomes[kind]:,} {kind}" for kind in ("read", "refused", "broke"))
    print(f"{name}: {inputs:,} inputs: {counts}; {seconds:.0f} s, peak {peak / 2**20:.0f} MiB", flush=True)
    return not outcomes["broke"] and peak < MAX_BYTES


def _too_slow(*_: object) -> None:
    raise TooSlowError(f"more than {MAX_SECONDS} s")


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder in memory, where there is one: inputs are small and many."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", choices=[*READERS, []], metavar="READER", help=", ".join(READERS))
    parser.add_argument("--list", action="store_true", help="only print the names of the readers")
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.list:
        print(*READERS)
        return
    pa.set_cpu_count(1)
    sound = [fuzz(name, arguments.inputs, arguments.seed) for name in arguments.readers or READERS]
    sys.exit(0 if all(sound) else 1)


if __name__ == "__main__":
    main()
