"""Find a model by short name, folder or hub id, and read its MoE facts from its `config.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from profiler.errors import ModelError, ModelUsageError, first_fault, first_line
from profiler.models.built import built_facts, check_config_sizes
from profiler.models.registry import MODELS, QUANTIZE_PRECISION, ModelEntry, checkpoint, quantized_checkpoint
from profiler.trace.schema import ModelMetadata

DEMO_MODEL = "demo"

# Model types without a `norm_topk_prob` entry whose code always renormalizes the top-k weights to sum 1.
_ALWAYS_RENORMALIZED = {"mixtral", "gpt_oss"}


@dataclass(frozen=True)
class ResolvedModel:
    """A model that an engine can load, and facts from its config.

    location: a folder or hub id. max_length: maximum tokens per sequence. hidden_size: D; 0 if the config does not say.
    latent_attention: whether it has multi-head latent attention.
    """

    location: str
    metadata: ModelMetadata
    max_length: int
    hidden_size: int
    latent_attention: bool = False


def demo_model_folder() -> Path:
    """The folder of the embedded demo model inside the installed package."""
    return Path(str(resources.files("profiler").joinpath("demo", "model")))


def resolve_model(name: str, *, dtype: str = "auto", revision: str | None = None, precision: str = "auto") -> ResolvedModel:
    """Find a model by short name, local folder or hub id, and read its MoE facts.

    precision: which checkpoint of a model known by short name; `auto` is the precision in which it was published.
    Raises `ModelError` if the model is unknown, or if its config cannot be read, has no routed experts, or contradicts the
    registry.
    """
    entry = MODELS.get(name)
    location, is_self_quantized = str(demo_model_folder()) if name == DEMO_MODEL else name, False
    if entry is not None:
        if precision != "auto" and precision not in entry.precisions:
            raise ModelUsageError(f"{name} has no {precision} checkpoint: expected one of {', '.join(entry.precisions)}")
        precision = entry.precisions[0] if precision == "auto" else precision
        location, is_self_quantized = checkpoint(entry, precision), precision not in entry.checkpoints
    elif precision == QUANTIZE_PRECISION and "/" in name and not Path(name).is_dir():
        location, is_self_quantized = str(quantized_checkpoint(name, precision)), True
    elif precision != "auto":
        raise ModelUsageError(
            f"a precision can be chosen only for a registered model, which {name!r} is not (see 'specmoe models')"
        )
    if is_self_quantized and not Path(location).is_dir():
        raise ModelError(
            f"no {precision} checkpoint of {name} is public, and {location} does not exist: create one with "
            f"modal run modal_jobs/quantize.py --model {name}"
        )
    is_folder = Path(location).is_dir()
    if not is_folder and "/" not in location:
        known = ", ".join([DEMO_MODEL, *MODELS])
        raise ModelUsageError(f"unknown model {name!r}: expected one of {known}, a local folder, or a hub id like org/name")
    if is_folder and not (Path(location) / "config.json").is_file():
        raise ModelError(f"{location} is not a model folder: it has no config.json")
    config = _read_config(location, revision)
    if not is_folder:
        revision = _commit(location, revision) or revision
    # The registry and the embedded model are checked facts; building a model takes seconds, most of them for importing torch.
    facts = moe_facts(config, build=entry is None and name != DEMO_MODEL)
    try:
        model = _resolved(name, location, config, facts, dtype, revision)
        if is_self_quantized:
            # Not the folder, which exists only on this machine.
            named = model.metadata.model_copy(update={"id": f"{name}-{precision}"})
            model = replace(model, metadata=named)
    except (ValidationError, TypeError, ValueError) as error:
        reason = first_fault(error) if isinstance(error, ValidationError) else first_line(error)
        raise ModelError(f"the config of {location} is not valid: {reason}") from error
    if entry is not None:
        check_facts(entry, model)
    return model


def loaded_model(location: str, revision: str | None, loaded: Mapping[str, Any]) -> ModelMetadata:
    """Metadata of a model that an engine has loaded, from a folder or hub id.

    loaded: `moe_layers`, `num_experts` and `top_k` as the engine's worker found them in the model's modules; they take
    precedence over the config, which adds what it can; no error in it is raised.
    """
    facts = {name: loaded[name] for name in ("moe_layers", "num_experts", "top_k")}
    try:
        config = _read_config(location, revision)
        text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
        layers = text.get("num_hidden_layers")
        extra = {"num_layers": layers if isinstance(layers, int) else None} | _weight_facts(text)
        found = None if Path(location).is_dir() else _commit(location, revision)
        return _resolved(location, location, config, extra | facts, "auto", found or revision).metadata
    except (ModelError, ValidationError, TypeError, ValueError):
        return ModelMetadata(id=location, revision=revision, **facts)


def check_facts(entry: ModelEntry, model: ResolvedModel) -> None:
    """Raise `ModelError`, naming the first difference, if the registry and the loaded config disagree."""
    facts = {
        "layers": (entry.layers, model.metadata.num_layers),
        "MoE layers": (entry.moe_layers, model.metadata.moe_layers),
        "experts": (entry.experts, model.metadata.num_experts),
        "experts per token": (entry.top_k, model.metadata.top_k),
        "renormalized": (entry.renormalized, model.metadata.renormalized),
        "hidden size": (entry.hidden, model.hidden_size or None),
    }
    for fact, (expected, found) in facts.items():
        if expected != found and expected is not None and found is not None:
            raise ModelError(
                f"{model.location}: its config says {fact} {found}, the registry has {expected} for {entry.name}: this is "
                "another model than the registry's; to use it as it is, name it by its hub id or folder"
            )


def _resolved(
    name: str, location: str, config: dict[str, Any], facts: dict[str, Any], dtype: str, revision: str | None
) -> ResolvedModel:
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise ValueError(f"quantization_config is {quantization!r}, expected an object")
    metadata = ModelMetadata(
        id=name if name == DEMO_MODEL else location,
        revision=revision,
        architecture=(config.get("architectures") or [None])[0],
        dtype=config.get("dtype") or config.get("torch_dtype") if dtype == "auto" else dtype,
        quantization=quantization.get("quant_method"),
        **facts,
    )
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else config
    length, hidden_size = int(text.get("max_position_embeddings") or 2048), _first(text, "hidden_size") or 0
    return ResolvedModel(location, metadata, length, hidden_size, latent_attention=bool(text.get("kv_lora_rank")))


def moe_facts(config: dict[str, Any], *, build: bool = True) -> dict[str, Any]:
    """Read MoE facts from the content of a `config.json`; the keys are the fields of `ModelMetadata`.

    The entries' usual names give MoE layers, E and K. With `build`, the model that `transformers` builds from the config,
    without weights, takes precedence over them: families name and combine these entries in many ways.
    Raises `ModelError` if the model is dense, if neither way finds its experts, or if there are more than any model has.
    """
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    architecture = (config.get("architectures") or text.get("architectures") or [config.get("model_type", "this model")])[0]
    check_config_sizes(config)
    if text.get("is_encoder_decoder"):
        raise ModelError(f"{architecture} has an encoder and a decoder, which cannot be recorded: choose a decoder-only model")
    named: dict[str, Any] | ModelError
    try:
        named = _named_facts(text, architecture)
    except ModelError as error:
        named = error
    built = built_facts(config) if build else None
    facts = named if isinstance(named, dict) else {}
    if built is not None and not built.moe_layers:
        raise ModelError(f"{architecture} has no routed experts (a dense model): choose a mixture-of-experts model")
    if built is not None:
        found = {"moe_layers": built.moe_layers, "num_experts": built.num_experts, "num_layers": built.num_layers}
        facts = facts | found | ({} if built.top_k is None else {"top_k": built.top_k})
    if isinstance(named, ModelError) and not {"moe_layers", "top_k"} <= facts.keys():
        raise named
    return facts | _weight_facts(text)


def _named_facts(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """Layers, MoE layers, E and K from the entries' usual names.

    Knows the names used by Mixtral, Phi-MoE, gpt-oss, Qwen2/3-MoE, OLMoE and DeepSeek v1 to v3.
    Raises `ModelError` if an entry is missing or has an impossible value.
    """
    experts = _first(config, "num_local_experts", "num_experts", "n_routed_experts")
    top_k = _first(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk")
    layers = _first(config, "num_hidden_layers")
    if experts is None and any("expert" in name and value for name, value in config.items()):
        raise ModelError(f"{architecture}: its config does not say which layers have experts in a way this version knows")
    if experts is None or experts < 2:
        raise ModelError(f"{architecture} has no routed experts (a dense model): choose a mixture-of-experts model")
    if not top_k or not layers:
        raise ModelError(f"{architecture}: its config.json lacks num_experts_per_tok or num_hidden_layers")
    # Qwen: every `decoder_sparse_step`-th layer, counted from 1, except `mlp_only_layers`.
    # DeepSeek: from `first_k_dense_replace` on, every `moe_layer_freq`-th layer, counted from 0.
    sparse_step = _first(config, "decoder_sparse_step") or 1
    frequency = _first(config, "moe_layer_freq") or 1
    first = _first(config, "first_k_dense_replace") or 0
    dense = set(config.get("mlp_only_layers") or [])
    moe_layers = [
        layer
        for layer in range(layers)
        if layer not in dense and (layer + 1) % sparse_step == 0 and layer >= first and layer % frequency == 0
    ]
    if not moe_layers:
        raise ModelError(f"{architecture}: its config.json defines no MoE layer among {layers} layers")
    return {"num_layers": layers, "moe_layers": moe_layers, "num_experts": experts, "top_k": top_k}


def _weight_facts(config: dict[str, Any]) -> dict[str, Any]:
    """How the model treats routing weights; None where the config has no entry that says it."""
    renormalized = True if config.get("model_type") in _ALWAYS_RENORMALIZED else config.get("norm_topk_prob")
    # routed_scaling_factor, router_scaling_factor, moe_routed_scaling_factor, route_scale, ...
    factors = [value for name, value in config.items() if re.fullmatch(r"(moe_)?route[dr]?_(scaling_factor|scale)", name)]
    factor = next((x for x in factors if isinstance(x, int | float) and not isinstance(x, bool) and x > 0), None)
    return {"renormalized": renormalized, "routed_scaling_factor": None if factor is None else float(factor)}


def _first(config: dict[str, Any], *names: str) -> int | None:
    """The first of these entries that the config has. Raises `ModelError` unless it is a whole number and not negative."""
    for name in names:
        value = config.get(name)
        if value is not None:
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ModelError(f"config.json: {name} is {str(value)[:40]!r}, expected a whole number")
            return value
    return None


def _read_config(location: str, revision: str | None) -> dict[str, Any]:
    # Imported late: transformers takes a second to import, which reading a trace must not pay for.
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(location, revision=revision)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ModelError(f"cannot read the config of model {location!r}: {reason}") from error
    if not config:
        raise ModelError(f"model {location!r} has no config.json: expected a local folder or an existing hub id")
    return dict(config)


def _commit(hub_id: str, revision: str | None) -> str | None:
    """The commit from which a hub model's config was read: the name of the snapshot folder in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None
