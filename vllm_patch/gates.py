"""The routers' own weights, as files for predictors that need them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_patch.hook import MoELayer

PARAMETERS = ("weight", "bias", "e_score_correction_bias")


def save_gates(model: torch.nn.Module, layers: list[MoELayer], path: Path) -> None:
    """Write `layers.{index}.weight` `[E, D]` (and biases, where there are any) of every MoE layer's gate.

    Raises `LookupError` if a layer has no gate of that shape.
    """
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        gate = _gate_of(model, layer)
        for name in PARAMETERS:
            value = getattr(gate, name, None)
            if isinstance(value, torch.Tensor):
                tensors[f"layers.{layer.index}.{name}"] = value.detach().cpu().contiguous().clone()
    save_file(tensors, path)


def _gate_of(model: torch.nn.Module, layer: MoELayer) -> Any:
    """The module that computes the router logits: the layer's own, or its sibling in the model's MoE block."""
    block = model.get_submodule(layer.name.rpartition(".")[0])
    for owner in (layer.module, block):
        for name in ("gate", "router"):
            gate = getattr(owner, name, None)
            weight = getattr(gate, "weight", None)
            if isinstance(weight, torch.Tensor) and weight.dim() == 2 and weight.shape[0] >= layer.num_experts:
                return gate
    raise LookupError(f"layer {layer.index}: no gate with a weight of {layer.num_experts} rows beside its experts")
