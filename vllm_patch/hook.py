"""Find the MoE layers of a loaded vLLM model and have each copy its routing into the recorder's buffers.

What is wrapped is the release's business (`releases`); wrapped or patched in the source, the copy is the same.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from vllm_patch.releases import Hook

Copy = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Called in every forward pass with (router inputs `[T, D]`, router logits `[T, E]`, weights `[T, K]`, ids `[T, K]`)."""

# Set on a layer or router where the source of vLLM itself was patched to call it (`vllm_patch.source`).
SOURCE_ATTRIBUTE = "specmoe_copy"


class UnsupportedModelError(Exception):
    """Routing of this model or engine setting cannot be recorded truthfully; the text says why and what to do."""


class MoELayer:
    """One MoE layer of a loaded model: decoder layer `index`, E, K, and the modules that its hook needs."""

    def __init__(self, name: str, module: Any) -> None:
        self.name = name
        self.module = module
        found = re.search(r"(?:^|\.)layers?\.(\d+)(?:\.|$)", str(getattr(module, "layer_name", "")) or name)
        self.index = int(found.group(1)) if found else int(module.layer_id)
        config = getattr(module, "moe_config", None)
        for owner, attribute in ((config, "num_logical_experts"), (module, "logical_num_experts"), (config, "num_experts")):
            if isinstance(getattr(owner, attribute, None), int):
                self.num_experts = int(getattr(owner, attribute))
                break
        # A factor of the experts' output, applied after the router's weights: it belongs to the weights as applied.
        self.output_scale = 1.0
        router: Any = getattr(module, "router", None)
        self.top_k = int(router.top_k if hasattr(router, "top_k") else module.top_k)

    @property
    def is_monolithic(self) -> bool:
        """Whether the layer's kernel routes internally, past the router."""
        owners: list[Any] = [self.module, getattr(self.module, "quant_method", None)]
        for owner in owners:
            if hasattr(owner, "is_monolithic"):
                return bool(owner.is_monolithic)
        return False

    @property
    def balances_load(self) -> bool:
        """Whether ids are remapped to copies of experts (EPLB)."""
        return bool(getattr(self.module, "enable_eplb", False))


def refuse_unsupported(config: Any) -> None:
    """Raise `UnsupportedModelError` for engine settings under which rows would be lost or mislabeled.

    config: vLLM's `VllmConfig`.
    """
    parallel = config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise UnsupportedModelError("pipeline parallelism splits the layers over workers: use pipeline_parallel_size=1")
    if parallel.data_parallel_size > 1:
        raise UnsupportedModelError("data parallelism splits the tokens over workers: use data_parallel_size=1")
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise UnsupportedModelError(f"context parallelism splits sequences over workers: use {name}=1")
    if getattr(parallel, "enable_dbo", False) or getattr(parallel, "ubatch_size", 0) > 1:
        raise UnsupportedModelError("micro-batching (DBO) overlaps steps: run without --enable-dbo and --ubatch-size")
    if getattr(parallel, "enable_expert_parallel", False) and parallel.tensor_parallel_size > 1:
        raise UnsupportedModelError(
            "expert parallelism may route a share of the tokens on each worker: run without --enable-expert-parallel"
        )
    if getattr(parallel, "distributed_executor_backend", None) == "ray":
        raise UnsupportedModelError("Ray runs steps past the worker's own call: use --distributed-executor-backend mp")
    if getattr(config.cache_config, "kv_sharing_fast_prefill", False):
        raise UnsupportedModelError("fast prefill skips tokens in some layers: run without --kv-sharing-fast-prefill")
    if getattr(config.model_config, "enable_prompt_embeds", False):
        raise UnsupportedModelError("prompt embeddings have no token ids to record: run without --enable-prompt-embeds")
    if getattr(config.model_config, "is_diffusion", False):
        raise UnsupportedModelError("diffusion models route a position many times: choose an autoregressive model")
    if config.speculative_config is not None:
        raise UnsupportedModelError("speculative decoding also routes rejected drafts: run without a speculative config")
    if os.environ.get("VLLM_MOE_ROUTING_SIMULATION_STRATEGY"):
        raise UnsupportedModelError("vLLM simulates routing: unset VLLM_MOE_ROUTING_SIMULATION_STRATEGY")


