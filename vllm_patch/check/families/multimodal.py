"""Multimodal families, which are given text only."""

from __future__ import annotations

from typing import Any

import transformers

from vllm_patch.check.families.shape import GEMMA4, HEADS, LINEAR_ATTENTION, LLAMA4, SHAPE

VISION = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128}
IMAGE_TOKENS = {"image_token_id": 505, "video_token_id": 506, "vision_start_token_id": 507, "vision_end_token_id": 508}


def qwen3_vl_moe() -> Any:
    text = {
        **SHAPE,
        **HEADS,
        # Not half the hidden size: by the shape of their weights, transformers sees whether experts are transposed.
        "moe_intermediate_size": 32,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        # As in the real model's config; only vLLM reads it.
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
    }
    vision = VISION | {"deepstack_visual_indexes": [0]}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **IMAGE_TOKENS)
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


def qwen3_5_moe_multimodal() -> Any:
    text = {
        **{name: value for name, value in SHAPE.items() if name != "intermediate_size"},
        **HEADS,
        **LINEAR_ATTENTION,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "num_experts": 16,
        "num_experts_per_tok": 4,
    }
    config = transformers.Qwen3_5MoeConfig(text_config=text, vision_config=VISION, **IMAGE_TOKENS)
    return transformers.Qwen3_5MoeForConditionalGeneration(config)


def llama4_multimodal() -> Any:
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_output_dim": 64,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
    }
    config = transformers.Llama4Config(
        text_config=LLAMA4 | {"num_hidden_layers": 4},
        vision_config=vision,
        image_token_index=505,
        boi_token_index=506,
        eoi_token_index=507,
    )
    return transformers.Llama4ForConditionalGeneration(config)


def gemma4_multimodal() -> Any:
    vision = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "global_head_dim": 32,
    }
    config = transformers.Gemma4Config(text_config=GEMMA4, vision_config=vision, audio_config=None, image_token_id=505)
    return transformers.Gemma4ForConditionalGeneration(config)
