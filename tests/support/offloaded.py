"""Models with and without offloaded experts, for comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging

from speculation.runtime.assembly import experts_forward
from speculation.runtime.model_loading import EXPERTS_IMPLEMENTATION


def resident_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model with all experts in memory, computed by the same experts function.

    Its experts are copied, so that they are aligned like those of a cache: products on a CPU round differently where a weight
    begins in the middle of a cache line, as it does in a file that is mapped into memory.
    """
    logging.disable_progress_bar()
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data = parameter.data.clone()
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    return model


def plain_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers runs it by default."""
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """The tokens that a model finds likeliest after a prompt, end tokens included."""
    output = model.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
    return [int(token) for token in output[0, len(prompt) :]]


@torch.inference_mode()
def logits(model: Any, tokens_BT: torch.Tensor) -> torch.Tensor:
    """The logits of a forward pass, `[B, T, V]`."""
    found: torch.Tensor = model(tokens_BT).logits
    return found
