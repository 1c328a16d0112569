"""A mixture-of-experts model whose experts do not fit on the device: loaded, run, and measured."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from profiler.errors import EngineError, ModelError, SpecmoeError, first_line
from profiler.models.moe_modules import MoEBlock, find_moe_blocks, find_top_k
from profiler.models.resolve import ResolvedModel, resolve_model
from profiler.trace.schema import ModelMetadata
from speculation.data.tasks import Shape, Task
from speculation.offload.cache import ExpertCache
from speculation.offload.state import TIME_CONSTANT, Rule
from speculation.runtime.checkpoint import checkpoint_tensors, locate_experts
from speculation.runtime.expert_stores import DiskStore, ExpertStore, HostStore, faster_direct
from speculation.runtime.experts import OffloadedExperts
from speculation.runtime.foresight import NextGatePrefetcher, PredictorPrefetcher, Prefetcher
from speculation.runtime.forward import resident_forward
from speculation.runtime.layout import ExpertLayout
from speculation.runtime.model_loading import (
    DTYPES,
    EXPERTS_IMPLEMENTATION,
    checkpoint_folder,
    experts_modules,
    input_width,
    load_without_experts,
    model_config,
    skeleton,
)
from speculation.runtime.recording import PromptSource, RoutingRecorder
from speculation.runtime.slots import BUFFERS, Slots
from speculation.runtime.steps import step_of
from speculation.runtime.transfers import TransferCounts, Transfers
from speculation.training.runs import Run, load_run

NEXT_GATE, NONE = "next-gate", "none"
COPY, HOST = "copy", "host"
# A prompt is computed in parts of this many tokens, as in the simulation: it bounds the memory of activations.
PREFILL_TOKENS = 512
# The first arguments of every model's forward pass.
_POSITIONAL = ("input_ids", "attention_mask", "position_ids", "past_key_values")


class Store(StrEnum):
    """Where experts are kept that are not in the cache."""

    ram = "ram"
    disk = "disk"


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """How many experts are on the device: a share of all, or a size in GB. Exactly one of them is set.

    Attributes:
        fraction: The share, 0 to 1; rounded down to whole experts per layer. With 0, every expert is loaded for each use.
        gigabytes: The size of the memory, buffers included.
    """

    fraction: float | None = None
    gigabytes: float | None = None

    def capacity(self, layouts: Sequence[ExpertLayout], num_experts: int, top_k: int) -> int:
        """Slots per layer.

        Raises:
            SpecmoeError: There is not room for the K experts of one token.
        """
        per_layer = sum(layout.bytes for layout in layouts)
        if (self.fraction is None) == (self.gigabytes is None):
            raise SpecmoeError("the size of the cache: expected either a share or a size in GB")
        if self.fraction is not None:
            if not 0 <= self.fraction <= 1:
                raise SpecmoeError(f"cache fraction {self.fraction}: expected 0 to 1")
            found = int(self.fraction * num_experts + 1e-9)
            if not self.fraction:
                return 0
        else:
            size = (self.gigabytes or 0.0) * 1e9
            if not 0 <= size < inf:
                raise SpecmoeError(f"cache of {self.gigabytes} GB: expected 0 or more")
            buffers = sum(BUFFERS * layout.bytes for layout in dict.fromkeys(layouts))
            found = min(num_experts, int((size - buffers) / per_layer))
        if found < top_k:
            raise SpecmoeError(
                f"a cache of {max(0, found)} of {num_experts} experts per layer cannot hold the {top_k} of one token: choose "
                f"at least a share of {top_k / num_experts:.3g}, or {self._least(layouts, top_k):.3g} GB"
            )
        return found

    def _least(self, layouts: Sequence[ExpertLayout], top_k: int) -> float:
        buffers = sum(BUFFERS * layout.bytes for layout in dict.fromkeys(layouts))
        return (top_k * sum(layout.bytes for layout in layouts) + buffers) / 1e9


@dataclass(frozen=True)
class Generation:
    """What was generated for one prompt.

    Attributes:
        prompt_ids: The prompt's tokens.
        token_ids: The generated tokens, with the end token if it came.
        text: The same as text.
        finish_reason: `stop` if the end token came, else `length`.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str


