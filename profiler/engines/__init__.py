"""Inference engines that run a model over prompts and leave its routing in a capture folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from profiler.capture.options import CaptureOptions
from profiler.errors import EngineError
from profiler.models.resolve import ResolvedModel


@dataclass(frozen=True)
class Prompt:
    """One request: the problem it belongs to, its tokens, and how many may be generated."""

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
    """How tokens are chosen; temperature 0 is greedy. max_new_tokens: for all problems; None for each dataset's own number."""

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a model is loaded. `compiled` None means the engine's choice for the device.

    batch: sequences at a time; None for the engine's choice. load_in: `8bit` or `4bit` quantizes the weights while they are
    loaded (transformers only). offload: what a GPU has no room for stays in the host's memory (transformers only).
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
    verbose: bool = False


class Engine(Protocol):
    """A loaded model.

    moe_layers, num_experts, top_k: facts of the model; where they come from the config, `generate` refuses a model whose
    loaded modules or recorded rows contradict them. dtype: the precision that it runs in. compiled: whether it is compiled.
    notes: what a user should know before the run, a line each.
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
    notes: list[str]

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt, with the tokenizer's own special tokens."""
        ...

    def generate(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        run: Path,
        on_finished: Callable[[Completion], None],
        hidden_tokens: int = 0,
    ) -> dict[str, Any]:
        """Run all prompts, write their routing to the folder `run`, and report each completion as it finishes.

        hidden_tokens: how many may have their router inputs recorded, where the engine was started to do that. In `run`,
        `requests.jsonl` labels the number of every request with its problem id. Returns how it went, for the metadata.
        Raises `EngineError` if routing could not be captured; what had been written stays.
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
    raise EngineError(f"unknown engine {name!r}: expected one of {', '.join(ENGINES)}")
