"""Families in which some layers have linear attention, a state-space model or a convolution instead of attention."""

from __future__ import annotations

from typing import Any

import transformers

from vllm_patch.check.families.shape import HEADS, LINEAR_ATTENTION, SHAPE


def granitemoehybrid() -> Any:
    """GraniteMoE's router; the second layer has attention, the others Mamba-2."""
    config = transformers.GraniteMoeHybridConfig(
        **SHAPE,
        num_key_value_heads=2,
        num_local_experts=16,
        num_experts_per_tok=4,
        shared_intermediate_size=128,
        position_embedding_type="rope",
        layer_types=["mamba", "attention", "mamba"],
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_d_state=32,
        mamba_n_groups=1,
        mamba_chunk_size=64,
    )
    return transformers.GraniteMoeHybridForCausalLM(config)


def qwen3_next() -> Any:
    config = transformers.Qwen3NextConfig(
        **SHAPE,
        **HEADS,
        **LINEAR_ATTENTION,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=4,
    )
    return transformers.Qwen3NextForCausalLM(config)


def qwen3_5_moe() -> Any:
    shape = {name: value for name, value in SHAPE.items() if name != "intermediate_size"}
    config = transformers.Qwen3_5MoeTextConfig(
        **shape,
        **HEADS,
        **LINEAR_ATTENTION,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=4,
    )
    return transformers.Qwen3_5MoeForCausalLM(config)


def jamba() -> Any:
    """Mamba layers, attention in every second layer, experts in every second one."""
    config = transformers.JambaConfig(
        **SHAPE,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        expert_layer_period=2,
        expert_layer_offset=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=16,
        use_mamba_kernels=False,
    )
    return transformers.JambaForCausalLM(config)


def nemotron_h() -> Any:
    """A layer is either Mamba-2, attention, or experts."""
    shape = {name: value for name, value in SHAPE.items() if name not in {"num_hidden_layers"}}
    config = transformers.NemotronHConfig(
        **shape,
        **HEADS,
        layers_block_type=["mamba", "moe", "attention", "moe"],
        ssm_state_size=32,
        mamba_num_heads=8,
        mamba_head_dim=32,
        n_groups=1,
        chunk_size=64,
        n_routed_experts=16,
        n_shared_experts=1,
        moe_intermediate_size=64,
        moe_shared_expert_intermediate_size=64,
        num_experts_per_tok=4,
        routed_scaling_factor=2.5,
        use_mamba_kernels=False,
    )
    return transformers.NemotronHForCausalLM(config)


def lfm2_moe() -> Any:
    """Short convolutions and attention; a sigmoid router with a correction bias."""
    config = transformers.Lfm2MoeConfig(
        **SHAPE,
        num_key_value_heads=2,
        moe_intermediate_size=64,
        num_dense_layers=1,
        num_experts=16,
        num_experts_per_tok=4,
        layer_types=["conv", "full_attention", "conv"],
    )
    return transformers.Lfm2MoeForCausalLM(config)