def find_moe_layers(model: torch.nn.Module, hook: Hook) -> list[MoELayer]:
    """The model's MoE layers, by decoder layer.

    Raises `UnsupportedModelError` if there is none, if a layer's kernel bypasses the hook, or if layers differ in E or K.
    """
    modules = cast("Iterator[tuple[str, Any]]", model.named_modules())
    method = "select_experts" if hook.owner == "module" else hook.wraps
    found: dict[int, MoELayer] = {}
    for name, module in modules:
        owner = module if hook.owner == "layer" else getattr(module, "router", None)
        # A layer and the runner inside it may share a router: the outer one comes first.
        if hasattr(owner, method) and id(owner) not in found:
            found[id(owner)] = MoELayer(name, module)
    layers = sorted(found.values(), key=lambda layer: layer.index)
    if not layers:
        raise UnsupportedModelError(f"{type(model).__name__} has no MoE layer with a router that this release knows")
    shapes = {(layer.num_experts, layer.top_k) for layer in layers}
    if len(shapes) > 1:
        raise UnsupportedModelError(f"the MoE layers differ in (experts, top-k): {sorted(shapes)}; expected one shape")
    if len({layer.index for layer in layers}) < len(layers):
        raise UnsupportedModelError(f"several MoE layers in one decoder layer: {[layer.name for layer in layers]}")
    for layer in layers:
        layer.output_scale = _output_scale(model, layer)
        if layer.is_monolithic and hook.owner != "module":
            raise UnsupportedModelError(
                f"layer {layer.index} uses a kernel that routes internally ({type(layer.module).__name__}, monolithic): "
                "choose another MoE backend or quantization"
            )
        if type(getattr(layer.module, "router", None)).__name__ == "ZeroExpertRouter" or getattr(
            layer.module, "zero_expert_num", None
        ):
            raise UnsupportedModelError(f"layer {layer.index} has zero experts, which vLLM renumbers before they can be seen")
        if layer.balances_load and not hook.logical:
            raise UnsupportedModelError("in this release expert load balancing hides the model's own ids: disable EPLB")
    return layers


def _output_scale(model: torch.nn.Module, layer: MoELayer) -> float:
    """`routed_scaling_factor` where it multiplies the experts' output and not already the router's weights.

    From 0.24 on the runner has a factor of its own for the output; before, the model's MoE block multiplies, unless the layer
    was given the factor for its router.
    """
    module = layer.module
    if hasattr(module, "routed_experts"):
        return float(getattr(module, "routed_scaling_factor", None) or 1.0)
    block: Any = model.get_submodule(layer.name.rpartition(".")[0])
    factor, included = (getattr(owner, "routed_scaling_factor", None) or 1.0 for owner in (block, module))
    return float(factor) / float(included)


def attach(hook: Hook, layer: MoELayer, copy: Copy) -> None:
    """Have `layer` call `copy` whenever it has chosen experts."""
    if hook.owner == "module":
        _attach_in_kernel(hook, layer, copy)
        return
    owner = layer.module if hook.owner == "layer" else layer.module.router
    if source_is_patched(hook):
        setattr(owner, SOURCE_ATTRIBUTE, copy)
    else:
        setattr(owner, hook.wraps, _copying(getattr(owner, hook.wraps), copy))


def source_is_patched(hook: Hook) -> bool:
    """Whether the imported source of the hook's function already calls `SOURCE_ATTRIBUTE`."""
    if hook.owner == "module":
        return False
    owner: Any = importlib.import_module(hook.module)
    for part in hook.function.split("."):
        owner = getattr(owner, part)
    return SOURCE_ATTRIBUTE in owner.__code__.co_varnames


def _copying(choose: Callable[..., Any], copy: Copy) -> Callable[..., Any]:
    @functools.wraps(choose)
    def choose_and_copy(hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        chosen = choose(hidden_states, router_logits, *args, **kwargs)
        copy(hidden_states, router_logits, chosen[0], chosen[1])
        return chosen

    return choose_and_copy


class _CurrentLayer:
    """The layer whose kernel is running, for a function that serves all layers."""

    copy: Copy | None = None


def _attach_in_kernel(hook: Hook, layer: MoELayer, copy: Copy) -> None:
    module: Any = importlib.import_module(hook.module)
    current = getattr(module, "specmoe_current", None)
    if current is None:
        current = module.specmoe_current = _CurrentLayer()
        choose = getattr(module, hook.wraps)

        def choose_and_copy(hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            chosen = choose(hidden_states, router_logits, *args, **kwargs)
            if current.copy is not None:
                current.copy(hidden_states, router_logits, chosen[0], chosen[1])
            return chosen

        setattr(module, hook.wraps, choose_and_copy)
    experts = layer.module.routed_experts
    forward = experts.forward_monolithic

    def forward_as_current(*args: Any, **kwargs: Any) -> Any:
        current.copy = copy
        return forward(*args, **kwargs)

    experts.forward_monolithic = forward_as_current
