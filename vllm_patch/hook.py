"""Find the MoE layers of a loaded vLLM model and wrap their routing with a copy into the recorder's buffers.

The wrapped method is `router._compute_routing`, which returns routing weights and *logical* expert ids, before expert load
balancing remaps them (vLLM's fused_moe/router/base_router.py; on CPU the same from 0.30 on).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from vllm_patch.recorder import Recorder


class UnsupportedModelError(Exception):
    """Routing of this model or engine setting cannot be recorded truthfully; the text says why and what to do."""


def refuse_unsupported(config: Any) -> None:
    """Raise `UnsupportedModelError` for engine settings under which rows would be lost or mislabelled.

    config: vLLM's `VllmConfig`.
    """
    parallel = config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise UnsupportedModelError("pipeline parallelism splits the layers over workers: use pipeline_parallel_size=1")
    if parallel.data_parallel_size > 1:
        raise UnsupportedModelError("data parallelism splits the tokens over workers: use data_parallel_size=1")
    if getattr(parallel, "enable_dbo", False):
        raise UnsupportedModelError("micro-batching (DBO) overlaps steps: run without --enable-dbo")
    if config.speculative_config is not None:
        raise UnsupportedModelError("speculative decoding also routes rejected drafts: run without a speculative config")


def wrap_routers(model: torch.nn.Module, *, max_tokens: int, device: torch.device) -> Recorder:
    """Wrap every MoE layer's router of `model` and return the recorder that holds the buffers.

    max_tokens: most tokens that one step can schedule. Raises `UnsupportedModelError` if a layer's kernel bypasses the router,
    or if the layers differ in experts or top-k.
    """
    layers = find_moe_layers(model)
    if not layers:
        raise UnsupportedModelError(f"{type(model).__name__} has no MoE layer with a router that this release knows")
    shapes = {(_num_experts(layer), int(layer.router.top_k)) for _, layer in layers}
    if len(shapes) > 1:
        raise UnsupportedModelError(f"the MoE layers differ in (experts, top-k): {sorted(shapes)}; expected one shape")
    for index, layer in layers:
        if layer.is_monolithic:
            raise UnsupportedModelError(
                f"layer {index} uses a kernel that routes internally ({type(layer).__name__}, monolithic): "
                "choose another MoE backend or quantization"
            )
    num_experts, top_k = shapes.pop()
    recorder = Recorder([index for index, _ in layers], num_experts, top_k, max_tokens, device)
    for position, (_, layer) in enumerate(layers):
        layer.router._compute_routing = _copying(
            layer.router._compute_routing, recorder.expert_ids_TLK[:, position], recorder.weights_TLK[:, position]
        )
    return recorder


def find_moe_layers(model: torch.nn.Module) -> list[tuple[int, Any]]:
    """(decoder layer, MoE module) by layer: modules that own a router with `_compute_routing`."""
    layers = [
        (int(module.layer_id), module)
        for module in cast("Iterator[Any]", model.modules())
        if hasattr(getattr(module, "router", None), "_compute_routing")
    ]
    return sorted(layers, key=lambda pair: pair[0])


def _num_experts(layer: Any) -> int:
    return int(layer.moe_config.num_logical_experts)


def _copying(
    compute_routing: Callable[..., tuple[torch.Tensor, torch.Tensor]], ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def compute_routing_and_copy(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = compute_routing(*args, **kwargs)
        # Unconditional, on device, without Python state: compilers inline it and CUDA graphs replay it.
        ids_TK[: ids.shape[0]].copy_(ids)
        weights_TK[: weights.shape[0]].copy_(weights)
        return weights, ids

    return compute_routing_and_copy
