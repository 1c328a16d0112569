"""Read MoE facts from the model that `transformers` builds from a config, without weights (on the meta device)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BuiltFacts:
    """What the modules say. moe_layers is empty for a dense model. top_k: None if the modules do not tell."""

    num_layers: int | None
    moe_layers: list[int]
    num_experts: int
    top_k: int | None


def built_facts(config: dict[str, Any]) -> BuiltFacts | None:
    """Build the model of a `config.json` on the meta device and look where its experts are.

    Returns None if this cannot tell: `transformers` or torch is not installed, does not know the model's type, cannot build it
    from this config, or the MoE layers differ in E.
    """
    try:
        import torch
        from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, PretrainedConfig

        from profiler.models.moe_modules import count_layers, find_moe_blocks, find_top_k

        entries = _without_defaults(config, PretrainedConfig().to_dict())
        entries.pop("quantization_config", None)
        whole = CONFIG_MAPPING[str(config.get("model_type"))].from_dict(entries)
        text = whole.get_text_config(decoder=True)
        with torch.device("meta"):
            try:
                model = AutoModelForCausalLM.from_config(text)
            except ValueError:
                model = AutoModel.from_config(text)
    except Exception:  # a config from elsewhere can make a model's class raise anything
        return None
    blocks = find_moe_blocks(model)
    if not blocks:
        has_experts = any("expert" in name for name, _ in model.named_modules())
        return None if has_experts else BuiltFacts(None, [], 0, None)
    if len({block.num_experts for block in blocks}) > 1:
        return None
    top_k = find_top_k(blocks[0], blocks[0].gate.get_parameter("weight").shape[1])
    return BuiltFacts(count_layers(model), [block.layer for block in blocks], blocks[0].num_experts, top_k)


def _without_defaults(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The config without those entries of its parts that are every config's defaults: some parts' classes refuse them."""

    def changed(part: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in part.items() if name not in defaults or defaults[name] != value}

    return {name: changed(value) if isinstance(value, dict) else value for name, value in config.items()}