@dataclass(frozen=True)
class _Sampling:
    temperature: float
    top_p: float
    ignore_eos: bool


class OffloadedModel:
    """A `transformers` model whose experts are in host memory or on disk, with a cache of them on the device.

    Outputs do not depend on the cache, the policy or the predictor: they are those of the same model with all experts on the
    device. `model` can be called like any other model, for example `model(input_ids)` or `model.generate(...)`.

    Not supported: tensor parallelism, continuous batching, quantized checkpoints, training.

    Attributes:
        model: The `transformers` model.
        tokenizer: Its tokenizer; None if the checkpoint has none.
        experts: What happens in its MoE layers: the counts, and the routing.
        shape: Its sizes.
        metadata: Facts of the model, for a trace.
        capacity: Slots per layer.
        cache_bytes: The size of the cache's memory, buffers included.
        expert_bytes: The size of all experts.
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
        reads: str,
        popularity: npt.NDArray[np.int64],
        prefetcher: Prefetcher | None,
        runs: tuple[Run | None, Run | None],
    ) -> None:
        self.model, self.tokenizer, self.experts, self.shape, self.metadata = model, tokenizer, experts, shape, metadata
        self.capacity, self.expert_bytes, self.reads, self.popularity = capacity, expert_bytes, reads, popularity
        self.store = Store.disk if isinstance(store, DiskStore) else Store.ram
        self.cache_bytes = experts.slots.bytes
        self._store = store
        self.prefetcher = prefetcher
        self.prefetcher_run, self.reuse_run = (None if run is None else run.predictor for run in runs)
        self._finished_B: npt.NDArray[np.bool_] | None = None
        self._prompt_tokens = 1
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
            time_constant: Tokens over which `ewma` and `lfu-aged` forget.
            direct: Whether reads from disk bypass the page cache. Default: whichever is faster here, measured.
            revision: Of a hub id.

        Raises:
            SpecmoeError: The model's family, its checkpoint or an option is not supported; the message says why.
        """
        if miss not in (COPY, HOST) or (miss == HOST and store != Store.ram):
            raise SpecmoeError(
                f"miss {miss!r} with experts in {store}: expected {COPY}, or {HOST} with experts in {Store.ram.value}"
            )
        if store not in tuple(Store):
            raise SpecmoeError(f"store {store!r}: expected {' or '.join(Store)}")
        if prefetch is not None and prefetch < 1:
            raise SpecmoeError(f"{prefetch} experts to prefetch: expected at least 1")
        chosen = _device(device)
        resolved = resolve_model(name, revision=revision)
        folder = checkpoint_folder(resolved)
        config, packing = model_config(folder)
        kind = _dtype(dtype, config)
        empty = skeleton(config, kind)
        modules = experts_modules(empty, packing)
        layouts = [module.layout for module in modules]
        located = locate_experts(empty, modules, checkpoint_tensors(folder))
        shape = _shape(empty, resolved, len(modules), modules[0].num_experts)
        capacity = cache.capacity(layouts, shape.experts, shape.top_k)
        rule, reuse = _policy(str(policy), shape)
        prefetching = _run(str(predictor), shape) if predictor not in (None, NONE, NEXT_GATE) else None
        model = load_without_experts(folder, config, kind, chosen, empty)
        flat = [expert for layer in located for expert in layer]
        with contextlib.ExitStack() as undo:
            kept, reads = _open_store(Store(store), layouts, flat, shape.experts, chosen, direct)
            undo.callback(kept.close)
            slots = Slots(layouts, [capacity] * len(layouts), chosen, None if packing is None else kind)
            popularity = _popularity(reuse or prefetching, shape)
            held = ExpertCache(rule, [capacity] * len(layouts), shape.experts, popularity, time_constant)
            transfers = Transfers(held, kept, slots, layouts)
            undo.callback(transfers.close)
            _fill(transfers)
            blocks = find_moe_blocks(model)
            prefetcher: Prefetcher | None = None
            if capacity == shape.experts:
                # Nothing is ever loaded or evicted: there is nothing to predict.
                prefetching = reuse = None
            elif predictor == NEXT_GATE:
                _check_widths(blocks)
                prefetcher = NextGatePrefetcher(blocks, shape.top_k, prefetch or shape.top_k, threshold)
            elif prefetching is not None:
                prefetcher = PredictorPrefetcher(prefetching.predictor, prefetch or shape.top_k, threshold)
            host = kept if miss == HOST and isinstance(kept, HostStore) else None
            scorer = None if reuse is None else reuse.predictor
            experts = OffloadedExperts(transfers, slots, shape, prefetcher, scorer, host)
            _connect(model, [block.experts for block in blocks], experts)
            loaded = {"moe_layers": [module.layer for module in modules], "num_experts": shape.experts, "top_k": shape.top_k}
            metadata = resolved.metadata.model_copy(update=loaded | {"dtype": str(kind).removeprefix("torch.")})
            expert_bytes = sum(layout.bytes for layout in layouts) * shape.experts
            offloaded = cls(
                model,
                _tokenizer(folder),
                experts,
                kept,
                shape,
                metadata,
                capacity,
                expert_bytes,
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
            self._check_prompt(number, tokens, max_new_tokens)
        if batch < 1 or max_new_tokens < 1:
            raise SpecmoeError(f"batch {batch}, {max_new_tokens} new tokens: expected at least 1")
        torch.manual_seed(seed)
        choice = _Sampling(temperature, top_p, ignore_eos)
        if trace is None:
            return [
                generation
                for start in range(0, len(ids), batch)
                for generation in self._generate_batch(ids[start : start + batch], max_new_tokens, choice, on_token)
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
                    done = self._generate_batch(some, max_new_tokens, choice, on_token)
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

    def _check_prompt(self, number: int, tokens: list[int], max_new_tokens: int) -> None:
        vocabulary = self.model.get_input_embeddings().num_embeddings
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if not tokens:
            raise SpecmoeError(f"prompt {number} is empty: expected at least one token")
        if not 0 <= min(tokens) <= max(tokens) < vocabulary:
            wrong = min(tokens) if min(tokens) < 0 else max(tokens)
            raise SpecmoeError(f"prompt {number} has token {wrong}: the model knows tokens from 0 to {vocabulary - 1}")
        if limit is not None and len(tokens) + max_new_tokens > limit:
            raise SpecmoeError(
                f"prompt {number} has {len(tokens)} tokens: with {max_new_tokens} new ones that is more than the {limit} that "
                "the model allows"
            )

    def _generate_batch(
        self,
        ids: list[list[int]],
        max_new_tokens: int,
        sampling: _Sampling,
        on_token: Callable[[], None] | None,
    ) -> list[Generation]:
        from transformers import GenerationConfig, StoppingCriteriaList

        ends = set() if sampling.ignore_eos else self._end_tokens
        longest, pad = max(map(len, ids)), min(self._end_tokens, default=0)
        tokens_BT, mask_BT = torch.full((len(ids), longest), pad), torch.zeros((len(ids), longest), dtype=torch.long)
        for row, tokens in enumerate(ids):
            tokens_BT[row, longest - len(tokens) :] = torch.tensor(tokens)
            mask_BT[row, longest - len(tokens) :] = 1
        choice: dict[str, Any] = {"do_sample": False, "eos_token_id": sorted(ends) or None}
        if sampling.temperature > 0:
            choice |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        self._finished_B = np.zeros(len(ids), dtype=np.bool_)

        def note_token(tokens_BT: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
            """Note which sequences have finished: their experts are not computed any more. It stops nothing itself."""
            if ends and self._finished_B is not None:
                self._finished_B |= np.isin(tokens_BT[:, -1].cpu().numpy(), list(ends))
            if on_token is not None:
                on_token()
            return torch.zeros(len(tokens_BT), dtype=torch.bool, device=tokens_BT.device)

        device, own = self.model.device, self.model.generation_config
        # Nothing but what the caller asked for: a checkpoint's own settings may penalize, filter, or search.
        plain = GenerationConfig(**choice, max_new_tokens=max_new_tokens, pad_token_id=pad, disable_compile=True)
        # Models with a recurrent state do not all carry it from one part of a prompt to the next.
        if longest > PREFILL_TOKENS and not getattr(self.model, "_is_stateful", False):
            plain.prefill_chunk_size = PREFILL_TOKENS
        self._prompt_tokens = longest
        self.model.generation_config = plain
        try:
            output_BT = self.model.generate(
                tokens_BT.to(device),
                attention_mask=mask_BT.to(device),
                stopping_criteria=StoppingCriteriaList([note_token]),
            )
        finally:
            self.model.generation_config = own
            self._finished_B, self._prompt_tokens = None, 1
        return [self._generation(tokens, row, ends) for tokens, row in zip(ids, output_BT[:, longest:].tolist(), strict=True)]

    def _generation(self, prompt: list[int], output: list[int], ends: set[int]) -> Generation:
        end = next((place for place, token in enumerate(output) if token in ends), None)
        kept = output if end is None else output[: end + 1]
        text = "" if self.tokenizer is None else self.tokenizer.decode(kept, skip_special_tokens=True)
        return Generation(prompt, kept, text, "length" if end is None else "stop")

    @property
    def _end_tokens(self) -> set[int]:
        end = self.model.generation_config.eos_token_id
        found = [end] if isinstance(end, int) else list(end or [])
        if not all(isinstance(token, int) for token in found):
            raise ModelError(f"the generation config names the end tokens {found}: expected numbers")
        return set(found)

    def _begin_step(self, _model: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        arguments = dict(zip(_POSITIONAL, positional, strict=False)) | named
        if arguments.get("input_ids") is None:
            raise SpecmoeError("this model's experts are offloaded: call it with input_ids, not with embeddings")
        self.experts.begin_step(step_of(arguments, self._finished_B, self._prompt_tokens))

    def _end_step(self, *_: Any) -> None:
        self.experts.end_step()


def peak_memory() -> int:
    """The most bytes of memory that this process has had in use so far."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        # What `getrusage` says of a new process includes the memory of the one that started it.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def peak_device_memory(device: torch.device) -> int | None:
    """The most bytes that this process has had in use on a GPU so far; None for a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise SpecmoeError(f"device {name!r}: expected cuda, cuda:N or cpu") from error
    if device.type not in {"cuda", "cpu"}:
        raise SpecmoeError(f"device {name!r}: expected cuda, cuda:N or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EngineError(f"PyTorch finds no GPU {device} on this machine: choose the device cpu")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _dtype(name: str, config: Any) -> torch.dtype:
    if name != "auto":
        if name not in DTYPES:
            raise SpecmoeError(f"dtype {name!r}: expected auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
    found = DTYPES.get(stored) if isinstance(stored, str) else next((kind for kind in DTYPES.values() if kind == stored), None)
    return found or torch.float32


def _shape(empty: Any, resolved: ResolvedModel, layers: int, experts: int) -> Shape:
    hidden = empty.config.get_text_config(decoder=True).hidden_size
    top_k = find_top_k(find_moe_blocks(empty)[0], hidden) or resolved.metadata.top_k
    return Shape(layers=layers, experts=experts, top_k=top_k, horizon=1, task=Task.WHOLE_PATH)


def _policy(policy: str, shape: Shape) -> tuple[Rule, Run | None]:
    """The rule of a policy by name, or a run of the task reuse."""
    labels = {rule.label: rule for rule in Rule if rule not in (Rule.BELADY, Rule.LEARNED)}
    if policy in labels:
        return labels[policy], None
    if policy == Rule.BELADY.label:
        raise SpecmoeError("belady needs to know the future: it can be simulated, but not run")
    if not Path(policy).is_dir():
        raise SpecmoeError(
            f"unknown policy {policy!r}: expected one of {', '.join(labels)}, or the directory of a run of "
            f"'specmoe train --task {Task.REUSE}'"
        )
    run = _run(policy, shape)
    if run.predictor.shape.task != Task.REUSE:
        raise SpecmoeError(
            f"{policy} was trained for {run.predictor.shape.task}: a policy needs a run of 'specmoe train --task {Task.REUSE}'"
        )
    return Rule.LEARNED, run


def _run(path: str, shape: Shape) -> Run:
    if not Path(path).is_dir():
        raise SpecmoeError(f"unknown predictor {path!r}: expected {NEXT_GATE}, {NONE}, or the directory of 'specmoe train'")
    run = load_run(Path(path))
    own = run.predictor.shape
    if (own.layers, own.experts, own.top_k) != (shape.layers, shape.experts, shape.top_k):
        raise SpecmoeError(
            f"{path} is for {own.layers} MoE layers and top-{own.top_k} of {own.experts} experts, but this model has "
            f"{shape.layers} and top-{shape.top_k} of {shape.experts}"
        )
    if run.predictor.takes_router_inputs:
        raise SpecmoeError(f"{path} needs router inputs, which the runtime does not give to predictors: choose {NEXT_GATE}")
    return run


def _popularity(run: Run | None, shape: Shape) -> npt.NDArray[np.int64]:
    """Ranks of all experts `[L * E]`: by the problems that a run was trained on; without a run, the lowest number first."""
    count = shape.layers * shape.experts
    popularity = np.zeros(count)
    if run is not None and "popularity" in run.baselines:
        popularity = run.baselines["popularity"].arrays()["probability_LE"].astype(np.float64).reshape(-1)
    ranks = np.empty(count, dtype=np.int64)
    ranks[np.lexsort((-np.arange(count), popularity))] = np.arange(count)
    return ranks


def _open_store(
    store: Store,
    layouts: Sequence[ExpertLayout],
    experts: Sequence[Any],
    num_experts: int,
    device: torch.device,
    direct: bool | None,
) -> tuple[ExpertStore, str]:
    """The store, and how it reads, in words."""
    if store == Store.ram:
        pinned = device.type == "cuda"
        disk = DiskStore(layouts, experts, direct=False)
        return HostStore(disk, layouts, num_experts, pinned=pinned), "from pinned memory" if pinned else "from memory"
    converted = sum(not weight.is_plain for weight in experts[0])
    bypass = faster_direct(layouts, experts) if direct is None else direct
    disk = DiskStore(layouts, experts, direct=bypass)
    how = "from disk, past the page cache" if disk.direct else "from disk, through the page cache"
    return disk, how + (f"; {converted} of {len(experts[0])} weights are converted at each read" if converted else "")


def _fill(transfers: Transfers) -> None:
    """Load the experts with which the cache begins."""
    cache = transfers.cache
    with transfers.lock:
        begun = [
            transfers.demand(x // cache.num_experts, x % cache.num_experts, int(cache.slot_of_X[x]))
            for x in np.flatnonzero(cache.slot_of_X >= 0).tolist()
        ]
    for transfer in begun:
        transfers.wait(transfer)
    transfers.counts = TransferCounts()


def _check_widths(blocks: Sequence[MoEBlock]) -> None:
    """Raise `SpecmoeError` if experts get another input than routers: it says nothing of the next layer's choice."""
    for block in blocks:
        inputs, width = input_width(block.experts), block.gate.get_parameter("weight").shape[1]
        if inputs != width:
            raise SpecmoeError(
                f"{NEXT_GATE} needs the router's input, of width {width}, but this family's experts get one of width {inputs}: "
                "choose a trained predictor"
            )


def _connect(model: Any, modules: Sequence[Any], experts: OffloadedExperts) -> None:
    """Make a model compute its experts through the cache."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    for layer, module in enumerate(modules):
        # Not an attribute that would make it part of the model.
        object.__setattr__(module, "_specmoe", (layer, experts))
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)
    try:
        model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    except (ValueError, KeyError) as error:
        raise EngineError(f"{type(model).__name__}: its experts cannot be replaced: {first_line(error)}") from error


def experts_forward(
    module: Any, hidden_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """The experts function that is registered with `transformers`: through the cache, or with the module's own weights."""
    connected: tuple[int, OffloadedExperts] | None = getattr(module, "_specmoe", None)
    if connected is None:
        return resident_forward(module, hidden_TD, expert_ids_TK, weights_TK)
    layer, experts = connected
    return experts.forward(layer, module, hidden_TD, expert_ids_TK, weights_TK)


def _tokenizer(folder: Path) -> Any | None:
    from transformers import AutoTokenizer

    names = [path.name for path in folder.iterdir()]
    if not any(name.startswith(("tokenizer", "vocab")) or name.endswith(".model") for name in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a file from elsewhere can make a tokenizer's class raise anything
        raise ModelError(f"the tokenizer of {folder} cannot be read: {first_line(error)}") from error
