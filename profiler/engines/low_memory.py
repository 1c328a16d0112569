"""Run models on GPUs too small for them, through transformers: experts in 8 or 4 bits, and layers kept in host memory.

transformers 5 stores the experts of a layer in two 3D tensors. bitsandbytes replaces only `nn.Linear`, so `load_in_4bit` alone
leaves 95 % of a mixture of experts unquantized. This module quantizes the experts and nothing else:
routers, attention and shared experts are unchanged, so that a router's only error is that of its input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from profiler.errors import EngineError

# Share of the GPU's free memory for weights; the rest is for activations, keys and values.
USED_SHARE = 0.8
INSTALL = "pip install 'speculative-moe[lowmem]'"


class QuantizedExperts(nn.Module):
    """The experts of one layer, each as two bitsandbytes linear layers. Replaces a fused experts module of transformers.

    It is called with the same arguments: hidden states `[T, D]`, expert ids and weights `[T, K]`.
    """

    def __init__(self, fused: Any, load_in: str) -> None:
        super().__init__()
        self.gate_up = nn.ModuleList(_linear(weight, load_in) for weight in fused.gate_up_proj.data)
        self.down = nn.ModuleList(_linear(weight, load_in) for weight in fused.down_proj.data)
        self.num_experts = len(self.gate_up)
        self.act_fn = fused.act_fn

    def forward(self, hidden_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the chosen experts' outputs, `[T, D]`."""
        out_TD = torch.zeros_like(hidden_TD)
        for expert in torch.unique(expert_ids_TK).tolist():
            tokens, slots = torch.where(expert_ids_TK == expert)
            gate, up = self.gate_up[expert](hidden_TD[tokens]).chunk(2, dim=-1)
            expert_out = self.down[expert](self.act_fn(gate) * up) * weights_TK[tokens, slots, None]
            out_TD.index_add_(0, tokens, expert_out.to(out_TD.dtype))
        return out_TD


def quantize_experts(model: nn.Module, load_in: str) -> int:
    """Replace the experts of every MoE layer by quantized ones, in place, one layer at a time; returns the number of layers.

    load_in: `8bit` or `4bit`.
    Raises `EngineError` if bitsandbytes is not installed, or if the model has no experts of transformers' common form.
    """
    try:
        import bitsandbytes  # noqa: F401 - fails here, before any layer is replaced
    except ImportError as error:
        raise EngineError(f"quantizing to {load_in} needs bitsandbytes: {INSTALL}") from error
    fused = [(name, module) for name, module in model.named_modules() if name.endswith(".experts")]
    for name, module in fused:
        weights = (getattr(module, part, None) for part in ("gate_up_proj", "down_proj"))
        if not all(isinstance(weight, nn.Parameter) and weight.ndim == 3 for weight in weights) or not hasattr(
            module, "act_fn"
        ):
            raise EngineError(f"cannot quantize to {load_in}: the experts of {type(model).__name__} ({name}) have another form")
        if getattr(module, "gate_up_proj_bias", None) is not None:
            raise EngineError(f"cannot quantize to {load_in}: the experts of {type(model).__name__} ({name}) have biases")
    if not fused:
        raise EngineError(f"{type(model).__name__} has no experts to quantize")
    count = len(fused)
    while fused:
        # Popping drops the last reference to the fused layer: its memory is free before the next layer is quantized.
        name, module = fused.pop()
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, QuantizedExperts(module, load_in))
        del module
    return count


def place(model: Any, device: torch.device, *, offload: bool) -> int:
    """Move a model to a GPU; with `offload`, only the layers that fit. Returns the number of layers that stay on the host.

    Layers on the host are computed there: hidden states are transferred, weights are not.
    Raises `EngineError` if layers must stay on the host and accelerate is not installed.
    """
    layers = model.model.layers
    others = _bytes(model) - sum(map(_bytes, layers))
    room = int(torch.cuda.mem_get_info(device)[0] * USED_SHARE) if offload else None
    resident = len(layers) if room is None else layers_that_fit([_bytes(layer) for layer in layers], room - others)
    if resident == len(layers):
        model.to(device)
        return 0
    keep_on_host(model, layers[resident:], device)
    return len(layers) - resident


def keep_on_host(model: Any, layers: Any, device: torch.device) -> None:
    """Move everything but `layers` to `device`. `layers` compute on the CPU; their inputs and outputs are on `device`.

    Raises `EngineError` if accelerate is not installed.
    """
    try:
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    except ImportError as error:
        raise EngineError(f"offloading layers needs accelerate: {INSTALL}") from error
    on_host = {id(module) for layer in layers for module in layer.modules()}
    for module in model.modules():
        if id(module) in on_host:
            continue
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    moved = tensor.to(device)
                    tensors[name] = nn.Parameter(moved, requires_grad=False) if type(tensor) is nn.Parameter else moved
    for layer in layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))


def layers_that_fit(layer_bytes: list[int], room: int) -> int:
    """The largest number of leading layers whose sizes add up to at most `room` bytes."""
    total = 0
    for count, size in enumerate(layer_bytes):
        total += size
        if total > room:
            return count
    return len(layer_bytes)


def _linear(weight: torch.Tensor, load_in: str) -> nn.Module:
    """A quantized linear layer without bias, from a weight `[out, in]`."""
    import bitsandbytes as bnb

    outputs, inputs = weight.shape
    if load_in == "8bit":
        linear: Any = bnb.nn.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False, device="meta")
        linear.weight = bnb.nn.Int8Params(weight.cpu().clone(), requires_grad=False, has_fp16_weights=False)
    else:
        linear = bnb.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
        linear.weight = bnb.nn.Params4bit(weight.cpu().clone(), requires_grad=False, quant_type="nf4", module=linear)
    # bitsandbytes quantizes in `to`.
    quantized: nn.Module = linear.to("cpu")
    return quantized


def _bytes(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
