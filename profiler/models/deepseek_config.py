"""The configuration of DeepSeek-MoE v1; a module of its own, since importing transformers takes a second."""

from __future__ import annotations

from transformers import PretrainedConfig


class DeepseekConfig(PretrainedConfig):  # type: ignore[misc] # transformers is not followed by the type checker
    """Holds what `config.json` says, under its names. vLLM sends it to its processes, so the class must have a place."""

    model_type = "deepseek"
