"""Inference engines: they run a model over prompts and write its routing to a capture folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from profiler.capture.options import CaptureOptions
from profiler.errors import EngineUsageError
from profiler.models.resolve import ResolvedModel

# The value of vLLM's option `moe_backend` that leaves the choice to vLLM.
AUTO_BACKEND = "auto"


@dataclass(frozen=True)
class Prompt:
    """One request: its problem, its tokens, and the maximum number of generated tokens."""

    problem_id: int
    token_ids: list[int]
    max_new_tokens: int


@dataclass(frozen=True)
class Completion:
    """What the model generated for one problem. cached_tokens: prompt tokens that came from a prefix cache."""

    problem_id: int
    token_ids: list[int]
    text: str
    finish_reason: str
    cached_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How output tokens are sampled.

    Attributes:
        max_new_tokens: Maximum for every problem; None takes each dataset's own.
        temperature: 0 takes the likeliest token.
        top_p: Tokens are drawn from the likeliest ones whose probabilities add up to this, above 0 and at most 1.
        seed: Of the draws.
        ignore_eos: Generate the maximum even after an end token.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a model is loaded, and what is captured.

    dtype: `auto` or a torch dtype's name. compiled: None for the engine's choice for the device (vllm only). max_length: tokens
    per sequence; None for the model's own limit. prefix_caching: let vLLM reuse shared prefixes; the reused tokens are missing
    from the routing. batch: sequences at a time; None for the engine's choice. load_in: `8bit` or `4bit` quantizes the experts
    while they are loaded (transformers only). offload: layers that do not fit on the GPU stay in host memory (transformers
    only). moe_backend: vLLM's option of this name, which chooses the kernels that compute experts; `auto` for vLLM's choice.
    verbose: show the engine's log.
    """

    dtype: str = "auto"
    compiled: bool | None = None
    max_length: int | None = None
    prefix_caching: bool = False
    capture: CaptureOptions = field(default_factory=CaptureOptions)
    seed: int = 0
    batch: int | None = None
    load_in: str | None = None
    offload: bool = False
    moe_backend: str = AUTO_BACKEND
    verbose: bool = False


class Engine(Protocol):
    """A loaded model.

    moe_layers, num_experts, top_k: facts of the model. An engine that takes them from the config fails in `generate` if the
    loaded modules or the recorded rows contradict them. dtype: the precision that the model runs in. compiled: whether the
    model is compiled. moe_kernels: kernel that computes experts -> the one that vLLM would use without capture, None if it is
    the same; empty for engines without a choice. notes: what a user should know before the run, one line each.
    """

    name: str
    hook: str
    versions: dict[str, str]
    max_length: int
    dtype: str
    compiled: bool
    moe_layers: list[int]
    num_experts: int
    top_k: int
    moe_kernels: dict[str, str | None]
    notes: list[str]

    def encode(self, text: str) -> list[int]:
        """Tokenize a prompt, including the tokenizer's special tokens."""
        ...

    def generate(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        run: Path,
        on_finished: Callable[[Completion], None],
        on_rejected: Callable[[int, str], None],
        hidden_tokens: int = 0,
    ) -> dict[str, Any]:
        """Run all prompts, write their routing to the folder `run`, and report each completion as it finishes.

        on_rejected: called with the problem id of a prompt that the engine does not accept, and the reason; it is not run.
        hidden_tokens: budget of tokens whose router inputs are recorded, if the capture options name hidden layers. In `run`,
        `requests.jsonl` maps the number of every request to its problem id. Returns capture statistics for the metadata.
        Raises `EngineError` if routing could not be captured; rows that were written stay.
        """
        ...

    def close(self) -> None:
        """Free the model and stop the engine's processes."""
        ...


ENGINES = ("vllm", "transformers")


def start_engine(name: str, model: ResolvedModel, options: EngineOptions) -> Engine:
    """Load `model`. Raises `EngineError` if the engine is not installed, `ModelError` if the model does not load."""
    if name == "vllm":
        from profiler.engines.vllm import VllmEngine

        return VllmEngine(model, options)
    if name == "transformers":
        from profiler.engines.transformers import TransformersEngine

        return TransformersEngine(model, options)
    raise EngineUsageError(f"unknown engine {name!r}: expected one of {', '.join(ENGINES)}")
