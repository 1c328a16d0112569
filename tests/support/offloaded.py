"""Models with and without offloaded experts, for comparison."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging

from speculation.runtime.assembly import experts_forward
from speculation.runtime.model_loading import EXPERTS_IMPLEMENTATION, experts_modules
from speculation.runtime.storage.integer_groups import IntegerGroups
from speculation.runtime.storage.layout import ExpertLayout, Weights, allocate


def resident_model(folder: Path, dtype: torch.dtype = torch.float32, expert_bits: int | None = None) -> Any:
    """The model with all experts in memory, rounded to so many bits or as they are, computed by the same experts function.

    Its experts are copied, so that they are aligned like those of a cache: products on a CPU round differently where a weight
    begins in the middle of a cache line, as it does in a file that is mapped into memory.
    """
    logging.disable_progress_bar()
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data = parameter.data.clone()
    if expert_bits is not None:
        round_experts(model, expert_bits)
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    return model


def round_experts(model: Any, bits: int) -> None:
    """Give the experts of a model the weights that they have after they are packed to integers and unpacked."""
    for found in experts_modules(model):
        packing = IntegerGroups(bits, found.layout, found.is_transposed)
        packed, plain = empty_expert(packing.layout), empty_expert(packing.plain)
        parameters = dict(model.get_submodule(found.name).named_parameters())
        for expert in range(found.num_experts):
            packing.pack({name: value.data[expert] for name, value in parameters.items()}, packed)
            packing.unpack(packed, plain)
            for name, value in parameters.items():
                value.data[expert] = plain[name]


def empty_expert(layout: ExpertLayout) -> Weights:
    """Memory for the weights of an expert, by name."""
    return layout.views(allocate(layout, 1, torch.device("cpu"))[0])


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


def allocated(work: Callable[[], object]) -> int:
    """The most bytes of tensors on the CPU that a function has in use at a time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    used = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            used += event.nbytes()
            most = max(most, used)
    return most
