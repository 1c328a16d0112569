"""Record routing with `transformers`, by forward hooks on the routers: the reference for vLLM, and the engine without it."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from profiler.capture.requests import REQUESTS_FILE, CapturedRequest
from profiler.engines import AUTO_BACKEND, Completion, EngineOptions, Prompt, Sampling
from profiler.engines.low_memory import place, quantize_experts
from profiler.errors import EngineError, EngineUsageError, ModelError, counted, first_line
from profiler.models.deepseek_v1 import local_rewriting
from profiler.models.moe_modules import MoEBlock, find_moe_blocks, find_output_scale, selection
from profiler.models.resolve import ResolvedModel
from profiler.trace.stream import RoutingWriter

BATCH = 16
OnRouterInput = Callable[[MoEBlock, torch.Tensor], torch.Tensor | None]
"""Called with an MoE layer and its router's input `[T, D]`. The router gets what it returns, or its own input if None."""


class TransformersEngine:
    """`Engine` over `AutoModelForCausalLM`.

    It generates in batches, then records the routing of each sequence in one forward pass over all its tokens.
    """

    name = "transformers"
    hook = "forward hooks on the routers"

    def __init__(self, model: ResolvedModel, options: EngineOptions) -> None:
        if options.capture.logits or options.capture.hidden_layers:
            raise EngineUsageError("capture of logits and router inputs needs the engine vllm")
        if options.moe_backend != AUTO_BACKEND:
            raise EngineUsageError(f"moe_backend {options.moe_backend!r} is an option of vLLM: use the engine vllm")
        location = model.location
        if model.metadata.architecture == "DeepseekForCausalLM":
            name = re.sub(r"[^\w.-]+", "--", model.metadata.id)
            location = str(local_rewriting(location, model.metadata.revision, name, say=lambda text: None))
        revision = None if Path(location).is_dir() else model.metadata.revision
        self.versions = {name: version(name) for name in ("transformers", "torch")}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(location, revision=revision)
            self._model = AutoModelForCausalLM.from_pretrained(
                location, revision=revision, dtype="auto" if options.dtype == "auto" else getattr(torch, options.dtype)
            ).eval()
        except (OSError, ValueError) as error:
            raise ModelError(f"transformers cannot load {model.location}: {first_line(error)}") from error
        self.moe_kernels: dict[str, str | None] = {}
        self.notes: list[str] = []
        if options.load_in is not None:
            layers = quantize_experts(self._model, options.load_in)
            self.notes.append(
                f"the experts of {layers} layers are quantized to {options.load_in.removesuffix('bit')} bits; nothing else is"
            )
        if torch.cuda.is_available():
            on_host = place(self._model, torch.device("cuda"), offload=options.offload)
            if on_host:
                self.notes.append(f"{counted(on_host, 'layer')} stay in host memory and are computed there")
        elif options.offload:
            self.notes.append("no GPU: offloading has no effect, since all layers are in host memory")
        self.dtype = str(self._model.dtype).removeprefix("torch.")
        self.compiled = False
        self._batch = options.batch or BATCH
        self.max_length = options.max_length or model.max_length
        self.moe_layers = [block.layer for block in moe_blocks(self._model)]
        ids_TLK, _ = route(self._model, [0, 0])
        self.top_k = ids_TLK.shape[-1]
        self.num_experts = moe_blocks(self._model)[0].num_experts
        self._model_facts = model.metadata

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        run: Path,
        on_finished: Callable[[Completion], None],
        on_rejected: Callable[[int, str], None],
        hidden_tokens: int = 0,
    ) -> dict[str, Any]:
        torch.manual_seed(sampling.seed)
        vocabulary = self._model.get_input_embeddings().num_embeddings
        accepted = []
        for prompt in prompts:
            if prompt.token_ids and max(prompt.token_ids) < vocabulary:
                accepted.append(prompt)
            else:
                reason = (
                    f"it has a token that the model, with {vocabulary}, does not know" if prompt.token_ids else "it is empty"
                )
                on_rejected(prompt.problem_id, reason)
        facts = {"moe_layers": self.moe_layers, "num_experts": self.num_experts, "top_k": self.top_k}
        with (
            RoutingWriter(run, self._model_facts.model_copy(update=facts)) as writer,
            (run / REQUESTS_FILE).open("w", encoding="utf-8") as requests,
        ):
            for start in range(0, len(accepted), self._batch):
                batch = accepted[start : start + self._batch]
                for prompt, output in zip(batch, self._complete(batch, sampling), strict=True):
                    name = f"problem-{prompt.problem_id}"
                    request = CapturedRequest(prompt.problem_id, name, prompt.problem_id, prompt.token_ids, cached_tokens=0)
                    requests.write(request.to_json() + "\n")
                    requests.flush()
                    token_ids = prompt.token_ids + output
                    ids_TLK, weights_TLK = route(self._model, token_ids[:-1])
                    writer.add(prompt.problem_id, np.arange(len(token_ids) - 1), ids_TLK, weights_TLK)
                    stopped = not sampling.ignore_eos and output[-1] in self._end_tokens
                    on_finished(
                        Completion(
                            problem_id=prompt.problem_id,
                            token_ids=output,
                            text=self._tokenizer.decode(output, skip_special_tokens=True),
                            finish_reason="stop" if stopped else "length",
                        )
                    )
        return {}

    def close(self) -> None:
        del self._model

    @property
    def _end_tokens(self) -> set[int]:
        end = self._model.generation_config.eos_token_id
        return {end} if isinstance(end, int) else set(end or [])

    def _complete(self, batch: list[Prompt], sampling: Sampling) -> list[list[int]]:
        longest = max(len(prompt.token_ids) for prompt in batch)
        end_tokens = self._end_tokens
        pad = min(end_tokens, default=0)
        tokens_BT = torch.full((len(batch), longest), pad)
        mask_BT = torch.zeros_like(tokens_BT)
        for row, prompt in enumerate(batch):
            tokens_BT[row, longest - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask_BT[row, longest - len(prompt.token_ids) :] = 1
        choice: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            choice = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.ignore_eos:
            choice["eos_token_id"] = None
        output_BT = self._model.generate(
            tokens_BT.to(self._model.device),
            attention_mask=mask_BT.to(self._model.device),
            max_new_tokens=max(prompt.max_new_tokens for prompt in batch),
            pad_token_id=pad,
            **choice,
        )
        rows = zip(output_BT[:, longest:].tolist(), batch, strict=True)
        return [self._until_end(row[: prompt.max_new_tokens], sampling) for row, prompt in rows]

    def _until_end(self, output: list[int], sampling: Sampling) -> list[int]:
        if not sampling.ignore_eos:
            for position, token in enumerate(output):
                if token in self._end_tokens:
                    return output[: position + 1]
        return output


_OUTPUT_SCALES: WeakKeyDictionary[torch.nn.Module, float] = WeakKeyDictionary()


def _output_scale(block: MoEBlock) -> float:
    if block.block not in _OUTPUT_SCALES:
        _OUTPUT_SCALES[block.block] = find_output_scale(block)
    return _OUTPUT_SCALES[block.block]


def moe_blocks(model: torch.nn.Module) -> list[MoEBlock]:
    """The model's MoE layers, in order. Raises `ModelError` if it has none."""
    blocks = find_moe_blocks(model)
    if not blocks:
        raise ModelError(f"{type(model).__name__} has no routers: choose a mixture-of-experts model")
    return blocks


@torch.inference_mode()
def route(
    model: Any,
    token_ids: list[int],
    on_router_input: OnRouterInput | None = None,
) -> tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.float32]]:
    """Expert ids and weights `[T, L, K]` of one sequence, as the model applies them.

    Where the MoE block multiplies the experts' output by a factor, so are the weights.
    on_router_input: called layer by layer; see `OnRouterInput`.
    Raises `ModelError` if the model has no routers, and `EngineError` if neither the experts' inputs nor the routers' outputs
    have ids and weights.
    """
    blocks = moe_blocks(model)
    readings = [_Reading(block, on_router_input) for block in blocks]
    hooks = [hook for reading in readings for hook in reading.hooks()]
    try:
        model(input_ids=torch.tensor([token_ids], device=model.device), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    pairs = [reading.ids_and_weights() for reading in readings]
    # Layers may be on different devices.
    ids_TLK = torch.stack([ids.cpu() for ids, _ in pairs], dim=1)
    weights_TLK = torch.stack([weights.float().cpu() for _, weights in pairs], dim=1)
    return ids_TLK.numpy(), weights_TLK.numpy()


class _Reading:
    """Hooks on one MoE layer, and what they saw in a forward pass."""

    def __init__(self, block: MoEBlock, on_router_input: OnRouterInput | None) -> None:
        self._block, self._on_router_input = block, on_router_input
        self._pair: tuple[torch.Tensor, torch.Tensor] | None = None
        self._output: Any = None

    def hooks(self) -> list[Any]:
        return [
            self._block.gate.register_forward_pre_hook(self._show_input),
            self._block.router.register_forward_hook(self._keep_output),
            self._block.experts.register_forward_pre_hook(self._keep_pair),
        ]

    def ids_and_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._pair is None:
            return _ids_and_weights(self._block.router, self._output)
        ids, weights = self._pair
        return ids, weights.float() * _output_scale(self._block)

    def _show_input(self, _gate: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        changed = self._on_router_input(self._block, inputs[0].flatten(0, -2)) if self._on_router_input is not None else None
        return None if changed is None else (changed.to(inputs[0].dtype).reshape(inputs[0].shape), *inputs[1:])

    def _keep_output(self, _router: torch.nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        self._output = output

    def _keep_pair(self, _experts: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        self._pair = selection(inputs)


def _ids_and_weights(router: Any, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert ids and weights `[T, K]` in the output of a router whose experts get neither.

    Llama 4's router returns scores `[T, E]`, zero except for the chosen experts; the `top_k` largest are taken.
    Raises `EngineError` for any other output.
    """
    scores = output[0] if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor) else None
    top_k = getattr(router, "top_k", None)
    if scores is not None and isinstance(top_k, int) and (scores != 0).sum(-1).max() <= top_k:
        weights, ids = scores.flatten(0, -2).topk(top_k, dim=-1)
        return ids, weights
    raise EngineError("the experts of this model get no expert ids and weights: use the engine vllm")
