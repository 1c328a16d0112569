"""Experts in MXFP4: the numbers, and a model that computes with them as transformers does after unpacking them all."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.offloaded import allocated, empty_expert, greedy, logits
from transformers import AutoModelForCausalLM, Mxfp4Config

from profiler.errors import EngineError, SpecmoeError
from speculation.runtime import CacheSize, OffloadedModel
from speculation.runtime.model_loading import EXPERTS_IMPLEMENTATION
from speculation.runtime.storage.layout import ExpertLayout, Weight
from speculation.runtime.storage.mxfp4 import BLOCK, FP4_VALUES, SCRATCH, Mxfp4
from vllm_patch.check.families import make

PROMPT = [17, 301, 44, 45, 46, 301, 44, 9, 120]


def test_the_numbers_of_a_block() -> None:
    """Two numbers in a byte, the first in the lower half, times the power of two of their block."""
    blocks = torch.zeros((2, 1, 16), dtype=torch.uint8)
    blocks[0, 0, :3] = torch.tensor([0x21, 0x7F, 0xA0])
    blocks[1, 0, 15] = 0x5B
    scales = torch.tensor([[127], [130]], dtype=torch.uint8)
    plain = ExpertLayout((Weight("down_proj", (32, 2), torch.float32), Weight("bias", (2,), torch.float32)))
    form = Mxfp4(plain)
    assert [(weight.name, weight.shape) for weight in form.layout.weights] == [
        ("down_proj_blocks", (2, 1, 16)),
        ("down_proj_scales", (2, 1)),
        ("bias", (2,)),
    ]
    found = {"down_proj": torch.empty(32, 2), "bias": torch.empty(2)}
    form.unpack({"down_proj_blocks": blocks, "down_proj_scales": scales, "bias": torch.ones(2)}, found)
    assert found["bias"].tolist() == [1.0, 1.0]
    assert found["down_proj"][:6, 0].tolist() == [0.5, 1.0, -6.0, 6.0, 0.0, -1.0]
    assert found["down_proj"][30:, 1].tolist() == [-1.5 * 8, 3.0 * 8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_matrix_is_unpacked_in_pieces_to_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    form = Mxfp4(ExpertLayout((Weight("down_proj", (96, 70), dtype),)))
    blocks = torch.randint(0, 256, (70, 3, 16), generator=random, dtype=torch.uint8)
    scales = torch.randint(100, 140, (70, 3), generator=random, dtype=torch.uint8)
    packed = {"down_proj_blocks": blocks, "down_proj_scales": scales}
    found = []
    for piece in (1 << 20, 1000, 1):
        monkeypatch.setattr("speculation.runtime.storage.mxfp4.PIECE", piece)
        into = empty_expert(form.plain)
        # The table of the numbers of a byte comes on top.
        assert allocated(partial(form.unpack, packed, into)) <= form.scratch_bytes + 8192
        found.append(into["down_proj"])
    assert all(torch.equal(each, found[0]) for each in found)
    assert form.scratch_bytes == SCRATCH * 96


def test_a_matrix_that_no_blocks_add_up_to() -> None:
    with pytest.raises(ValueError, match="has 40 inputs, expected a multiple of 32"):
        _ = Mxfp4(ExpertLayout((Weight("down_proj", (40, 8), torch.bfloat16),))).layout


@pytest.mark.parametrize("store", ["ram", "disk"])
def test_packed_experts_compute_what_transformers_computes_unpacked(store: str, tmp_path: Path) -> None:
    folder = packed_gpt_oss(tmp_path)
    quantization = Mxfp4Config(dequantize=True)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=quantization).eval()
    for name, parameter in reference.named_parameters():
        if ".experts." in name:
            parameter.data = parameter.data.clone()
    with OffloadedModel.load(str(folder), CacheSize(fraction=0.5), store=store, device="cpu") as offloaded:
        # Four bits and a scale for every 32 numbers.
        matrices = 3 * 128 * 256
        assert offloaded.expert_bytes / (3 * 8) < 0.6 * matrices + 4 * 1024
        reference.set_experts_implementation(EXPERTS_IMPLEMENTATION)
        tokens_BT = torch.tensor([PROMPT])
        assert torch.equal(logits(offloaded.model, tokens_BT), logits(reference, tokens_BT))
        (generation,) = offloaded.generate([PROMPT], max_new_tokens=8, ignore_eos=True)
        assert generation.token_ids == greedy(reference, PROMPT, 8)


def test_other_quantization_is_refused_by_name(tmp_path: Path) -> None:
    folder = packed_gpt_oss(tmp_path)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for method in ("awq", "gptq", "fp8"):
        path.write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
        with pytest.raises(EngineError, match=rf"is quantized \({method}\)"):
            OffloadedModel.load(str(folder), CacheSize(fraction=0.5), device="cpu")


def test_packed_experts_are_not_rounded_to_integers(tmp_path: Path) -> None:
    with pytest.raises(SpecmoeError, match=r"experts of this checkpoint are packed already \(mxfp4"):
        OffloadedModel.load(str(packed_gpt_oss(tmp_path)), CacheSize(fraction=0.5), expert_bits=4, device="cpu")


def packed_gpt_oss(folder: Path) -> Path:
    """A small gpt-oss whose experts are packed as in the published checkpoints; the rest is bfloat16."""
    model = make("gpt_oss", folder)
    file = model / "model.safetensors"
    packed = {}
    for name, tensor in load_file(file).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed[f"{name}_blocks"], packed[f"{name}_scales"] = pack(tensor)
        else:
            packed[name] = tensor.to(torch.bfloat16)
    save_file(packed, file, metadata={"format": "pt"})
    path = model / "config.json"
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    config = json.loads(path.read_text()) | {"quantization_config": quantization, "dtype": "bfloat16"}
    path.write_text(json.dumps(config))
    return model


def pack(matrices_EIO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks `[E, O, I / 32, 16]` and scales `[E, O, I / 32]` of matrices `[E, I, O]`: each number to the nearest."""
    experts, inputs, outputs = matrices_EIO.shape
    rows_EOGN = matrices_EIO.transpose(1, 2).reshape(experts, outputs, inputs // BLOCK, BLOCK)
    largest = rows_EOGN.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    power = torch.floor(torch.log2(largest / max(FP4_VALUES))) + 1
    distance = (rows_EOGN / 2**power).unsqueeze(-1) - torch.tensor(FP4_VALUES)
    numbers = distance.abs().argmin(-1).to(torch.uint8)
    blocks = numbers[..., 0::2] | (numbers[..., 1::2] << 4)
    return blocks.contiguous(), (power.squeeze(-1) + 127).to(torch.uint8).contiguous()
