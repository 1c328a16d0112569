"""Find the MoE layers of a loaded vLLM model and make each layer copy its routing into the recorder's buffers.

`releases` decides which function is wrapped. The copy is the same whether the function is wrapped or its source is patched.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from vllm_patch.releases import SOURCE_ATTRIBUTE, Hook
from vllm_patch.routers.kernels import KernelChoices

Copy = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Called in every forward pass with (router inputs `[T, D]`, router logits `[T, E]`, weights `[T, K]`, ids `[T, K]`)."""


class UnsupportedModelError(Exception):
    """Routing cannot be recorded correctly for this model or engine setting. The message says why and what to do."""


class MoELayer:
    """One MoE layer of a loaded model: the index of its decoder layer, E, K, and the modules that its hook needs."""

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
        # A factor that the model applies to the experts' output, after the router's weights: recorded weights include it.
        self.output_scale = 1.0
        router: Any = getattr(module, "router", None)
        self.top_k = int(router.top_k if hasattr(router, "top_k") else module.top_k)

    @property
    def kernel(self) -> str:
        """The class that computes the layer's experts; in older releases, the class of its quantization method."""
        owner: Any = getattr(self.module, "routed_experts", self.module)
        method: Any = getattr(owner, "quant_method", None)
        kernel = getattr(method, "experts_cls", None)
        return kernel.__name__ if isinstance(kernel, type) else type(owner if method is None else method).__name__

    @property
    def is_monolithic(self) -> bool:
        """Whether the layer's kernel routes internally and bypasses the router."""
        owners: list[Any] = [self.module, getattr(self.module, "quant_method", None)]
        for owner in owners:
            if hasattr(owner, "is_monolithic"):
                return bool(owner.is_monolithic)
        return False

    @property
    def balances_load(self) -> bool:
        """Whether expert ids are remapped to replicas of experts (EPLB)."""
        return bool(getattr(self.module, "enable_eplb", False))


def refuse_unsupported(config: Any) -> None:
    """Raise `UnsupportedModelError` for engine settings that would lose or mislabel rows.

    config: vLLM's `VllmConfig`.
    """
    parallel = config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise UnsupportedModelError("pipeline parallelism splits layers across workers: use pipeline_parallel_size=1")
    if parallel.data_parallel_size > 1:
        raise UnsupportedModelError("data parallelism splits tokens across workers: use data_parallel_size=1")
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise UnsupportedModelError(f"context parallelism splits sequences across workers: use {name}=1")
    if getattr(parallel, "enable_dbo", False) or getattr(parallel, "ubatch_size", 0) > 1:
        raise UnsupportedModelError("micro-batching (DBO) overlaps steps: run without enable_dbo and ubatch_size")
    if getattr(parallel, "enable_expert_parallel", False) and parallel.tensor_parallel_size > 1:
        raise UnsupportedModelError(
            "with expert parallelism, each worker may route only some of the tokens: use enable_expert_parallel=False"
        )
    if getattr(parallel, "distributed_executor_backend", None) == "ray":
        raise UnsupportedModelError("Ray bypasses the worker's execute_model: use distributed_executor_backend='mp'")
    if getattr(config.cache_config, "kv_sharing_fast_prefill", False):
        raise UnsupportedModelError("fast prefill skips tokens in some layers: use kv_sharing_fast_prefill=False")
    if getattr(config.model_config, "enable_prompt_embeds", False):
        raise UnsupportedModelError("prompt embeddings have no token ids to record: use enable_prompt_embeds=False")
    if getattr(config.model_config, "enable_sleep_mode", False):
        raise UnsupportedModelError(
            "sleep mode unloads the model, and what follows was never compared: use enable_sleep_mode=False"
        )
    if getattr(config.model_config, "runner_type", None) == "pooling":
        raise UnsupportedModelError("pooling also routes the last token, which traces leave out: use runner='generate'")
    if getattr(config, "lora_config", None) is not None:
        raise UnsupportedModelError("LoRA adapters change the routing of some requests: run without enable_lora")
    if getattr(config.model_config, "is_diffusion", False):
        raise UnsupportedModelError("diffusion models route each position many times: choose an autoregressive model")
    if os.environ.get("VLLM_MOE_ROUTING_SIMULATION_STRATEGY"):
        raise UnsupportedModelError("vLLM simulates the routing: unset VLLM_MOE_ROUTING_SIMULATION_STRATEGY")


