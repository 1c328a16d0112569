"""A mixture-of-experts model whose experts do not fit on the device: loaded, run, and measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from profiler.errors import ModelError, SpecmoeError, UsageError
from profiler.models.moe_modules import find_moe_blocks
from profiler.models.resolve import resolve_model
from profiler.trace.schema import ModelMetadata
from speculation.data.tasks import Shape
from speculation.offload.cache import ExpertCache
from speculation.offload.state import TIME_CONSTANT, Rule
from speculation.runtime.assembly import (
    check_widths,
    connect,
    fill_cache,
    load_tokenizer,
    open_store,
    shape_of,
)
from speculation.runtime.experts import OffloadedExperts
from speculation.runtime.foresight import NextGatePrefetcher, PredictorPrefetcher, Prefetcher
from speculation.runtime.generation import Generation, Generator, TokenChoice
from speculation.runtime.model_loading import (
    checkpoint_folder,
    experts_modules,
    load_without_experts,
    model_config,
    skeleton,
)
from speculation.runtime.options import (
    COPY,
    HOST,
    NEXT_GATE,
    NONE,
    CacheSize,
    Store,
    check_bits,
    choose_device,
    choose_packings,
    choose_policy,
    load_run_for,
    popularity_ranks,
    weights_dtype,
)
from speculation.runtime.recording import PromptSource, RoutingRecorder
from speculation.runtime.slots import Slots
from speculation.runtime.steps import step_of
from speculation.runtime.storage.checkpoint import checkpoint_tensors, locate_experts
from speculation.runtime.storage.expert_stores import ExpertStore, HostStore
from speculation.runtime.transfers import Transfers
from speculation.training.runs import Run

# The first arguments of every model's forward pass.
_POSITIONAL = ("input_ids", "attention_mask", "position_ids", "past_key_values")


class OffloadedModel:
    """A `transformers` model whose experts are in host memory or on disk, with a cache of them on the device.

    Outputs do not depend on the cache, the policy or the predictor: they are those of the same model with all experts on the
    device, or with all of them rounded to `expert_bits`. `model` can be called like any other model, for example
    `model(input_ids)` or `model.generate(...)`.

    Not supported: tensor parallelism, continuous batching, quantized checkpoints but those in MXFP4, training.

    Attributes:
        model: The `transformers` model.
        tokenizer: Its tokenizer; None if the checkpoint has none.
        experts: What happens in its MoE layers: the counts, and the routing.
        shape: Its sizes.
        metadata: Facts of the model, for a trace.
        capacity: Slots per layer.
        cache_bytes: The size of the cache's memory: slots, buffers, and the room in which a packed expert is unpacked.
        expert_bytes: The size of all experts, packed if they are kept packed.
        expert_bits: 8 or 4 if they were rounded to so many bits; else None.
        reads: How experts are read, in words.
        popularity: Ranks of all experts `[L * E]`; the cache began with the highest of each layer.
        store: `ram` or `disk`.
        prefetcher: What is prefetched; None for nothing.
        prefetcher_run, reuse_run: The trained predictors of what is prefetched and of the policy, if there are any.

    Example:
        >>> from speculation import CacheSize, OffloadedModel
        >>> with OffloadedModel.load("demo", CacheSize(fraction=0.5), store="disk") as offloaded:
        ...     (generation,) = offloaded.generate(["def add(a, b):"], max_new_tokens=8)
        >>> len(generation.token_ids)
        8
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any | None,
        experts: OffloadedExperts,
        store: ExpertStore,
        shape: Shape,
        metadata: ModelMetadata,
        capacity: int,
        expert_bytes: int,
        expert_bits: int | None,
        reads: str,
        popularity: npt.NDArray[np.int64],
        prefetcher: Prefetcher | None,
        runs: tuple[Run | None, Run | None],
    ) -> None:
        self.model, self.tokenizer, self.experts, self.shape, self.metadata = model, tokenizer, experts, shape, metadata
        self.capacity, self.expert_bytes, self.reads, self.popularity = capacity, expert_bytes, reads, popularity
        self.store = Store.ram if isinstance(store, HostStore) else Store.disk
        self.expert_bits, self.cache_bytes = expert_bits, experts.slots.bytes
        self._store = store
        self.prefetcher = prefetcher
        self.prefetcher_run, self.reuse_run = (None if run is None else run.predictor for run in runs)
        self._generator = Generator(model, tokenizer)
        self._hooks = [
            model.register_forward_pre_hook(self._begin_step, with_kwargs=True),
            model.register_forward_hook(self._end_step, always_call=True),
        ]

    @classmethod
    def load(
        cls,
        name: str,
        cache: CacheSize,
        *,
        store: str = Store.ram,
        miss: str = COPY,
        policy: str | Path = Rule.LRU.label,
        predictor: str | Path | None = None,
        prefetch: int | None = None,
        threshold: float = 0.0,
        device: str | None = None,
        dtype: str = "auto",
        expert_bits: int | None = None,
        time_constant: float = TIME_CONSTANT,
        direct: bool | None = None,
        revision: str | None = None,
    ) -> Self:
        """Load a model: everything but its experts goes to the device, and the cache is filled.

        Args:
            name: A model by short name, folder or hub id.
            cache: The size of the cache.
            store: `ram` or `disk`: where the other experts are.
            miss: What happens to a generated token's expert that the cache lacks: `copy`; or `host`: the CPU computes it, and
                it is copied in the background. `host` needs experts in host memory. On a GPU, the two round differently.
            policy: Which expert is evicted: a policy's name, any but belady; or the directory of a run of the task `reuse`.
            predictor: What is prefetched: the directory of a run, `next-gate`, or None for nothing.
            prefetch: Experts to prefetch per prediction, layer and sequence. Default: K.
            threshold: Only those with at least this predicted probability.
            device: `cuda` or `cpu`. Default: cuda if there is a GPU.
            dtype: `auto` (as in the checkpoint), `float32`, `bfloat16` or `float16`.
            expert_bits: 8 or 4: routed experts are rounded to integers in groups, kept and cached so, and unpacked for each
                computation. Experts in `ram` are packed once; from `disk`, at each read. Default: as in the checkpoint.
            time_constant: Tokens over which `ewma` and `lfu-aged` forget.
            direct: Whether reads from disk bypass the page cache. Default: whichever is faster here, measured.
            revision: Of a hub id.

        Raises:
            SpecmoeError: The model's family, its checkpoint or an option is not supported; the message says why.
        """
        if miss not in (COPY, HOST) or (miss == HOST and store != Store.ram):
            raise UsageError(
                f"miss {miss!r} with experts in {store}: expected {COPY}, or {HOST} with experts in {Store.ram.value}"
            )
        if store not in tuple(Store):
            raise UsageError(f"store {store!r}: expected {' or '.join(Store)}")
        if prefetch is not None and prefetch < 1:
            raise UsageError(f"{prefetch} experts to prefetch: expected at least 1")
        check_bits(expert_bits)
        chosen = choose_device(device)
        resolved = resolve_model(name, revision=revision)
        folder = checkpoint_folder(resolved)
        config, packing = model_config(folder)
        kind = weights_dtype(dtype, config)
        empty = skeleton(config, kind)
        modules = experts_modules(empty, packing)
        packings = choose_packings(expert_bits, modules)
        stored = [module.layout for module in modules]
        layouts = stored if packings is None else [packing.layout for packing in packings]
        located = locate_experts(empty, modules, checkpoint_tensors(folder))
        shape = shape_of(empty, resolved, len(modules), modules[0].num_experts)
        capacity = cache.capacity(layouts, shape.experts, shape.top_k)
        rule, reuse = choose_policy(str(policy), shape)
        prefetching = load_run_for(str(predictor), shape) if predictor not in (None, NONE, NEXT_GATE) else None
        if capacity == shape.experts:
            # Nothing is ever loaded or evicted: there is nothing to choose or to predict.
            rule, reuse, prefetching, predictor = Rule.LRU, None, None, None
        model = load_without_experts(folder, config, kind, chosen, empty)
        flat = [expert for layer in located for expert in layer]
        with contextlib.ExitStack() as undo:
            kept, reads = open_store(Store(store), stored, flat, packings, shape.experts, chosen, direct)
            undo.callback(kept.close)
            slots = Slots(layouts, [capacity] * len(layouts), chosen)
            popularity = popularity_ranks(reuse or prefetching, shape)
            held = ExpertCache(rule, [capacity] * len(layouts), shape.experts, popularity, time_constant)
            transfers = Transfers(held, kept, slots, layouts)
            undo.callback(transfers.close)
            fill_cache(transfers)
            blocks = find_moe_blocks(model)
            prefetcher: Prefetcher | None = None
            if predictor == NEXT_GATE:
                check_widths(blocks)
                prefetcher = NextGatePrefetcher(blocks, shape.top_k, prefetch or shape.top_k, threshold)
            elif prefetching is not None:
                prefetcher = PredictorPrefetcher(prefetching.predictor, prefetch or shape.top_k, threshold)
            host = kept if miss == HOST and isinstance(kept, HostStore) else None
            scorer = None if reuse is None else reuse.predictor
            experts = OffloadedExperts(transfers, slots, shape, prefetcher, scorer, host)
            connect(model, [block.experts for block in blocks], experts)
            loaded = {"moe_layers": [module.layer for module in modules], "num_experts": shape.experts, "top_k": shape.top_k}
            loaded |= {"dtype": str(kind).removeprefix("torch.")}
            if expert_bits is not None:
                loaded["quantization"] = f"experts in {expert_bits} bits"
            metadata = resolved.metadata.model_copy(update=loaded)
            expert_bytes = sum(layout.bytes for layout in layouts) * shape.experts
            offloaded = cls(
                model,
                load_tokenizer(folder),
                experts,
                kept,
                shape,
                metadata,
                capacity,
                expert_bytes,
                expert_bits,
                reads,
                popularity,
                prefetcher,
                (prefetching, reuse),
            )
            undo.pop_all()
        return offloaded

    def encode(self, prompt: str) -> list[int]:
        """The tokens of a prompt.

        Raises:
            ModelError: The checkpoint has no tokenizer.
        """
        if self.tokenizer is None:
            raise ModelError("this checkpoint has no tokenizer: give token ids instead of text")
        return list(self.tokenizer(prompt)["input_ids"])

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str | list[int]],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch: int = 1,
        ignore_eos: bool = False,
        on_token: Callable[[], None] | None = None,
        trace: Path | None = None,
        sources: Sequence[PromptSource] | None = None,
    ) -> list[Generation]:
        """Continue prompts.

        Args:
            prompts: Texts, or lists of token ids.
            max_new_tokens: The most tokens to generate for each.
            temperature: 0 takes the likeliest token; else tokens are drawn.
            top_p: Tokens are drawn from the likeliest ones whose probabilities add up to this.
            seed: Of the draws.
            batch: Prompts that are computed at the same time.
            ignore_eos: Whether to continue after the end token.
            on_token: Called after every step.
            trace: A new directory, for a trace of the routing of all prompts.
            sources: Where each prompt comes from, for the trace.

        Raises:
            SpecmoeError: A prompt is empty, or longer than the model allows.
            EngineError: An expert cannot be read.
            TraceError: The directory of the trace is not free.
        """
        ids = [self.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        for number, tokens in enumerate(ids):
            self._generator.check_prompt(number, tokens, max_new_tokens)
        if batch < 1 or max_new_tokens < 1:
            raise UsageError(f"batch {batch}, {max_new_tokens} new tokens: expected at least 1")
        torch.manual_seed(seed)
        choice = TokenChoice(temperature, top_p, ignore_eos)
        if trace is None:
            return [
                generation
                for start in range(0, len(ids), batch)
                for generation in self._generator.generate_batch(ids[start : start + batch], max_new_tokens, choice, on_token)
            ]
        named = list(sources or [PromptSource(dataset="prompts", source_key=str(n), prompt=None) for n in range(len(ids))])
        facts = {
            "cache_fraction": self.capacity / self.shape.experts,
            "policy": self.experts.cache.rule.label,
            "reads": self.reads,
        }
        settings = {"temperature": temperature, "top_p": top_p, "seed": seed, "ignore_eos": ignore_eos}
        found: list[Generation] = []
        with RoutingRecorder(trace, self.metadata, facts, settings) as recorder:
            self.experts.on_routed = recorder.add
            try:
                for start in range(0, len(ids), batch):
                    some = ids[start : start + batch]
                    recorder.start(len(some))
                    done = self._generator.generate_batch(some, max_new_tokens, choice, on_token)
                    outputs, texts = [each.token_ids for each in done], [(each.text, each.finish_reason) for each in done]
                    recorder.finish(named[start : start + batch], some, outputs, texts)
                    found += done
            finally:
                self.experts.on_routed = None
            recorder.seal()
        return found

    def close(self) -> None:
        """Stop the threads and close the files, if this has not been done. The model cannot be used afterwards."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.experts.close()
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _begin_step(self, _model: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        arguments = dict(zip(_POSITIONAL, positional, strict=False)) | named
        if arguments.get("input_ids") is None:
            raise SpecmoeError("this model's experts are offloaded: call it with input_ids, not with embeddings")
        self.experts.begin_step(step_of(arguments, self._generator.finished_B, self._generator.prompt_tokens))

    def _end_step(self, *_: Any) -> None:
        self.experts.end_step()
