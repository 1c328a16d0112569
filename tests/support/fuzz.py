"""Feed mutated files to every reader of traces: anything but a result or a `TraceError` is a defect.

    python tests/support/fuzz.py [READER ...] [--inputs 10000] [--seed 0]

Prints a line per reader with what became of the inputs, seconds, and the peak of memory; ends with 1 if an input made a reader
raise something else, run for more than ten seconds, or take more than 1 GiB. That input is kept in the folder that is named.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from profiler.capture.requests import (
    COMPLETIONS_FILE,
    PLANNED_FILE,
    REQUESTS_FILE,
    CapturedRequest,
    CompletedProblem,
    PlannedProblem,
)
from profiler.capture.sealing import run_folder, seal
from profiler.errors import TraceError
from profiler.importers import import_trace
from profiler.trace.jsonl import write_jsonl
from profiler.trace.reader import Trace
from profiler.trace.schema import PROBLEMS_SCHEMA, TOKENS_SCHEMA, Metadata, ModelMetadata
from profiler.trace.stream import ROUTING_STREAM, RoutingWriter, gather, read_index
from profiler.trace.untrusted.parquet_files import stream_table
from profiler.trace.writer import write_manifest, write_metadata

MAX_SECONDS = 10
MAX_BYTES = 1 << 30
MODEL = ModelMetadata(id="made", moe_layers=[0, 1, 3], num_experts=8, top_k=2)
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


def random_routing(tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Expert ids and weights `[T, L, K]`."""
    source = np.random.default_rng(seed)
    ids = source.random((tokens, 3, 8)).argsort(-1)[..., :2].astype(np.uint8)
    return ids, -np.sort(-source.random((tokens, 3, 2)), axis=-1).astype(np.float16)


def make_trace(folder: Path) -> Path:
    """A complete trace of three problems."""
    write_metadata(folder, Metadata(model=MODEL, engine="none", hook="none"))
    with RoutingWriter(run_folder(folder, 0), MODEL) as writer:
        for problem in range(3):
            writer.add(problem, np.arange(20), *random_routing(20, problem))
    seal(folder, MODEL, dict.fromkeys(range(3), 21))
    tokens = {"problem_id": [0, 1], "token_id": [0, 0], "vocab_id": [5, None], "phase": ["prefill", "decode"]}
    pq.write_table(pa.Table.from_pydict(tokens).cast(TOKENS_SCHEMA), folder / "tokens.parquet")
    problems = {
        "problem_id": [0, 1, 2],
        **{name: ["a", "b", "c"] for name in ("dataset", "source_key", "prompt", "output", "finish_reason")},
        **{name: [1, 2, 3] for name in ("prompt_tokens", "output_tokens", "truncated_tokens", "cached_tokens")},
    }
    pq.write_table(pa.table(problems), folder / "problems.parquet")
    write_manifest(folder)
    return folder


def part_of_trace(name: str, *parts: Callable[[Trace], object]) -> Reader:
    """A trace in which the file `name` is mutated; completeness, which would tell at once, is not asked for."""

    def read(source: Path, _: Path) -> None:
        folder = source.parent.parent if source.parent.name == "routing" else source.parent
        trace = Trace.open(folder, allow_incomplete=True)
        for part in parts:
            part(trace)

    return Reader(lambda folder: make_trace(folder) / name, read)


def streamed(name: str, schema: pa.Schema) -> Reader:
    """A table that is read some rows at a time, from its beginning and from a problem on."""

    def read(trace: Trace) -> None:
        for from_problem in (0, 1):
            for _ in stream_table(trace.path / name, schema, 7, from_problem):
                pass

    return part_of_trace(name, read)


