"""A Mixtral whose experts are quantized by AWQ, in the form in which such checkpoints are published (AutoAWQ's `gemm`).

vLLM computes with the packed weights. The reference unpacks them by the definition of the format, in `unpack_awq`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GROUP_SIZE = 64
# Of eight columns, the one in each four bits of a packed integer, from the lowest.
COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def quantize_experts(source: Path, target: Path) -> None:
    """Write the checkpoint `source` to `target` with its experts in 4 bits, and everything else in bfloat16."""
    shutil.copytree(source, target)
    weights = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if ".experts." not in name:
            weights[name] = weight.to(torch.bfloat16)
            continue
        groups_GIO = weight.float().t().reshape(-1, GROUP_SIZE, len(weight))
        lowest_GO, highest_GO = groups_GIO.amin(1), groups_GIO.amax(1)
        scale_GO = ((highest_GO - lowest_GO) / 15).clamp(min=1e-6).to(torch.bfloat16)
        zero_GO = (-lowest_GO / scale_GO.float()).round().clamp(0, 15)
        rounded_GIO = (groups_GIO / scale_GO.float()[:, None] + zero_GO[:, None]).round().clamp(0, 15)
        parts = {"qweight": _pack(rounded_GIO.flatten(0, 1)), "qzeros": _pack(zero_GO), "scales": scale_GO}
        weights |= {f"{name.removesuffix('weight')}{part}": values for part, values in parts.items()}
    save_file({name: weight.contiguous() for name, weight in weights.items()}, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config |= {
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP_SIZE,
            "version": "gemm",
            "zero_point": True,
            "modules_to_not_convert": ["gate", "self_attn", "lm_head"],
        },
    }
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")


def is_awq(folder: Path) -> bool:
    """Whether a checkpoint is quantized in the form that `unpack_awq` reads."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    return (config.get("quant_method"), config.get("bits"), config.get("version")) == ("awq", 4, "gemm")


def unpack_awq(source: Path, target: Path) -> None:
    """Write the checkpoint `source` to `target` with unpacked weights, in the type of its scales."""
    target.mkdir(parents=True)
    stored: dict[str, torch.Tensor] = {}
    for file in source.glob("*.safetensors"):
        stored |= load_file(file)
    weights = {}
    for name, values in stored.items():
        base, _, part = name.rpartition(".")
        if part == "qweight":
            scale_GO = stored[f"{base}.scales"]
            zero_GO = _unpack(stored[f"{base}.qzeros"])
            groups_GIO = _unpack(values).reshape(len(zero_GO), -1, zero_GO.shape[1])
            unpacked_GIO = (groups_GIO - zero_GO[:, None]) * scale_GO.float()[:, None]
            weights[f"{base}.weight"] = unpacked_GIO.flatten(0, 1).t().to(scale_GO.dtype).contiguous()
        elif part not in {"qzeros", "scales"}:
            weights[name] = values
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _pack(values: torch.Tensor) -> torch.Tensor:
    """Numbers from 0 to 15 `[rows, columns]` as int32 `[rows, columns / 8]`."""
    eights = values.to(torch.int64).reshape(len(values), -1, 8)[..., list(COLUMNS)]
    packed = (eights << (4 * torch.arange(8))).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    """The numbers that `_pack` packed, as float32."""
    eights = (packed[..., None] >> (4 * torch.arange(8, dtype=torch.int32))) & 15
    return eights[..., [COLUMNS.index(column) for column in range(8)]].flatten(1).float()