def find_moe_layers(model: torch.nn.Module, hook: Hook, kernels: KernelChoices | None = None) -> list[MoELayer]:
    """The model's MoE layers, in the order of their decoder layers.

    kernels: how their kernels were chosen, for the advice of an error.
    Raises `UnsupportedModelError` if the model has none, if a layer's kernel bypasses the hook, or if layers differ in E or K.
    """
    modules = cast("Iterator[tuple[str, Any]]", model.named_modules())
    method = "select_experts" if hook.owner == "module" else hook.wraps
    found: dict[int, MoELayer] = {}
    for name, module in modules:
        owner = module if hook.owner == "layer" else getattr(module, "router", None)
        # A layer and the runner inside it may share a router. The layer is visited first and wins.
        if hasattr(owner, method) and id(owner) not in found:
            found[id(owner)] = MoELayer(name, module)
    layers = sorted(found.values(), key=lambda layer: layer.index)
    if not layers:
        raise UnsupportedModelError(f"{type(model).__name__} has no MoE layer whose router can be hooked in this vLLM release")
    shapes = {(layer.num_experts, layer.top_k) for layer in layers}
    if len(shapes) > 1:
        raise UnsupportedModelError(f"the MoE layers differ in (experts, top-k): {sorted(shapes)}; expected one shape")
    if len({layer.index for layer in layers}) < len(layers):
        raise UnsupportedModelError(f"several MoE layers in one decoder layer: {[layer.name for layer in layers]}")
    for layer in layers:
        layer.output_scale = _output_scale(model, layer)
        if layer.is_monolithic and hook.owner != "module":
            raise UnsupportedModelError(
                f"layer {layer.index} uses a kernel that routes internally ({layer.kernel}): "
                + (kernels or KernelChoices()).advice(layer.kernel)
            )
        if type(getattr(layer.module, "router", None)).__name__ == "ZeroExpertRouter" or getattr(
            layer.module, "zero_expert_num", None
        ):
            raise UnsupportedModelError(f"layer {layer.index} has zero experts, which vLLM renumbers before the hook sees them")
        if layer.balances_load and not hook.logical:
            raise UnsupportedModelError("in this release, expert load balancing hides the model's own expert ids: disable EPLB")
    return layers


def _output_scale(model: torch.nn.Module, layer: MoELayer) -> float:
    """The `routed_scaling_factor` that multiplies the experts' output; 1 if the router's weights already include it.

    From vLLM 0.24 on, the runner has its own factor for the output. Before, the model's MoE block multiplies the output, unless
    the layer passes the factor to its router.
    """
    module = layer.module
    if hasattr(module, "routed_experts"):
        return float(getattr(module, "routed_scaling_factor", None) or 1.0)
    block: Any = model.get_submodule(layer.name.rpartition(".")[0])
    factor, included = (getattr(owner, "routed_scaling_factor", None) or 1.0 for owner in (block, module))
    return float(factor) / float(included)


def attach(hook: Hook, layer: MoELayer, copy: Copy) -> None:
    """Make `layer` call `copy` each time it has selected experts."""
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


def _copying(select: Callable[..., Any], copy: Copy) -> Callable[..., Any]:
    @functools.wraps(select)
    def select_and_copy(hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        selected = select(hidden_states, router_logits, *args, **kwargs)
        copy(hidden_states, router_logits, selected[0], selected[1])
        return selected

    return select_and_copy


class _CurrentLayer:
    """The layer whose kernel is running, for a selection function that all layers share."""

    copy: Copy | None = None


def _attach_in_kernel(hook: Hook, layer: MoELayer, copy: Copy) -> None:
    module: Any = importlib.import_module(hook.module)
    current = getattr(module, "specmoe_current", None)
    if current is None:
        current = module.specmoe_current = _CurrentLayer()
        select = getattr(module, hook.wraps)

        def select_and_copy(hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            selected = select(hidden_states, router_logits, *args, **kwargs)
            if current.copy is not None:
                current.copy(hidden_states, router_logits, selected[0], selected[1])
            return selected

        setattr(module, hook.wraps, select_and_copy)
    experts = layer.module.routed_experts
    forward = experts.forward_monolithic

    def forward_as_current(*args: Any, **kwargs: Any) -> Any:
        current.copy = copy
        return forward(*args, **kwargs)

    experts.forward_monolithic = forward_as_current
