"""Families whose routers take a sigmoid of their logits, most with a correction bias that affects only the selection."""

from __future__ import annotations

from typing import Any

import transformers

from vllm_patch.check.families.shape import HEADS, LLAMA4, SHAPE, latent_attention


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


def llama4() -> Any:
    """One expert per token. The expert's weight (a sigmoid) multiplies its input."""
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**LLAMA4 | {"interleave_moe_layer_step": 1}))


def llama4_interleaved() -> Any:
    """Llama 4 Maverick: every second layer has experts."""
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**LLAMA4 | {"num_hidden_layers": 4}))


def glm4_moe_lite() -> Any:
    """DeepSeek-V3's router with latent attention."""
    config = transformers.Glm4MoeLiteConfig(
        **SHAPE,
        num_key_value_heads=4,
        moe_intermediate_size=64,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.8,
        mlp_layer_types=["dense", "sparse", "sparse"],
        # As in the real model's config; only vLLM reads it.
        first_k_dense_replace=1,
        kv_lora_rank=512,
        q_lora_rank=128,
        qk_nope_head_dim=192,
        qk_rope_head_dim=64,
        v_head_dim=256,
    )
    return transformers.Glm4MoeLiteForCausalLM(config)


def exaone_moe() -> Any:
    config = transformers.ExaoneMoeConfig(
        **SHAPE,
        num_key_value_heads=2,
        moe_intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=4,
        num_shared_experts=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        first_k_dense_replace=1,
        sliding_window=64,
        sliding_window_pattern=4,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )
    return transformers.ExaoneMoeForCausalLM(config)


def afmoe() -> Any:
    """Trinity. Its config says `route_scale` for the scaling factor and `num_dense_layers`."""
    config = transformers.AfmoeConfig(
        **SHAPE,
        **HEADS,
        moe_intermediate_size=64,
        num_dense_layers=1,
        num_experts=16,
        num_experts_per_tok=4,
        num_shared_experts=1,
        route_scale=1.5,
        sliding_window=64,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        # As in the real model's config; only vLLM reads them.
        score_func="sigmoid",
        route_norm=True,
        n_group=1,
        topk_group=1,
    )
    return transformers.AfmoeForCausalLM(config)


def axk1() -> Any:
    """A.X K1: DeepSeek-V3's router and attention."""
    config = transformers.AXK1Config(
        **SHAPE | {"max_position_embeddings": 16384},
        num_key_value_heads=4,
        moe_intermediate_size=64,
        n_shared_experts=1,
        n_routed_experts=16,
        num_experts_per_tok=4,
        # transformers has no norm after a dense MLP, vLLM has.
        first_k_dense_replace=0,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        **latent_attention(mscale=1.0) | {"q_lora_rank": 128},
    )
    return transformers.AXK1ForCausalLM(config)


def hy_v3() -> Any:
    """Hunyuan 3. Its config says `router_scaling_factor`."""
    config = transformers.HYV3Config(
        **SHAPE,
        **HEADS,
        moe_intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=4,
        num_shared_experts=1,
        router_scaling_factor=2.0,
        # As in the real model's config; only vLLM reads them.
        route_norm=True,
        first_k_dense_replace=1,
        expert_hidden_dim=64,
        qk_norm=True,
    )
    return transformers.HYV3ForCausalLM(config)


def laguna() -> Any:
    config = transformers.LagunaConfig(
        **SHAPE,
        **HEADS,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=4,
        moe_routed_scaling_factor=2.0,
        sliding_window=64,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    )
    return transformers.LagunaForCausalLM(config)


def mimo_v2_flash() -> Any:
    config = transformers.MiMoV2FlashConfig(
        **SHAPE,
        num_key_value_heads=2,
        head_dim=64,
        v_head_dim=64,
        moe_intermediate_size=64,
        n_routed_experts=16,
        num_experts_per_tok=4,
        sliding_window=64,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        # As in the real model's config; only vLLM reads them.
        hybrid_layer_pattern=[0, 1, 1],
        moe_layer_freq=[0, 1, 1],
        layernorm_epsilon=1e-5,
        sliding_window_size=64,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=4,
        swa_head_dim=64,
        swa_v_head_dim=64,
        swa_rope_theta=10000.0,
        rope_theta=5000000.0,
        partial_rotary_factor=0.334,
        add_swa_attention_sink_bias=True,
    )
    return transformers.MiMoV2FlashForCausalLM(config)


def minimax_m2() -> Any:
    config = transformers.MiniMaxM2Config(
        **{**SHAPE, "intermediate_size": 64},
        **HEADS,
        num_local_experts=16,
        num_experts_per_tok=4,
        # As in the real model's config; only vLLM reads them.
        scoring_func="sigmoid",
        use_routing_bias=True,
        use_qk_norm=True,
        rotary_dim=32,
    )
    return transformers.MiniMaxM2ForCausalLM(config)


def dots1() -> Any:
    """vLLM removed its own class in 0.23."""
    config = transformers.Dots1Config(
        **SHAPE,
        num_key_value_heads=2,
        moe_intermediate_size=64,
        n_shared_experts=1,
        n_routed_experts=16,
        num_experts_per_tok=4,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    return transformers.Dots1ForCausalLM(config)


def longcat_flash() -> Any:
    """Zero experts: some of the router's choices compute nothing. vLLM renumbers them."""
    config = transformers.LongcatFlashConfig(
        **{name: value for name, value in SHAPE.items() if name not in {"intermediate_size", "num_hidden_layers"}},
        num_layers=2,
        ffn_hidden_size=256,
        moe_topk=4,
        n_routed_experts=16,
        zero_expert_num=4,
        # As in the real model's config; only vLLM reads them.
        zero_expert_type="identity",
        mla_scale_q_lora=True,
        mla_scale_kv_lora=True,
        expert_ffn_hidden_size=64,
        routed_scaling_factor=2.0,
        kv_lora_rank=512,
        q_lora_rank=128,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        head_dim=64,
    )
    return transformers.LongcatFlashForCausalLM(config)
