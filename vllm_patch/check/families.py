"""Small mixture-of-experts checkpoints with random weights, one for each router family that vLLM serves.

    python -m vllm_patch.check.families FOLDER

vLLM's CPU kernels require head sizes of 32 or 64, and DeepSeek-V2's real attention dimensions. Everything else is small.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

VOCABULARY = 512
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


# Class names that published checkpoints spell differently from transformers.
ARCHITECTURES = {"phimoe": "PhiMoEForCausalLM"}
# Name endings of router weights, and of biases that affect only the selection of experts.
ROUTERS = (".gate.weight", ".router.weight", ".router.layer.weight", ".gate.e_score_correction_bias", ".router.bias")


def mixtral() -> Any:
    config = transformers.MixtralConfig(**SHAPE, num_key_value_heads=2, head_dim=32, num_local_experts=8, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def qwen2_moe() -> Any:
    """Softmax over all experts, not renormalized; with a shared expert."""
    config = transformers.Qwen2MoeConfig(
        **SHAPE,
        num_key_value_heads=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=128,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        use_sliding_window=False,
    )
    return transformers.Qwen2MoeForCausalLM(config)


def qwen3_moe() -> Any:
    """Renormalized softmax. The second layer is dense, so the MoE layers are 0 and 2."""
    config = transformers.Qwen3MoeConfig(
        **SHAPE,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        use_sliding_window=False,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def olmoe() -> Any:
    shape = {**SHAPE, "intermediate_size": 64}
    config = transformers.OlmoeConfig(
        **shape, num_key_value_heads=4, num_experts=16, num_experts_per_tok=4, norm_topk_prob=False
    )
    return transformers.OlmoeForCausalLM(config)


def latent_attention(*, mscale: float) -> dict[str, Any]:
    """DeepSeek's multi-head latent attention, with the dimensions and YaRN positions of the real models."""
    return {
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": mscale,
            "mscale_all_dim": mscale,
            "original_max_position_embeddings": 4096,
        },
    }


def deepseek_v2() -> Any:
    """DeepSeek-V2-Lite: a dense first layer, shared experts, and YaRN positions as in the real model."""
    config = transformers.DeepseekV2Config(
        **SHAPE | {"max_position_embeddings": 16384},
        num_key_value_heads=4,
        moe_intermediate_size=64,
        n_shared_experts=2,
        n_routed_experts=16,
        num_experts_per_tok=4,
        first_k_dense_replace=1,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        **latent_attention(mscale=0.707),
    )
    return transformers.DeepseekV2ForCausalLM(config)


def deepseek_v3() -> Any:
    """Sigmoid scores, a correction bias that affects only the selection, groups of experts, renormalized and scaled weights."""
    config = transformers.DeepseekV3Config(
        **SHAPE | {"max_position_embeddings": 16384},
        num_key_value_heads=4,
        moe_intermediate_size=64,
        n_shared_experts=1,
        n_routed_experts=16,
        num_experts_per_tok=4,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=0,
        # As in the real model's config; only vLLM reads them.
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        **latent_attention(mscale=1.0),
    )
    return transformers.DeepseekV3ForCausalLM(config)


def glm4_moe() -> Any:
    """DeepSeek-V3's router with ordinary attention."""
    config = transformers.Glm4MoeConfig(
        **SHAPE,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=64,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.5,
    )
    return transformers.Glm4MoeForCausalLM(config)


def gpt_oss() -> Any:
    """A router with a bias; softmax over the selected experts only."""
    config = transformers.GptOssConfig(
        **{**SHAPE, "intermediate_size": 128},
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=16,
        num_experts_per_tok=4,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        sliding_window=128,
    )
    return transformers.GptOssForCausalLM(config)


def granitemoe() -> Any:
    """Softmax over the selected experts only; no bias."""
    config = transformers.GraniteMoeConfig(**SHAPE, num_key_value_heads=2, num_local_experts=16, num_experts_per_tok=4)
    return transformers.GraniteMoeForCausalLM(config)


def phimoe() -> Any:
    """Phi-3.5-MoE: two experts, selected by its own kind of router (SparseMixer). vLLM requires the real model's biases."""
    config = transformers.PhimoeConfig(
        **SHAPE, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, attention_bias=True, lm_head_bias=True
    )
    return transformers.PhimoeForCausalLM(config)


def llama4() -> Any:
    """One expert per token. The expert's weight (a sigmoid) multiplies its input."""
    config = transformers.Llama4TextConfig(
        **{**SHAPE, "intermediate_size": 128},
        intermediate_size_mlp=256,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
    )
    return transformers.Llama4ForCausalLM(config)


FAMILIES: dict[str, Callable[[], Any]] = {
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "glm4_moe": glm4_moe,
    "gpt_oss": gpt_oss,
    "granitemoe": granitemoe,
    "phimoe": phimoe,
    "llama4": llama4,
}


def make(name: str, folder: Path) -> Path:
    """Write the checkpoint `name` (one of FAMILIES, or deepseek_v1) to `folder / name` in float32."""
    torch.manual_seed(0)
    target = folder / name
    if name == "deepseek_v1":
        _make_deepseek_v1(target)
    else:
        model = FAMILIES[name]().float().eval()
        with torch.no_grad():
            for module, weight in model.named_parameters():
                # The default initialization (0.02, or zero) makes router logits so similar that rounding decides.
                if module.endswith(ROUTERS):
                    weight.normal_(std=0.2)
        model.save_pretrained(target)
        if name in ARCHITECTURES:
            path = target / "config.json"
            config = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps(config | {"architectures": [ARCHITECTURES[name]]}), encoding="utf-8")
    return target


def _make_deepseek_v1(target: Path) -> None:
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


if __name__ == "__main__":
    for family in (*FAMILIES, "deepseek_v1"):
        print(make(family, Path(sys.argv[1])), flush=True)
