"""The configuration class of DeepSeek-MoE v1, in its own module because importing transformers takes a second."""

from __future__ import annotations

from transformers import PretrainedConfig


class DeepseekConfig(PretrainedConfig):  # type: ignore[misc] # mypy does not follow transformers
    """The entries of `config.json` as attributes. vLLM pickles it for its processes, so the class must be importable."""

    model_type = "deepseek"
