"""Run DeepSeek-MoE v1 (model type `deepseek`), which transformers supports only with code from the model's repository.

vLLM implements the model but not its configuration. `register_config` adds a configuration class, so that no untrusted code is
run. For transformers, `as_qwen2_moe` converts a checkpoint to Qwen2-MoE, which computes the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from profiler.errors import ModelError, first_line
from profiler.models.registry import checkpoints_folder
from profiler.trace.writer import write_text

MODEL_TYPE = "deepseek"
# Copied next to the weights.
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "generation_config.json", "*.model")
INDEX_FILE = "model.safetensors.index.json"


def register_config() -> None:
    """Let `AutoConfig` read the configuration as plain data. Idempotent."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from profiler.models.deepseek_config import DeepseekConfig

    if MODEL_TYPE not in CONFIG_MAPPING:
        AutoConfig.register(MODEL_TYPE, DeepseekConfig)


def local_rewriting(location: str, revision: str | None, name: str, *, say: Callable[[str], None]) -> Path:
    """The folder of a checkpoint converted to Qwen2-MoE; the conversion runs only once.

    location: a folder, or a hub id, which is downloaded. say: is called with lines about the progress. Raises `ModelError` if
    the checkpoint cannot be downloaded or converted.
    """
    from huggingface_hub import snapshot_download

    target = checkpoints_folder() / f"{name}-as-qwen2-moe"
    if not target.is_dir():
        try:
            source = location if Path(location).is_dir() else snapshot_download(location, revision=revision)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot download {location}: {first_line(error)}") from error
        as_qwen2_moe(Path(source), target, say=say)
    return target


def as_qwen2_moe(source: Path, target: Path, *, say: Callable[[str], None] = lambda text: None) -> None:
    """Convert the checkpoint folder `source` to Qwen2-MoE and write it to `target`. Memory: one file of weights.

    The shared experts become Qwen's single shared expert. Its gate gets zero weights, whose sigmoid is exactly 0.5, and its
    output projection is doubled, which is exact too. The first layers are dense in both. Raises `ModelError` if the checkpoint
    is not of DeepSeek-MoE v1, or has features that Qwen2-MoE lacks.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != MODEL_TYPE or config.get("scoring_func", "softmax") != "softmax":
        raise ModelError(f"{source} is not a DeepSeek-MoE v1 checkpoint: model type {config.get('model_type')!r}")
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{source} has no *.safetensors files")
    building = target.with_name(target.name + ".part")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    index: dict[str, str] = {}
    for number, path in enumerate(files, 1):
        say(f"rewriting {path.name} ({number} of {len(files)})")
        try:
            with safe_open(path, framework="pt") as weights:
                tensors = dict(_renamed((name, weights.get_tensor(name)) for name in weights.keys()))  # noqa: SIM118 - not a mapping
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"{path} is not readable: {first_line(error)}") from error
        save_file(tensors, building / path.name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, path.name)
    write_text(building / INDEX_FILE, json.dumps({"metadata": {}, "weight_map": index}, indent=1) + "\n")
    write_text(building / "config.json", json.dumps(_qwen2_config(config), indent=1) + "\n")
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, building / path.name)
    building.rename(target)


def _renamed(tensors: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    import torch

    for name, tensor in tensors:
        layer, _, part = name.partition(".mlp.shared_experts.")
        if part:
            yield f"{layer}.mlp.shared_expert.{part}", (tensor * 2 if part == "down_proj.weight" else tensor).contiguous()
            if part == "down_proj.weight":
                yield f"{layer}.mlp.shared_expert_gate.weight", torch.zeros(1, tensor.shape[0], dtype=tensor.dtype)
            continue
        yield name, tensor.contiguous()
        for projection in ("q_proj", "k_proj", "v_proj"):
            if name.endswith(f".self_attn.{projection}.weight"):
                # Qwen2-MoE always has these biases.
                yield name.removesuffix("weight") + "bias", torch.zeros(tensor.shape[0], dtype=tensor.dtype)


def _qwen2_config(config: dict[str, Any]) -> dict[str, Any]:
    same = (
        *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "hidden_act"),
        *("num_attention_heads", "num_key_value_heads", "num_experts_per_tok", "max_position_embeddings", "rms_norm_eps"),
        *(
            "rope_theta",
            "rope_scaling",
            "tie_word_embeddings",
            "bos_token_id",
            "eos_token_id",
            "torch_dtype",
            "initializer_range",
        ),
    )
    if config.get("moe_layer_freq", 1) != 1 or config.get("attention_bias"):
        raise ModelError("a DeepSeek-MoE with interleaved dense layers or attention biases cannot be converted to Qwen2-MoE")
    return {name: config[name] for name in same if name in config} | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": config["n_routed_experts"],
        "shared_expert_intermediate_size": config["n_shared_experts"] * config["moe_intermediate_size"],
        "norm_topk_prob": config.get("norm_topk_prob", False),
        "mlp_only_layers": list(range(config.get("first_k_dense_replace", 0))),
        "decoder_sparse_step": 1,
        "qkv_bias": True,
        "use_sliding_window": False,
    }
