"""Sizes of a model that is not in the registry, from its Hugging Face `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from profiler.errors import ModelError, first_line, printable
from profiler.models.built import built_sizes
from profiler.models.registry import ModelEntry
from profiler.models.resolve import moe_facts

MAX_CONFIG_BYTES = 4 << 20
# The precision of a quantized checkpoint, by `quant_method` if that determines it, or else by its bits.
_BY_METHOD = {"mxfp4": "mxfp4", "fp8": "int8", "fbgemm_fp8": "int8"}
_BY_BITS = {4: "int4", 8: "int8"}
_FOUR_BITS = {"awq": "awq", "gptq": "gptq"}
# Kinds of layers without keys and values.
_NO_KEYS = ("linear", "mamba", "conv", "recurrent", "moe", "mlp")


def entry_of_config(path: Path, precision: str | None = None) -> ModelEntry:
    """Read a model's sizes from its `config.json` and from the model that `transformers` builds from it, without weights.

    The entry has the number of MoE layers, not their places: they count as the last ones.

    Args:
        path: A `config.json`, or the folder that has it.
        precision: Precision of the weights. Default: what the config says.

    Raises:
        ModelError: The file is not such a config, the model is dense, `transformers` cannot build it, or the config does not
            state the precision.
    """
    path = path / "config.json" if path.is_dir() else path
    config = _read(path)
    facts = moe_facts(config)
    precision = precision or precision_of(config, path)
    sizes = built_sizes(config)
    if sizes is None:
        raise ModelError(
            f"{path}: the sizes of its experts are unknown: transformers is not installed, cannot build this model from its "
            "config, or builds it without experts that can be recognized"
        )
    text = sizes.config
    layers, moe_layers, experts = int(facts["num_layers"]), len(facts["moe_layers"]), int(facts["num_experts"])
    hidden = int(text["hidden_size"])
    unused = moe_layers * (experts - int(facts["top_k"])) * sizes.routed_expert
    kv_bytes, window, window_kv_bytes = kv_cache_of(text, int(text.get("num_hidden_layers") or layers))
    return ModelEntry(
        name=path.parent.resolve().name if path.name == "config.json" else path.stem,
        checkpoints={precision: str(path)},
        layers=layers,
        dense_layers=layers - moe_layers,
        experts=experts,
        top_k=int(facts["top_k"]),
        renormalized=facts["renormalized"],
        context=int(text.get("max_position_embeddings") or 0) or 2048,
        hidden=hidden,
        # Of three matrices and no biases; as many parameters as the real expert has.
        expert_width=round(sizes.routed_expert / (3 * hidden)),
        parameters=sizes.parameters / 1e9,
        active=(sizes.parameters - sizes.input_embedding - unused) / 1e9,
        kv_bytes=kv_bytes,
        window=window,
        window_kv_bytes=window_kv_bytes,
    )


def precision_of(config: dict[str, Any], path: Path) -> str:
    """The entry of `PRECISIONS` for the weights of a checkpoint, from its config. path: of the config, for messages.

    Raises:
        ModelError: The weights are quantized, and the config does not say to how many bits, or to a number that has no entry.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return "bf16"
    if not isinstance(quantization, dict):
        raise ModelError(f"{path}: quantization_config: expected an object; choose a precision")
    method = str(quantization.get("quant_method"))
    if method in _BY_METHOD:
        return _BY_METHOD[method]
    bits = _bits_of(quantization)
    # The default of transformers' AwqConfig.
    if method == "awq" and not bits:
        bits = {4}
    found = {_FOUR_BITS.get(method, "int4") if each == 4 else _BY_BITS.get(each) for each in bits}
    precision = found.pop() if len(found) == 1 else None
    if precision is None:
        said = f"weights of {' and '.join(map(str, sorted(bits)))} bits" if bits else "no number of bits that is known"
        raise ModelError(f"{path}: quantized by {printable(method)}, {said}: choose a precision")
    return precision


def _bits_of(quantization: dict[str, Any]) -> set[int]:
    """The bits of weights that a `quantization_config` names: several if layers differ, none if it does not say."""
    named = [quantization.get("bits"), quantization.get("w_bit")]
    named += [bits for bits in (8, 4) if quantization.get(f"load_in_{bits}bit") is True]
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        named.append(weights.get("num_bits") if isinstance(weights, dict) else None)
    return {bits for bits in named if type(bits) is int}


def kv_cache_of(config: dict[str, Any], layers: int) -> tuple[int, int | None, int]:
    """Keys and values of one token in 16 bits, all layers together.

    Knows grouped-query attention, multi-head latent attention (`kv_lora_rank`: the latent vector and the rotary key are kept,
    DeepSeek-V2, arXiv 2405.04434), sliding windows, chunked attention, and layers without keys (linear attention, Mamba).

    Args:
        config: The entries of a text model's config.
        layers: Number of decoder layers.

    Returns:
        Bytes per token; the tokens that layers with a window see, None if there are none; and how many of the bytes are theirs.

    Raises:
        ModelError: The config lacks the sizes of the attention.
    """
    kinds = _kinds_of_layers(config, layers)
    latent = config.get("kv_lora_rank")
    if latent:
        values = int(latent) + int(config.get("qk_rope_head_dim") or 0)
    else:
        heads = config.get("num_attention_heads")
        if not heads or not config.get("hidden_size"):
            raise ModelError("the config has no num_attention_heads or hidden_size: the size of its KV cache is unknown")
        width = config.get("head_dim") or config["hidden_size"] // heads
        values = 2 * int(config.get("num_key_value_heads") or heads) * int(width)
    windowed = sum(kind == "window" for kind in kinds)
    attending = sum(kind != "none" for kind in kinds)
    window = config.get("sliding_window") or config.get("attention_chunk_size")
    return attending * values * 2, int(window) if windowed and window else None, windowed * values * 2 if window else 0


def _kinds_of_layers(config: dict[str, Any], layers: int) -> list[str]:
    """`full`, `window` or `none` for each layer."""
    named = config.get("layer_types") or config.get("layers_block_type")
    if isinstance(named, list) and len(named) == layers:
        return [
            "none"
            if any(word in str(kind) for word in _NO_KEYS)
            else "window"
            if "sliding" in str(kind) or "chunked" in str(kind)
            else "full"
            for kind in named
        ]
    # Mistral: a window in every layer. Qwen: only if use_sliding_window, from the layer max_window_layers on.
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return ["full"] * layers
    first = int(config.get("max_window_layers") or 0)
    return ["full" if layer < first else "window" for layer in range(layers)]


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelError(f"{path} is larger than {MAX_CONFIG_BYTES >> 20} MiB: not a model's config")
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: expected a model's config.json: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: expected a model's config.json, an object")
    return config
