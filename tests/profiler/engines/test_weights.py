"""Recorded weights are those that the model applies to its experts, wherever its code multiplies by a factor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LagunaConfig, LagunaForCausalLM

from profiler.engines.transformers import moe_blocks, route
from profiler.models.moe_modules import find_output_scale
from profiler.models.resolve import moe_facts
from vllm_patch.check.families import FAMILIES

TOKENS = [5, 6, 7, 8]
# Families whose weights sum to 1 before the factor. All but Laguna multiply the weights; Laguna multiplies the experts' output.
FACTORS = {
    "deepseek_v3": 2.5,
    "glm4_moe": 1.5,
    "glm4_moe_lite": 1.8,
    "exaone_moe": 2.5,
    "afmoe": 1.5,
    "axk1": 2.5,
    "hy_v3": 2.0,
    "laguna": 2.0,
    "dots1": 2.5,
    "nemotron_h": 2.5,
    "mixtral": 1.0,
    "gemma4": 1.0,
}


@pytest.mark.parametrize("family", FACTORS)
def test_weights_sum_to_the_factor_of_the_config(family: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().float().eval()
    _, weights_TLK = route(model, TOKENS)
    np.testing.assert_allclose(weights_TLK.sum(-1), FACTORS[family], rtol=1e-5)
    factor = moe_facts(model.config.to_dict())["routed_scaling_factor"]
    assert (factor or 1.0) == FACTORS[family]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_factor_of_the_output_is_not_rounded(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = LagunaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_routed_scaling_factor=2.826,
        layer_types=["full_attention"] * 2,
    )
    model = LagunaForCausalLM(config).to(dtype).eval()
    (block,) = moe_blocks(model)
    assert find_output_scale(block) == 2.826
    before = model(torch.tensor([TOKENS])).logits
    _, weights_TLK = route(model, TOKENS)
    assert weights_TLK.sum(-1) == pytest.approx(2.826, rel=2e-2 if dtype == torch.bfloat16 else 1e-5)
    assert torch.equal(model(torch.tensor([TOKENS])).logits, before)
