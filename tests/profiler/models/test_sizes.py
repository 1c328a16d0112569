"""Sizes from a config: published parameter counts, and KV caches by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.configs import CONFIGS, DEEPSEEK_V2_LITE, MIXTRAL

from profiler.errors import ModelError
from profiler.models.registry import MODELS
from profiler.models.sizes import entry_of_config, kv_cache_of, precision_of


def write(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_give_what_the_registry_has(name: str, tmp_path: Path) -> None:
    known, read = MODELS[name], entry_of_config(write(tmp_path / name, CONFIGS[name]))
    facts = ("name", "layers", "dense_layers", "experts", "top_k", "renormalized", "hidden")
    assert [getattr(read, fact) for fact in facts] == [getattr(known, fact) for fact in facts]
    assert (read.kv_bytes, read.window, read.window_kv_bytes) == (known.kv_bytes, known.window, known.window_kv_bytes)
    assert next(iter(read.checkpoints)) == next(iter(known.checkpoints))
    assert read.parameters == pytest.approx(known.parameters, abs=0.05)
    # Published active parameters are rounded, and some count the input embeddings.
    assert read.active == pytest.approx(known.active, abs=0.35)
    # gpt-oss's experts have biases, which the registry leaves out.
    assert read.expert_parameters == pytest.approx(known.expert_parameters, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        # Keys and values of 8 heads of 128 in 32 layers, 2 bytes each.
        ("mixtral-8x7b", 131_072),
        # 8 heads of 64 in 24 layers.
        ("gpt-oss-20b", 49_152),
        # The latent vector of 512 and the rotary key of 64 in 27 layers (DeepSeek-V2, section 2.1).
        ("deepseek-v2-lite", 31_104),
        ("qwen3-30b-a3b", 98_304),
    ],
)
def test_kv_cache_of_a_token(name: str, bytes_per_token: int) -> None:
    assert kv_cache_of(CONFIGS[name], MODELS[name].layers)[0] == MODELS[name].kv_bytes == bytes_per_token


def test_kv_cache_of_a_sequence() -> None:
    assert MODELS["mixtral-8x7b"].kv_cache_bytes(4096) == 4096 * 131_072
    assert MODELS["mixtral-8x7b"].kv_cache_bytes(4096, bits=8) == 4096 * 65_536
    assert MODELS["deepseek-v2-lite"].kv_cache_bytes(32_768) == 32_768 * 31_104
    # Half of gpt-oss's layers keep 128 tokens.
    assert MODELS["gpt-oss-20b"].kv_cache_bytes(4096) == 24_576 * (4096 + 128)
    assert MODELS["gpt-oss-20b"].kv_cache_bytes(100) == 49_152 * 100


ATTENTION = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 128}
TOKEN = 2 * 2 * 16 * 2


@pytest.mark.parametrize(
    ("further", "expected"),
    [
        ({}, (4 * TOKEN, None, 0)),
        ({"sliding_window": 32}, (4 * TOKEN, 32, 4 * TOKEN)),
        ({"sliding_window": 32, "use_sliding_window": False}, (4 * TOKEN, None, 0)),
        ({"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 3}, (4 * TOKEN, 32, TOKEN)),
        ({"layer_types": ["linear_attention"] * 3 + ["full_attention"]}, (TOKEN, None, 0)),
        (
            {"layer_types": ["chunked_attention"] * 3 + ["full_attention"], "attention_chunk_size": 64},
            (4 * TOKEN, 64, 3 * TOKEN),
        ),
        ({"layers_block_type": ["mamba", "attention", "mamba", "mamba"]}, (TOKEN, None, 0)),
        ({"head_dim": None, "num_key_value_heads": None}, (4 * 2 * 128 * 2, None, 0)),
        ({"kv_lora_rank": 24, "qk_rope_head_dim": 8}, (4 * 32 * 2, None, 0)),
    ],
)
def test_kinds_of_attention(further: dict[str, Any], expected: tuple[int, int | None, int]) -> None:
    assert kv_cache_of(ATTENTION | further, 4) == expected


def groups(*bits: int) -> dict[str, Any]:
    return {"config_groups": {f"group_{n}": {"weights": {"num_bits": each, "type": "int"}} for n, each in enumerate(bits)}}


@pytest.mark.parametrize(
    ("quantization", "precision"),
    [
        (None, "bf16"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "fp8", "fmt": "e4m3"}, "int8"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "gptq", "bits": 8}, "int8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, "int4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}, "int8"),
        ({"quant_method": "compressed-tensors", **groups(4)}, "int4"),
        ({"quant_method": "compressed-tensors", **groups(8, 8)}, "int8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", **groups(4)}, "int4"),
    ],
)
def test_the_precision_of_a_quantized_checkpoint(quantization: object, precision: str) -> None:
    assert precision_of({"quantization_config": quantization}, Path("config.json")) == precision


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"quant_method": "gptq"}, "quantized by gptq, no number of bits"),
        ({"quant_method": "gptq", "bits": 3}, "quantized by gptq, weights of 3 bits"),
        ({"quant_method": "bitsandbytes"}, "quantized by bitsandbytes, no number"),
        ({"quant_method": "compressed-tensors", **groups(4, 8)}, "weights of 4 and 8 bits"),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": None}}}, "no number of bits"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "quantized by modelopt, no number"),
        ({"quant_method": "new"}, "quantized by new, no number"),
        ({}, "quantized by None, no number"),
        ("awq", "expected an object"),
    ],
)
def test_a_precision_that_is_not_given_is_required(quantization: object, said: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", MIXTRAL | {"quantization_config": quantization})
    with pytest.raises(ModelError, match=rf"{said}.*choose a precision"):
        entry_of_config(folder)


def test_a_named_precision_replaces_the_config_s(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", MIXTRAL | {"quantization_config": {"quant_method": "new"}})
    assert list(entry_of_config(folder, "int8").checkpoints) == ["int8"]


def test_what_is_not_a_config(tmp_path: Path) -> None:
    dense = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}
    unknown = DEEPSEEK_V2_LITE | {"model_type": "of-the-future"}
    for name, config, message in (
        ("dense", dense, "no routed experts"),
        ("unknown", unknown, "the sizes of its experts are unknown"),
        ("list", ["mixtral"], "an object"),
        ("huge", MIXTRAL | {"num_local_experts": 10**9}, "expected at most"),
    ):
        with pytest.raises(ModelError, match=message):
            entry_of_config(write(tmp_path / name, config))  # type: ignore[arg-type] # one is not a config
    (tmp_path / "broken.json").write_text("{")
    for path in (tmp_path / "broken.json", tmp_path / "missing.json"):
        with pytest.raises(ModelError, match=r"expected a model's config\.json"):
            entry_of_config(path)