def make_capture(folder: Path) -> Path:
    write_metadata(folder, Metadata(model=MODEL, engine="none", hook="none"))
    run = run_folder(folder, 0)
    with RoutingWriter(run, MODEL) as writer:
        for number in range(3):
            writer.add(number, np.arange(5), *random_routing(5, number))
    requests = [CapturedRequest(n, f"problem-{n}", n, [1, 2, 3], 0).to_json() for n in range(3)]
    (run / REQUESTS_FILE).write_text("".join(line + "\n" for line in requests))
    planned = [
        PlannedProblem(
            problem_id=n, dataset="d", source_key="s", prompt="p", prompt_token_ids=[1, 2, 3], truncated_tokens=0
        ).to_json()
        for n in range(3)
    ]
    (run / PLANNED_FILE).write_text("".join(line + "\n" for line in planned))
    completions = [
        CompletedProblem(problem_id=n, output="o", output_token_ids=[4, 5, 6], cached_tokens=0, finish_reason="stop").to_json()
        for n in range(2)
    ]
    (run / COMPLETIONS_FILE).write_text("".join(line + "\n" for line in completions))
    return folder


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


def make_json_rows(folder: Path) -> Path:
    write_jsonl(Trace.open(make_trace(_new(folder / "trace"))), folder / "rows.jsonl")
    return _head(folder / "rows.jsonl", 60)


def make_old_rows(folder: Path) -> Path:
    ids, _ = random_routing(6)
    row = '{{"dataset": "gsm8k", "problem_id": 0, "layer": {}, "token_idx": {}, "experts": {}, "gating_probs": [0.8, 0.2]}}\n'
    lines = [row.format(layer, token, ids[token, layer].tolist()) for token in range(6) for layer in range(3)]
    return _text(folder / "old.jsonl", "".join(lines))


def make_route_log(folder: Path) -> Path:
    ids, _ = random_routing(6)
    row = '{{"type": "route", "req_id": "r1", "token_idx": {}, "layer": {}, "topk_ids": {}, "topk_weights": [0.7, 0.3]}}\n'
    lines = [row.format(token % 3, layer, ids[token, layer].tolist()) for token in range(6) for layer in range(2)]
    return _text(folder / "log.jsonl", '{"type": "meta", "model_id": "m", "top_k": 2, "num_experts": 8}\n' + "".join(lines))


def make_olmoe(folder: Path) -> Path:
    line = '{{"input_ids": [1, 2, 3, 4], "exp_ids": {}}}\n'
    return _text(
        folder / "olmoe.jsonl", "".join(line.format(random_routing(4, n)[0].transpose(0, 2, 1).tolist()) for n in range(3))
    )


def make_moe_beyond(folder: Path) -> Path:
    ids, _ = random_routing(6)
    lines = [f'{layer},0,"t,{token}","{ids[token, layer].tolist()}"\r\n' for layer in range(3) for token in range(6)]
    return _text(folder / "prompt_1_data.csv", "Layer ID,Batch Number,Token,Activated Expert IDs\r\n" + "".join(lines))


def make_edge_csv(folder: Path) -> Path:
    ids, weights = random_routing(6)
    lines = [
        f"0,{int(token > 2)},{token},{layer},{slot},{ids[token, layer, slot]},{weights[token, layer, slot]},0,100,0\n"
        for token in range(6)
        for layer in range(3)
        for slot in range(2)
    ]
    head = "# route_trace v1\n# model=m n_expert=8\nturn,phase,step,layer,slot,expert,weight,residency,expert_bytes,dropped\n"
    return _text(folder / "edge.csv", head + "".join(lines))


def make_parquet(folder: Path) -> Path:
    trace = make_trace(_new(folder / "trace"))
    shutil.copyfile(trace / "routing" / "part-00000.parquet", folder / "rows.parquet")
    return folder / "rows.parquet"


def make_flame(folder: Path) -> Path:
    ids, weights = random_routing(50)
    columns = {
        "scores": pa.array(weights[:, 0].tolist(), pa.list_(pa.float16())),
        "indices": pa.array(ids[:, 0].tolist(), pa.list_(pa.int16())),
    }
    pq.write_table(pa.table(columns), folder / "layer_02.parquet")
    return folder / "layer_02.parquet"


def make_npy(folder: Path) -> Path:
    np.save(folder / "routes.npy", random_routing(20)[0].astype(np.int16))
    return folder / "routes.npy"


def make_npz(folder: Path) -> Path:
    np.savez_compressed(folder / "routes.npz", a=random_routing(20)[0], b=random_routing(9, 1)[0])
    return folder / "routes.npz"


