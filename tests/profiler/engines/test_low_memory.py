"""Experts in 8 and 4 bits, on the CPU, and layers that stay on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from profiler.collect.job import collect
from profiler.collect.options import LocalOptions
from profiler.engines.low_memory import keep_on_host, layers_that_fit, quantize_experts
from profiler.engines.transformers import moe_blocks, route
from profiler.errors import EngineError
from profiler.models.resolve import demo_model_folder
from profiler.trace.reader import Trace
from vllm_patch.check import families
from vllm_patch.check.families.shape import SHAPE

pytest.importorskip("bitsandbytes")
TOKENS = np.random.default_rng(0).integers(3, 300, 96).tolist()


def demo() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo_model_folder(), dtype=torch.float32).eval()


def size(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


@pytest.mark.parametrize(("load_in", "smaller", "agreement"), [("8bit", 0.27, 0.97), ("4bit", 0.15, 0.75)])
def test_experts_shrink_and_routers_do_not(load_in: str, smaller: float, agreement: float) -> None:
    model = demo()
    ids_TLK, _ = route(model, TOKENS)
    routers = [block.gate.get_parameter("weight").clone() for block in moe_blocks(model)]
    before = size(model.model.layers[0].mlp.experts)
    assert quantize_experts(model, load_in) == 8
    assert size(model.model.layers[0].mlp.experts) < smaller * before
    for weight, block in zip(routers, moe_blocks(model), strict=True):
        kept = block.gate.get_parameter("weight")
        assert kept.dtype == torch.float32
        assert torch.equal(kept, weight)
    quantized_TLK, _ = route(model, TOKENS)
    # What the first router sees comes before any expert.
    assert (np.sort(quantized_TLK[:, 0]) == np.sort(ids_TLK[:, 0])).all()
    shared = [len(set(a) & set(b)) / 2 for a, b in zip(ids_TLK.reshape(-1, 2), quantized_TLK.reshape(-1, 2), strict=True)]
    assert agreement < np.mean(shared) < 1


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2", "olmoe"])
def test_other_families_compute_nearly_the_same(family: str) -> None:
    torch.manual_seed(0)
    model = families.FAMILIES[family]().eval()
    tokens = torch.tensor([TOKENS])
    with torch.no_grad():
        expected = model(tokens).logits
        quantize_experts(model, "8bit")
        got = model(tokens).logits
    assert 0 < (got - expected).norm() / expected.norm() < 0.02


def test_experts_of_another_form_are_refused_untouched() -> None:
    import transformers

    config = transformers.GptOssConfig(**SHAPE, num_key_value_heads=2, head_dim=32, num_local_experts=4, num_experts_per_tok=2)
    model = transformers.GptOssForCausalLM(config)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(EngineError, match=r"experts of GptOssForCausalLM \(model.layers.0.mlp.experts\)"):
        quantize_experts(model, "4bit")
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_collecting_with_experts_in_4_bits_says_so(tmp_path: Path) -> None:
    options = LocalOptions(
        model="demo",
        dataset="demo-math",
        out=tmp_path / "trace",
        num_problems=2,
        engine="transformers",
        max_new_tokens=4,
        load_in_4bit=True,
    )
    stages: list[str] = []
    collect(options, on_stage=stages.append)
    assert "the experts of 8 layers are quantized to 4 bits; nothing else is" in stages
    assert Trace.open(tmp_path / "trace").metadata.model.quantization == "bitsandbytes 4bit"


def test_layers_on_the_host_compute_the_same() -> None:
    model = demo()
    tokens = torch.tensor([TOKENS])
    with torch.no_grad():
        expected = model.generate(tokens, max_new_tokens=4, do_sample=False)
        # No GPU here: both places are the CPU, so this is about the hooks and what is moved, not about devices.
        keep_on_host(model, model.model.layers[5:], torch.device("cpu"))
        assert torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False), expected)
    assert [hasattr(layer, "_hf_hook") for layer in model.model.layers] == [False] * 5 + [True] * 3


def test_the_first_layers_are_those_that_fit() -> None:
    assert layers_that_fit([10, 10, 10], 25) == 2
    assert layers_that_fit([10, 10, 10], 30) == 3
    assert layers_that_fit([10, 10, 10], 5) == 0
    assert layers_that_fit([10], -1) == 0
