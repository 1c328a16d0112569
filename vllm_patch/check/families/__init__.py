"""Small mixture-of-experts checkpoints with random weights, one for each family of routers that vLLM serves.

python -m vllm_patch.check.families FOLDER [FAMILY...]
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from vllm_patch.check.families import hybrid, multimodal, sigmoid, softmax
from vllm_patch.check.families.awq import quantize_experts
from vllm_patch.check.families.deepseek_v1 import make_deepseek_v1

# Class names that published checkpoints spell differently from transformers.
ARCHITECTURES = {"phimoe": "PhiMoEForCausalLM"}
# Published checkpoints have each expert's matrices transposed. transformers reads both forms and writes the other.
TRANSPOSED_EXPERTS = {"qwen3_vl_moe"}
# Name endings of router weights, and of biases that affect only the selection of experts.
ROUTERS = (
    ".gate.weight",
    ".router.weight",
    ".router.layer.weight",
    ".router.proj.weight",
    ".router.bias",
    "expert_bias",
    "e_score_correction_bias",
)

FAMILIES: dict[str, Callable[[], Any]] = {
    make.__name__: make
    for make in (
        softmax.mixtral,
        softmax.qwen2_moe,
        softmax.qwen3_moe,
        softmax.olmoe,
        softmax.deepseek_v2,
        softmax.gpt_oss,
        softmax.granitemoe,
        softmax.granitemoeshared,
        softmax.phimoe,
        softmax.dbrx,
        softmax.ernie4_5_moe,
        softmax.hunyuan_v1_moe,
        softmax.mellum,
        softmax.flex_olmo,
        softmax.gemma4,
        softmax.cohere2_moe,
        softmax.qwen3_moe_many_experts,
        softmax.mixtral_all_experts,
        softmax.mixtral_one_expert,
        sigmoid.deepseek_v3,
        sigmoid.glm4_moe,
        sigmoid.glm4_moe_lite,
        sigmoid.llama4,
        sigmoid.llama4_interleaved,
        sigmoid.exaone_moe,
        sigmoid.afmoe,
        sigmoid.axk1,
        sigmoid.hy_v3,
        sigmoid.laguna,
        sigmoid.mimo_v2_flash,
        sigmoid.minimax_m2,
        sigmoid.dots1,
        sigmoid.longcat_flash,
        hybrid.granitemoehybrid,
        hybrid.qwen3_next,
        hybrid.qwen3_5_moe,
        hybrid.jamba,
        hybrid.nemotron_h,
        hybrid.lfm2_moe,
        multimodal.qwen3_vl_moe,
        multimodal.qwen3_5_moe_multimodal,
        multimodal.llama4_multimodal,
        multimodal.gemma4_multimodal,
    )
}


def make(name: str, folder: Path) -> Path:
    """Write the checkpoint `name` (one of FAMILIES, deepseek_v1 or mixtral_awq) to `folder / name`, in float32 or quantized."""
    torch.manual_seed(0)
    target = folder / name
    if name == "deepseek_v1":
        make_deepseek_v1(target)
        return target
    if name == "mixtral_awq":
        with TemporaryDirectory() as temporary:
            quantize_experts(make("mixtral", Path(temporary)), target)
        return target
    model = FAMILIES[name]().float().eval()
    with torch.no_grad():
        for parameter, values in (*model.named_parameters(), *model.named_buffers()):
            # The default initialization (0.02, or zero) makes router logits so similar that rounding decides.
            if parameter.endswith(ROUTERS):
                values.normal_(std=0.2)
    model.save_pretrained(target)
    if name in TRANSPOSED_EXPERTS:
        _transpose_experts(target / "model.safetensors")
    if name in ARCHITECTURES:
        path = target / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(config | {"architectures": [ARCHITECTURES[name]]}), encoding="utf-8")
    return target


def _transpose_experts(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    for key in [key for key in weights if ".experts." in key]:
        weights[key] = weights[key].transpose(1, 2).contiguous()
    save_file(weights, file, metadata={"format": "pt"})
