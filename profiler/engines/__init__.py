"""Inference engines that run a model over prompts and leave its routing in a capture folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from profiler.capture import CaptureOptions
from profiler.errors import EngineError
from profiler.models import ResolvedModel


@dataclass(frozen=True)
class Prompt:
    """One request: the problem it belongs to, and its tokens."""

    problem_id: int
    token_ids: list[int]


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
    """How tokens are chosen; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a model is loaded. `compiled` None means the engine's choice for the device."""

    dtype: str = "auto"
    compiled: bool | None = None
    max_length: int | None = None
    prefix_caching: bool = False
    capture: CaptureOptions = field(default_factory=CaptureOptions)
    seed: int = 0
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
        self, prompts: list[Prompt], sampling: Sampling, run: Path, on_finished: Callable[[Completion], None]
    ) -> dict[str, Any]:
        """Run all prompts, write their routing to the folder `run`, and report each completion as it finishes.

        In `run`, `requests.jsonl` labels the number of every request with its problem id. Returns how it went, for the
        metadata. Raises `EngineError` if routing could not be captured; what had been written stays.
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