def make_sglang(folder: Path) -> Path:
    import torch

    torch.set_num_threads(1)
    records = [
        {
            "forward_pass_id": number,
            "input_ids": list(range(5)),
            "positions": list(range(5)),
            "extend_seq_lens": [3, 2],
            "forward_mode": 1,
            "topk_ids_of_layer": torch.from_numpy(random_routing(5, number)[0].transpose(1, 0, 2).astype(np.int32)),
        }
        for number in range(2)
    ]
    mapping = torch.arange(8).repeat(3, 1)
    torch.save({"records": records, "last_physical_to_logical_map": mapping}, folder / "dump.pt")
    return folder / "dump.pt"


def make_slime(folder: Path) -> Path:
    import torch

    torch.set_num_threads(1)
    arrays: list[Any] = [random_routing(5)[0].astype(np.int32), torch.from_numpy(random_routing(4, 1)[0].astype(np.int32))]
    samples = [
        {
            "prompt": f"p{n}",
            "tokens": list(range(len(array) + 1)),
            "response": "r",
            "response_length": 2,
            "rollout_routed_experts": array,
            "status": "completed",
        }
        for n, array in enumerate(arrays)
    ]
    torch.save({"rollout_id": 3, "metadata": {}, "samples": samples}, folder / "rollout_3.pt")
    return folder / "rollout_3.pt"


def packed(value: object) -> bytes:
    """A value as MessagePack, with the widest encoding of each type."""
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return struct.pack(">Bq", 0xD3, value)
    if isinstance(value, float):
        return struct.pack(">Bd", 0xCB, value)
    if isinstance(value, bytes):
        return struct.pack(">BI", 0xC6, len(value)) + value
    if isinstance(value, str):
        return struct.pack(">BI", 0xDB, len(value.encode())) + value.encode()
    if isinstance(value, list):
        return struct.pack(">BI", 0xDD, len(value)) + b"".join(map(packed, value))
    return b"\xc0"


def make_prime_rl(folder: Path) -> Path:
    ids = random_routing(6)[0].astype(np.int16)
    routes = [ids.tobytes(), list(ids.shape), "int16"]
    sample = [list(range(6)), [False] * 3 + [True] * 3, [0.5] * 6, [1.0] * 6, "env", None, routes]
    # Small lengths in one byte each, as the tool writes them.
    data = (
        packed([[sample], 3, None]).replace(struct.pack(">BI", 0xDD, 3), b"\x93").replace(struct.pack(">BI", 0xDD, 1), b"\x91")
    )
    (folder / "rollouts.bin").write_bytes(data.replace(struct.pack(">BI", 0xDD, 7), b"\x97"))
    return folder / "rollouts.bin"


