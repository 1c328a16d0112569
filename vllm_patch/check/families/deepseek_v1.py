"""DeepSeek v1, whose class is not in transformers: its checkpoint, and a model of another class with its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from vllm_patch.check.families.shape import SHAPE, VOCABULARY


def make_deepseek_v1(target: Path) -> None:
    """Write a DeepSeek v1 checkpoint: a Llama with experts from layer 1 on. Its class is not in transformers."""
    hidden, experts, expert_size, shared = SHAPE["hidden_size"], 16, 64, 2
    config = {
        **SHAPE,
        "architectures": ["DeepseekForCausalLM"],
        "model_type": "deepseek",
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
        "num_key_value_heads": 4,
        "moe_intermediate_size": expert_size,
        "n_shared_experts": shared,
        "n_routed_experts": experts,
        "num_experts_per_tok": 4,
        "moe_layer_freq": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(config, indent=1))
    (target / "configuration_deepseek.py").write_text(
        'from transformers import PretrainedConfig\n\n\nclass DeepseekConfig(PretrainedConfig):\n    model_type = "deepseek"\n'
    )
    weights = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, hidden) * 0.02,
        "lm_head.weight": torch.randn(VOCABULARY, hidden) * 0.02,
        "model.norm.weight": torch.ones(hidden),
    }

    def mlp(prefix: str, size: int) -> None:
        for name, shape in (("gate_proj", (size, hidden)), ("up_proj", (size, hidden)), ("down_proj", (hidden, size))):
            weights[f"{prefix}.{name}.weight"] = torch.randn(*shape) * 0.02

    for layer in range(SHAPE["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}.{norm}.weight"] = torch.ones(hidden)
        for name in "qkvo":
            weights[f"{prefix}.self_attn.{name}_proj.weight"] = torch.randn(hidden, hidden) * 0.02
        if layer == 0:
            mlp(f"{prefix}.mlp", SHAPE["intermediate_size"])
            continue
        weights[f"{prefix}.mlp.gate.weight"] = torch.randn(experts, hidden) * 0.2
        for expert in range(experts):
            mlp(f"{prefix}.mlp.experts.{expert}", expert_size)
        mlp(f"{prefix}.mlp.shared_experts", expert_size * shared)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def deepseek_v1_oracle(folder: Path) -> Any:
    """A `transformers` model with the weights of the deepseek_v1 checkpoint.

    The classes of later DeepSeek models have a different attention, so this is a Qwen2-MoE model. Its shared expert is gated;
    the gate is forced open.
    """
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    config = transformers.Qwen2MoeConfig(
        **{**SHAPE, "rms_norm_eps": 1e-6},
        num_key_value_heads=4,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=128,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        mlp_only_layers=[0],
        use_sliding_window=False,
        qkv_bias=False,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = transformers.Qwen2MoeForCausalLM(config).float().eval()
    state = model.state_dict()
    for name in state:
        if name in weights:
            state[name] = weights[name]
        elif ".shared_expert." in name:
            state[name] = weights[name.replace(".shared_expert.", ".shared_experts.")]
        elif name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            state[name] = torch.stack(
                [
                    torch.cat([weights[f"{prefix}{e}.gate_proj.weight"], weights[f"{prefix}{e}.up_proj.weight"]])
                    for e in range(16)
                ]
            )
        elif name.endswith("experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            state[name] = torch.stack([weights[f"{prefix}{e}.down_proj.weight"] for e in range(16)])
        elif name.endswith("shared_expert_gate.weight"):
            # The gate is sigmoid(0 . x) = 1/2, so doubling the shared expert's output forces it open.
            state[name] = torch.zeros_like(state[name])
        elif name.endswith("_proj.bias"):
            state[name] = torch.zeros_like(state[name])
        else:
            raise KeyError(name)
    for name in state:
        if name.endswith("shared_expert.down_proj.weight"):
            state[name] = 2 * state[name]
    model.load_state_dict(state)
    return model
