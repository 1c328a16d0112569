"""Loading and running take the memory that was requested, however large the experts are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from profiler.models.resolve import demo_model_folder
from speculation.runtime.storage.integer_groups import PIECE

WIDTH, LAYERS = 16384, 4
# 4 layers of 8 experts of 12.6 MB.
EXPERT_BYTES = 3 * 128 * WIDTH * 2

RUN = """
import gc, sys, torch
from speculation.runtime import CacheSize, OffloadedModel
from speculation.runtime.memory import peak_memory
torch.set_num_threads(1)
OffloadedModel.load("demo", CacheSize(fraction=0.25), store="disk", device="cpu").close()
before = peak_memory()
for options in ({"store": "disk", "direct": True}, {"store": "ram", "expert_bits": 4}):
    with OffloadedModel.load(sys.argv[1], CacheSize(fraction=0.25), device="cpu", **options) as offloaded:
        offloaded.generate([[17, 301, 44, 45]], max_new_tokens=4, ignore_eos=True)
        print(offloaded.cache_bytes, offloaded.expert_bytes, peak_memory() - before)
    del offloaded
    gc.collect()
"""


def test_a_model_takes_the_memory_of_its_cache(tmp_path: Path) -> None:
    """Of 403 MB of experts, a quarter and two buffers are in memory; with the rest, it would be four times as much.

    With all experts in memory in 4 bits, there is one unpacked expert at a time.
    """
    source = demo_model_folder()
    config = json.loads((source / "config.json").read_text()) | {"intermediate_size": WIDTH, "num_hidden_layers": LAYERS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = {"vocab_size": config["vocab_size"], "hidden": config["hidden_size"]}
    tensors = {
        "model.embed_tokens.weight": torch.randn(shape["vocab_size"], shape["hidden"]),
        "lm_head.weight": torch.randn(shape["vocab_size"], shape["hidden"]),
        "model.norm.weight": torch.ones(shape["hidden"]),
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        sizes = {"q_proj": (128, 128), "k_proj": (64, 128), "v_proj": (64, 128), "o_proj": (128, 128)}
        tensors |= {f"{name}.self_attn.{part}.weight": torch.randn(size) / 12 for part, size in sizes.items()}
        tensors |= {f"{name}.{part}.weight": torch.ones(128) for part in ("input_layernorm", "post_attention_layernorm")}
        tensors[f"{name}.block_sparse_moe.gate.weight"] = torch.randn(8, 128)
        for expert in range(8):
            for part, size in (("w1", (WIDTH, 128)), ("w3", (WIDTH, 128)), ("w2", (128, WIDTH))):
                tensors[f"{name}.block_sparse_moe.experts.{expert}.{part}.weight"] = torch.zeros(size, dtype=torch.bfloat16)
    save_file({key: value.to(torch.bfloat16) for key, value in tensors.items()}, tmp_path / "model.safetensors")
    del tensors
    done = subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], capture_output=True, text=True, check=True, timeout=300)
    plain_line, packed_line = done.stdout.splitlines()
    cache, experts, grown = map(int, plain_line.split())
    packed_cache, packed, packed_grown = map(int, packed_line.split())
    assert experts == LAYERS * 8 * EXPERT_BYTES
    assert cache == (LAYERS * 2 + 2) * EXPERT_BYTES
    # What was loaded before has warmed up everything but the cache, and 30 MB of attention weights and activations.
    assert grown < cache + 60e6 < experts / 2
    assert packed == pytest.approx(experts * 4.5 / 16, rel=1e-3)
    # Unpacking takes an expert, and in between a piece of a matrix, of a byte for each number.
    assert packed_cache == packed // 4 + 2 * packed // (LAYERS * 8) + EXPERT_BYTES + PIECE
    # One expert is read and packed at a time, another one is unpacked and computed.
    assert packed_grown < packed + packed_cache + EXPERT_BYTES + 60e6 < experts * 0.7
