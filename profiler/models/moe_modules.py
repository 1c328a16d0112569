"""Where the experts of a `transformers` model are: found in its modules, not by the names in its config."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from profiler.errors import ModelError

# The first number in a module's name is its decoder layer: `model.layers.3.mlp.experts`, `transformer.blocks.3.ffn.experts`.
_LAYER = re.compile(r"^(?P<stack>.*?)\.(?P<layer>\d+)\.")


@dataclass(frozen=True)
class MoEBlock:
    """The modules of one MoE layer.

    layer: index of the decoder layer. experts: all experts, `num_experts` (E) of them. block: their parent, which also has the
    router. gate: the module inside the router whose weight `[E, D]` gives the logits.
    """

    layer: int
    block: torch.nn.Module
    experts: torch.nn.Module
    router: torch.nn.Module
    gate: torch.nn.Module
    num_experts: int

    @property
    def correction_E(self) -> torch.Tensor | None:
        """The bias `[E]` that is added to the scores for the selection only; None if the router has no such bias."""
        for name, values in (*self.block.named_parameters(), *self.block.named_buffers()):
            is_bias = name.rpartition(".")[2] in {"e_score_correction_bias", "expert_bias"}
            if is_bias and values.numel() == self.num_experts:
                return values.detach().view(-1)
        return None


def find_moe_blocks(model: torch.nn.Module) -> list[MoEBlock]:
    """Find the MoE layers of a model's decoder, in order. Returns an empty list if it has none.

    An MoE layer is a module named `experts` inside a decoder layer, with a sibling `gate` or `router` that holds a matrix with
    one row for each expert.
    """
    modules = dict(model.named_modules())
    blocks = {}
    for name, experts in modules.items():
        parent, _, leaf = name.rpartition(".")
        found = _LAYER.search(name)
        router = modules.get(f"{parent}.gate", modules.get(f"{parent}.router"))
        if leaf != "experts" or found is None or router is None:
            continue
        count = _count(experts)
        gate = next((module for module in router.modules() if _is_gate(module, count)), None)
        if gate is not None:
            blocks[int(found["layer"])] = MoEBlock(int(found["layer"]), modules[parent], experts, router, gate, count)
    return [blocks[layer] for layer in sorted(blocks)]


def find_experts(model: torch.nn.Module) -> list[tuple[int, int]]:
    """The decoder layer and E of every module named `experts`, in the order of layers, whether its router is known or not."""
    found = [
        (int(match["layer"]), _count(module))
        for name, module in model.named_modules()
        if name.endswith(".experts") and (match := _LAYER.search(name)) is not None
    ]
    return sorted(found)


def count_layers(model: torch.nn.Module) -> int:
    """The number of decoder layers in the stack that has the experts."""
    for name, _ in model.named_modules():
        found = _LAYER.search(name)
        if name.endswith(".experts") and found is not None:
            return len(list(model.get_submodule(found["stack"]).children()))
    raise ModelError(f"{type(model).__name__} has no experts: choose a mixture-of-experts model")


@torch.inference_mode()
def find_top_k(block: MoEBlock, hidden_size: int) -> int | None:
    """K: how many experts the block selects for each token, found by running it up to its experts. None if that fails.

    Works on the meta device, without weights.
    """
    weight_ED = block.gate.get_parameter("weight")
    hidden_TD = torch.zeros((1, 2, hidden_size), device=weight_ED.device, dtype=weight_ED.dtype)
    with contextlib.suppress(Exception), _until_experts(block.experts):
        try:
            block.block(hidden_TD)
        except _ReachedExpertsError as reached:
            if reached.top_k is not None:
                return reached.top_k
    with contextlib.suppress(Exception):
        for part in block.router(hidden_TD[0]):
            if isinstance(part, torch.Tensor) and not part.is_floating_point():
                return int(part.shape[-1])
    top_k = getattr(block.router, "top_k", None)
    return top_k if isinstance(top_k, int) else None


@torch.inference_mode()
def find_output_scale(block: MoEBlock) -> float:
    """The factor by which the block multiplies what its experts compute, found by running it with experts that output 1 and 0.

    Most families multiply the weights instead, so it is 1. Laguna and MiniMax M3 multiply the output by their routed scaling
    factor. It is also 1 where the block cannot be run on its own: as in Gemma 4, whose block is the whole decoder layer.
    """
    for dtype in {parameter.dtype: None for parameter in block.block.parameters() if parameter.is_floating_point()}:
        with contextlib.suppress(Exception):
            weight_ED = block.gate.get_parameter("weight")
            hidden_TD = torch.zeros((1, 2, weight_ED.shape[1]), device=weight_ED.device, dtype=dtype)
            ones, zeros = (_output_with(block, hidden_TD, value) for value in (1.0, 0.0))
            measured = float((ones - zeros).float().mean())
            # In the model's precision the measured value is rounded, the block's own attribute is not.
            known = [value for value in vars(block.block).values() if isinstance(value, float)]
            return next((value for value in known if math.isclose(value, measured, rel_tol=0.01)), measured)
    return 1.0


def _output_with(block: MoEBlock, hidden_TD: torch.Tensor, value: float) -> torch.Tensor:
    """The block's output if its experts compute the same value everywhere."""

    def replace(_module: torch.nn.Module, _inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return torch.full_like(output, value)

    hook = block.experts.register_forward_hook(replace)
    try:
        output = block.block(hidden_TD)
    finally:
        hook.remove()
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result


class _ReachedExpertsError(Exception):
    def __init__(self, top_k: int | None) -> None:
        super().__init__()
        self.top_k = top_k


@contextlib.contextmanager
def _until_experts(experts: torch.nn.Module) -> Iterator[None]:
    """Stop a forward pass where it would compute the experts."""

    def stop(_module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        pair = selection(inputs)
        raise _ReachedExpertsError(None if pair is None else pair[0].shape[-1])

    hook = experts.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        hook.remove()


def selection(inputs: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Expert ids and weights `[T, K]` among the inputs of an experts module; None if it does not get them."""
    if len(inputs) >= 3 and all(isinstance(part, torch.Tensor) for part in inputs[:3]):
        _, ids, weights = inputs[:3]
        if not ids.is_floating_point() and weights.is_floating_point() and ids.shape == weights.shape:
            return ids.flatten(0, -2), weights.flatten(0, -2)
    return None


def _count(experts: torch.nn.Module) -> int:
    """E: the number of its numbered modules, what the module says, or the first dimension of its stacked weights."""
    # A list of experts may have other modules too, such as a shared activation function.
    if numbered := sum(name.isdigit() for name, _ in experts.named_children()):
        return numbered
    said = getattr(experts, "num_experts", None)
    return said if isinstance(said, int) else max((len(weight) for weight in experts.parameters()), default=0)


def _is_gate(module: torch.nn.Module, num_experts: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim == 2 and len(weight) == num_experts
