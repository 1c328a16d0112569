"""Read MoE facts from the model that `transformers` builds from a config, without weights (on the meta device)."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

from profiler.errors import ModelError
from profiler.trace.schema import MAX_EXPERTS

MAX_LAYERS = 10_000
# Layers times experts, each of which may be a module. Most models have tens of thousands; Doge has 32 layers of 16,384.
MAX_EXPERT_MODULES = 1 << 19
# How an engine should run the model, which could load code, kernels or quantized modules.
_NOT_BUILT = {
    "auto_map",
    "quantization_config",
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
}

_USUAL_NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")


@dataclass(frozen=True)
class BuiltFacts:
    """What the modules say. moe_layers is empty for a dense model. top_k: None if the modules do not have it."""

    num_layers: int | None
    moe_layers: list[int]
    num_experts: int
    top_k: int | None


def built_facts(config: dict[str, Any]) -> BuiltFacts | None:
    """Build the model of a `config.json` on the meta device and look where its experts are.

    Returns None if the facts cannot be found: `transformers` or torch is not installed, does not know the model's type, cannot
    build it from this config, the MoE layers differ in E, or a layer has several sets of experts. Raises `ModelError` if the
    config promises more layers or experts than any model has. No code of the config's repository is run.
    """
    built = _build(config)
    if built is None:
        return None
    from profiler.models.moe_modules import count_layers, find_experts, find_moe_blocks, find_top_k

    model = built.model
    experts = find_experts(model)
    layers = [layer for layer, _ in experts]
    if not experts:
        has_experts = any("expert" in name or "router" in name for name, _ in model.named_modules())
        return None if has_experts else BuiltFacts(None, [], 0, None)
    if len({count for _, count in experts}) > 1 or len(set(layers)) < len(layers) or experts[0][1] < 2:
        return None
    # Some routers have more outputs than there are experts, so that their blocks are not found.
    blocks = find_moe_blocks(model)
    top_k = find_top_k(blocks[0], blocks[0].gate.get_parameter("weight").shape[1]) if blocks else None
    return BuiltFacts(count_layers(model), layers, experts[0][1], top_k)


@dataclass(frozen=True)
class BuiltSizes:
    """Numbers of parameters of a model.

    Attributes:
        parameters: All parameters of the text model.
        routed_expert: Parameters of one routed expert.
        input_embedding: Parameters of the table of input embeddings, of which a token reads one row; 0 if the output layer
            shares it.
        config: The text model's config, with the entries that `transformers` adds, such as each layer's kind of attention, and
            with the usual names of sizes.
    """

    parameters: int
    routed_expert: int
    input_embedding: int
    config: dict[str, Any]


def built_sizes(config: dict[str, Any]) -> BuiltSizes | None:
    """Count the parameters of the model that `transformers` builds from a `config.json`, without weights.

    Returns None, and raises `ModelError`, as `built_facts` does; also None for a dense model.
    """
    built = _build(config)
    if built is None:
        return None
    from profiler.models.moe_modules import find_moe_blocks

    blocks = find_moe_blocks(built.model)
    if not blocks:
        return None
    routed = sum(parameter.numel() for parameter in blocks[0].experts.parameters())
    table = built.model.get_input_embeddings().weight
    output = built.model.get_output_embeddings()
    is_shared = bool(built.text.to_dict().get("tie_word_embeddings")) or output is None
    # Parameters that are tied are one object only once weights are tied, which models on the meta device may not be.
    total = sum(parameter.numel() for parameter in built.model.parameters())
    if is_shared and output is not None and output.weight is not table:
        total -= output.weight.numel()
    # Some families have other names for these, such as d_model.
    usual = {name: getattr(built.text, name, None) for name in _USUAL_NAMES}
    config = built.text.to_dict() | {name: value for name, value in usual.items() if value is not None}
    return BuiltSizes(total, routed // blocks[0].num_experts, 0 if is_shared else table.numel(), config)


@dataclass(frozen=True)
class _Built:
    model: Any
    text: Any


def _build(config: dict[str, Any]) -> _Built | None:
    """The model on the meta device, and the config of its decoder; None if it cannot be built."""
    check_config_sizes(config)
    try:
        import torch
        from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, PretrainedConfig

        entries = _without_defaults(_architecture(config), PretrainedConfig().to_dict())
        whole = CONFIG_MAPPING[str(config.get("model_type"))].from_dict(entries)
        text = whole.get_text_config(decoder=True)
        # Some families have other names for these, such as n_layer.
        check_config_sizes({name: getattr(text, name, None) for name in ("num_hidden_layers", "num_experts")} | text.to_dict())
        text._attn_implementation = "eager"
        options = {"trust_remote_code": False, "attn_implementation": "eager"}
        kind = next((kind for kind in (AutoModelForCausalLM, AutoModel) if type(text) in kind._model_mapping), None)
        with torch.device("meta"):
            model = kind.from_config(text, **options) if kind is not None else _decoder_class(text)(text)
    except ModelError:
        raise
    except Exception:  # a config from elsewhere can make a model's class raise anything
        return None
    return _Built(model, text)


def _decoder_class(text: Any) -> Any:
    """The class of a decoder that `transformers` has only as a part of larger models, such as those that read images.

    Raises `StopIteration` if there is none.
    """
    from transformers import PreTrainedModel

    modeling: Any = importlib.import_module(type(text).__module__.replace(".configuration_", ".modeling_"))
    classes = [found for found in vars(modeling).values() if isinstance(found, type) and issubclass(found, PreTrainedModel)]
    names = {found.__name__: getattr(found, "config_class", None) for found in classes}
    wanted = next(name for name, config in names.items() if config is type(text) and not name.endswith("PreTrainedModel"))
    return getattr(modeling, wanted)


def check_config_sizes(config: dict[str, Any]) -> None:
    """Raise `ModelError` if a config, or a part of it, says more layers or experts than any model has: it must not be built."""
    layers = experts = 1
    for name, value in config.items():
        if isinstance(value, dict):
            check_config_sizes(value)
        if not isinstance(value, int):
            continue
        if name in {"num_hidden_layers", "num_layers", "n_layers", "n_layer"}:
            layers = max(layers, value)
        if re.search(r"(layers?|depth)$", name) and value > MAX_LAYERS:
            raise ModelError(f"config.json says {value} layers ({name}), expected at most {MAX_LAYERS}")
        if "expert" in name and not name.endswith("size"):
            experts = max(experts, value)
            if value > MAX_EXPERTS:
                raise ModelError(f"config.json says {value} experts ({name}), expected at most {MAX_EXPERTS}")
    if layers * experts > MAX_EXPERT_MODULES:
        raise ModelError(
            f"config.json says {layers} layers of {experts} experts, expected at most {MAX_EXPERT_MODULES} experts in all"
        )


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    """The config and its parts without the entries in `_NOT_BUILT`."""
    kept = {name: value for name, value in config.items() if name not in _NOT_BUILT}
    return {name: _architecture(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _without_defaults(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The config without those entries of its parts that are every config's defaults: some parts' classes refuse them."""

    def changed(part: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in part.items() if name not in defaults or defaults[name] != value}

    return {name: changed(value) if isinstance(value, dict) else value for name, value in config.items()}
