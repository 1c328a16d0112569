"""A small sound source of every format that is read: to be mutated, detected, and compared.

Each `make_...` writes a source into a folder that exists, and returns its file (of a trace or a capture, the folder).
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import struct
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
from profiler.trace.jsonl import write_jsonl
from profiler.trace.reader import Trace
from profiler.trace.schema import TOKENS_SCHEMA, Metadata, ModelMetadata
from profiler.trace.stream import RoutingWriter
from profiler.trace.writer import write_manifest, write_metadata

MODEL = ModelMetadata(id="synthetic", moe_layers=[0, 1, 3], num_experts=8, top_k=2)


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


def make_capture(folder: Path) -> Path:
    """An interrupted collection of three problems, the last of which was not completed."""
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


def make_json_rows(folder: Path) -> Path:
    write_jsonl(Trace.open(make_trace(new_folder(folder / "trace"))), folder / "rows.jsonl")
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
    trace = make_trace(new_folder(folder / "trace"))
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


def new_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _text(path: Path, text: str) -> Path:
    path.write_text(text, newline="")
    return path


def _head(path: Path, lines: int) -> Path:
    return _text(path, "".join(path.read_text().splitlines(keepends=True)[:lines]))
