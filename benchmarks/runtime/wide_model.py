"""The embedded model with experts of the size that those of a real model have, and the same routing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from profiler.models.resolve import demo_model_folder


def widen(folder: Path, expert_bytes: float, shape: tuple[int, int] | None) -> None:
    """Write the embedded model with wider experts, in float32, one file per layer.

    shape: E and K of a model with random routers and experts instead of the embedded ones; None for these.
    """
    source = demo_model_folder()
    tensors = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    config = json.loads((source / "config.json").read_text())
    hidden, width = config["hidden_size"], config["intermediate_size"]
    wide = max(width, int(expert_bytes / (3 * hidden * 4)))
    if shape is not None:
        config |= {"num_local_experts": shape[0], "num_experts_per_tok": shape[1]}
        tensors = with_random_experts(tensors, config)
    unfinished = folder.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    random = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    for layer in range(config["num_hidden_layers"]):
        own = {name: tensor for name, tensor in tensors.items() if f".layers.{layer}." in name}
        for name, tensor in own.items():
            if ".experts." not in name:
                continue
            # silu(gate) * up is zero in the new columns, because up is.
            kind = name.split(".")[-2]
            rows = {"w1": (wide - width, hidden), "w3": (wide - width, hidden), "w2": (hidden, wide - width)}[kind]
            more = torch.zeros(rows) if kind == "w3" else torch.randn(rows, generator=random)
            own[name] = torch.cat([tensor, more], dim=1 if kind == "w2" else 0).contiguous()
        save_file(own, unfinished / f"layer-{layer}.safetensors", metadata={"format": "pt"})
        where |= dict.fromkeys(own, f"layer-{layer}.safetensors")
    rest = {name: tensor for name, tensor in tensors.items() if name not in where}
    save_file(rest, unfinished / "rest.safetensors", metadata={"format": "pt"})
    where |= dict.fromkeys(rest, "rest.safetensors")
    (unfinished / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (unfinished / "config.json").write_text(json.dumps(config | {"intermediate_size": wide, "dtype": "float32"}))
    for path in source.glob("*.json"):
        if path.name not in {"config.json", "training.json"}:
            shutil.copyfile(path, unfinished / path.name)
    os.sync()
    unfinished.rename(folder)


def with_random_experts(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of the embedded model with as many random experts as the config says, and routers to match."""
    random = torch.Generator().manual_seed(1)
    hidden, width = config["hidden_size"], config["intermediate_size"]
    found = {name: tensor for name, tensor in tensors.items() if ".block_sparse_moe." not in name}
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}.block_sparse_moe"
        found[f"{block}.gate.weight"] = torch.randn(config["num_local_experts"], hidden, generator=random)
        for expert in range(config["num_local_experts"]):
            for part, rows in (("w1", (width, hidden)), ("w3", (width, hidden)), ("w2", (hidden, width))):
                found[f"{block}.experts.{expert}.{part}.weight"] = torch.randn(rows, generator=random) * 0.05
    return found
