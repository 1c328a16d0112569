"""Save the routers' weights, for predictors that need them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file

from vllm_patch.routers.hook import MoELayer

BIASES = ("bias", "e_score_correction_bias")


@torch.inference_mode()
def save_gates(model: torch.nn.Module, layers: list[MoELayer], hidden_size: int, path: Path) -> None:
    """Write `layers.{index}.weight` `[E, D]`, and biases if there are any, of every MoE layer's gate.

    Raises `LookupError` if no gate is found next to a layer's experts.
    """
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        gate = _gate_of(model, layer)
        tensors[f"layers.{layer.index}.weight"] = _weight(gate, layer.num_experts, hidden_size)
        for name in BIASES:
            value = getattr(gate, name, None)
            if isinstance(value, torch.Tensor):
                tensors[f"layers.{layer.index}.{name}"] = value
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)


def _weight(gate: Any, num_experts: int, hidden_size: int) -> torch.Tensor:
    weight = gate.weight
    if weight.shape == (num_experts, hidden_size):
        return cast("torch.Tensor", weight)
    # CPU kernels pack weights in their own layout, and quantized weights are codes. Run the gate on the unit vectors instead:
    # its output for them is exactly its weights.
    units = torch.eye(hidden_size, dtype=getattr(gate, "params_dtype", weight.dtype), device=weight.device)
    output = gate(units)
    logits = output[0] if isinstance(output, tuple) else output
    if getattr(gate, "bias", None) is not None:
        logits = logits - gate.bias
    if logits.shape != (hidden_size, num_experts):
        raise LookupError(f"a gate returned logits of shape {tuple(logits.shape)}, expected {(hidden_size, num_experts)}")
    return cast("torch.Tensor", logits.T)


def _gate_of(model: torch.nn.Module, layer: MoELayer) -> Any:
    """The module that computes the router logits: inside the layer, or next to it in the model's MoE block."""
    block = model.get_submodule(layer.name.rpartition(".")[0])
    for owner in (layer.module, block):
        for name in ("gate", "router"):
            gate = getattr(owner, name, None)
            if isinstance(gate, torch.nn.Module) and isinstance(getattr(gate, "weight", None), torch.Tensor):
                return gate
    raise LookupError(f"layer {layer.index}: no gate found next to its experts")
