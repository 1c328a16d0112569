"""Families whose routers take a softmax of their logits, before or after the selection of experts."""

from __future__ import annotations

from typing import Any

import transformers

from vllm_patch.check.families.shape import GEMMA4, HEADS, SHAPE, VOCABULARY, latent_attention


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


def granitemoeshared() -> Any:
    """GraniteMoE with a shared expert."""
    config = transformers.GraniteMoeSharedConfig(
        **SHAPE, num_key_value_heads=2, num_local_experts=16, num_experts_per_tok=4, shared_intermediate_size=128
    )
    return transformers.GraniteMoeSharedForCausalLM(config)


def dbrx() -> Any:
    """Other names for everything in the config: `n_layers`, `ffn_config.moe_num_experts`, `ffn_config.moe_top_k`."""
    config = transformers.DbrxConfig(
        d_model=128,
        n_heads=4,
        n_layers=3,
        max_seq_len=1024,
        vocab_size=VOCABULARY,
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 8, "moe_top_k": 4},
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.DbrxForCausalLM(config)


def ernie4_5_moe() -> Any:
    """A correction bias after the softmax that affects only the selection. Its config says `moe_num_experts` and `moe_k`."""
    config = transformers.Ernie4_5_MoeConfig(
        **SHAPE,
        num_key_value_heads=2,
        moe_intermediate_size=64,
        moe_k=4,
        moe_num_experts=16,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
        moe_layer_end_index=2,
        moe_layer_interval=1,
    )
    return transformers.Ernie4_5_MoeForCausalLM(config)


def hunyuan_v1_moe() -> Any:
    """vLLM serves it with transformers' own modules, routers included."""
    config = transformers.HunYuanMoEV1Config(
        **{**SHAPE, "intermediate_size": 64}, **HEADS, num_experts=16, moe_topk=4, num_experts_per_tok=4
    )
    return transformers.HunYuanMoEV1ForCausalLM(config)


def mellum() -> Any:
    """As Qwen3-MoE; vLLM serves it with transformers' own modules."""
    config = transformers.MellumConfig(
        **SHAPE,
        **HEADS,
        moe_intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=4,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        sliding_window=64,
    )
    return transformers.MellumForCausalLM(config)


def flex_olmo() -> Any:
    """As OLMoE; vLLM serves it with transformers' own modules."""
    shape = {**SHAPE, "intermediate_size": 64, "pad_token_id": 0}
    config = transformers.FlexOlmoConfig(**shape, num_key_value_heads=4, num_experts=7, num_experts_per_tok=5)
    return transformers.FlexOlmoForCausalLM(config)


def gemma4() -> Any:
    """A dense MLP and experts side by side; each expert has a learned scale of its weight. Its config says `top_k_experts`."""
    return transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**GEMMA4))


def cohere2_moe() -> Any:
    """The attention and the experts of a layer work on the same input."""
    config = transformers.Cohere2MoeConfig(
        **SHAPE,
        **HEADS,
        num_experts=8,
        num_experts_per_tok=2,
        sliding_window=64,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse", "sparse"],
        prefix_dense_intermediate_size=256,
    )
    return transformers.Cohere2MoeForCausalLM(config)


def qwen3_moe_many_experts() -> Any:
    """More experts than a byte can number: E = 300."""
    return _qwen3_moe_of(num_experts=300, num_experts_per_tok=8)


def mixtral_all_experts() -> Any:
    """Every token goes to every expert: K = E."""
    return _mixtral_of(num_local_experts=4, num_experts_per_tok=4)


def mixtral_one_expert() -> Any:
    """Every token goes to one expert, with weight 1: K = 1."""
    return _mixtral_of(num_local_experts=8, num_experts_per_tok=1)


def _qwen3_moe_of(**experts: int) -> Any:
    config = transformers.Qwen3MoeConfig(
        **SHAPE, **HEADS, moe_intermediate_size=32, norm_topk_prob=True, use_sliding_window=False, **experts
    )
    return transformers.Qwen3MoeForCausalLM(config)


def _mixtral_of(**experts: int) -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SHAPE, **HEADS, **experts))