def in_base64(array: np.ndarray) -> str:
    """An array as vLLM's server sends it: base64 of `.npy`."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def make_sglang_responses(folder: Path) -> Path:
    responses = [
        {
            "text": "So.",
            "output_ids": [4, 5],
            "meta_info": {
                "prompt_tokens": 9,
                "completion_tokens": 2,
                "finish_reason": {"type": "stop"},
                "routed_experts": base64.b64encode(random_routing(10, n)[0].astype("<i4").tobytes()).decode(),
            },
        }
        for n in range(2)
    ]
    return _text(folder / "responses.jsonl", "".join(json.dumps(response) + "\n" for response in responses))


def make_vllm_responses(folder: Path) -> Path:
    ids, weights = random_routing(6)
    choice = {
        "message": {"content": "So."},
        "token_ids": [4, 5],
        "routed_experts": in_base64(ids),
        "routed_expert_weights": in_base64(weights),
    }
    response = {"model": "m", "choices": [choice], "prompt_token_ids": [1, 2, 3, 4, 5], "usage": {"prompt_tokens": 5}}
    return _text(folder / "response.json", json.dumps(response, indent=1))


def make_lattice(folder: Path) -> Path:
    ids, _ = random_routing(6)
    line = '{{"layer_idx": {}, "token_idx": {}, "selected_ids": {}, "gate_weights": [0.7, 0.3]}}\n'
    lines = [line.format(layer, token, ids[token, layer].tolist()) for token in range(6) for layer in range(3)]
    return _text(folder / "lattice.jsonl", "".join(lines))


def make_colibri(folder: Path) -> Path:
    ids, _ = random_routing(6)
    passes = [range(4), [4], [5]]
    lines = [
        f"{3 * number + layer} {row} {layer} {ids[token, layer, 0]}:0.{7000 + token} {ids[token, layer, 1]}:0.3000\n"
        for number, tokens in enumerate(passes)
        for layer in range(3)
        for row, token in enumerate(tokens)
    ]
    return _text(folder / "route.txt", "".join(lines))


def make_llama_cpp(folder: Path) -> Path:
    # A prompt of four tokens, of which the last layer has only the last; then two generated tokens.
    ids, _ = random_routing(6)
    ids[1, 0] = ids[0, 0]  # adjacent tokens with common experts: no ranking of all experts
    blocks = [(layer, tokens) for tokens in (range(4), [4], [5]) for layer in range(3)]
    blocks[2] = (2, [3])
    lines = [f"{layer},{expert}\n" for layer, tokens in blocks for token in tokens for expert in ids[token, layer].tolist()]
    return _text(folder / "moe_trace.csv", "".join(lines))


def make_megatron(folder: Path) -> Path:
    line = (
        '{{"step": {}, "stage": "pre_dispatch", "block": "decoder", "layer": {}, "rank": 0, "num_tokens": 4, "topk": 2, '
        '"top_indices": {}}}\n'
    )
    lines = [line.format(step, layer, random_routing(4, step)[0][:, layer].tolist()) for step in range(3) for layer in range(3)]
    return _text(folder / "router_trace_rank0.jsonl", "".join(lines))


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
    "capture": Reader(lambda folder: run_folder(make_capture(folder), 0) / ROUTING_STREAM, read_stream),
    "completions": Reader(lambda folder: run_folder(make_capture(folder), 0) / COMPLETIONS_FILE, read_capture),
    "planned": Reader(lambda folder: run_folder(make_capture(folder), 0) / PLANNED_FILE, read_capture),
    "requests": Reader(lambda folder: run_folder(make_capture(folder), 0) / REQUESTS_FILE, read_capture),
    "jsonl": imported(make_json_rows, "jsonl"),
    "old-jsonl": imported(make_old_rows, "jsonl"),
    "route-log": imported(make_route_log, "route-log"),
    "olmoe": imported(make_olmoe, "olmoe"),
    "moe-beyond": imported(make_moe_beyond, "moe-beyond"),
    "edge-csv": imported(make_edge_csv, "edge-csv"),
    "parquet": imported(make_parquet, "parquet"),
    "flame-moe": imported(make_flame, "flame-moe"),
    "npy": imported(make_npy, "routed-experts"),
    "npz": imported(make_npz, "routed-experts"),
    "sglang": imported(make_sglang, "sglang"),
    "slime": imported(make_slime, "slime"),
    "prime-rl": imported(make_prime_rl, "prime-rl"),
    "sglang-responses": imported(make_sglang_responses, "server-responses"),
    "vllm-responses": imported(make_vllm_responses, "server-responses"),
    "lattice": imported(make_lattice, "lattice"),
    "colibri": imported(make_colibri, "colibri"),
    "llama-cpp": imported(make_llama_cpp, "llama-cpp"),
    "megatron": imported(make_megatron, "megatron"),
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
    """The most memory that this process had. Where it can be told, not getrusage's peak, which begins with the parent's."""
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
        source = reader.make(_new(folder / "source"))
        sound = source.read_bytes()
        reader.read(source, folder / "sound")
        signal.signal(signal.SIGALRM, _too_slow)
        for number in range(inputs):
            # Each input has its own seed, so that one can be made again without those before it.
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


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _text(path: Path, text: str) -> Path:
    path.write_text(text, newline="")
    return path


def _head(path: Path, lines: int) -> Path:
    return _text(path, "".join(path.read_text().splitlines(keepends=True)[:lines]))


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
