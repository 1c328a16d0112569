"""Whether a model fits on a GPU, how many experts do, and how fast it is expected to be: what `specmoe fit` prints.

The speeds are sums of the times of `costs`, in which nothing overlaps but the GPU's and the host's experts; only that of `FILL`
is simulated. Shape letters: L MoE layers, K experts per token, E experts, B batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from analysis.documents.fit_report import Fit, FitWay, MemoryUse
from profiler.errors import SpecmoeError, UsageError, counted
from profiler.models.gpus import Gpu
from profiler.models.hosts import Host
from profiler.models.registry import USED_SHARE, WORKSPACE, ModelEntry
from profiler.trace.reader import Trace
from speculation.offload.costs import MEMORY_SHARE, Costs, costs_of

if TYPE_CHECKING:
    from speculation.offload.requests import Requests

ON_GPU = "all on the GPU"
COPY = "cache on the GPU, misses copied to it"
FILL = "cache on the GPU, misses on the host, then copied"
COMPUTE = "fixed choice on the GPU, others on the host"
LAYERS = "whole layers on the GPU, others on the host"
UNIFORM = "slots over experts, as if routing were uniform; real routing is less even, and hits more often"


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """What to fit. The fields are the options of `specmoe fit`.

    Attributes:
        entry: The model.
        gpu: The device.
        host: The host that has the other experts.
        memory: Memory of the device in GB. Default: the GPU's.
        context: Tokens of each sequence.
        batch: Sequences that are decoded at the same time, B.
        precision: Precision of the weights. Default: as the model was published.
        kv_bits: Bits of each key and value.
        reserve: GB for activations and everything else.
        host_memory: Host memory for experts in GB. Default: enough.
        interconnect: GB/s that transfers reach. Default: 80 % of the interconnect's.
        trace: A trace of the model.
        part: The part of its split from which hit rates are taken.
    """

    entry: ModelEntry
    gpu: Gpu
    host: Host
    memory: float | None = None
    context: int = 4096
    batch: int = 1
    precision: str | None = None
    kv_bits: int = 16
    reserve: float = WORKSPACE
    host_memory: float | None = None
    interconnect: float | None = None
    trace: Trace | None = None
    part: str = "test"


@dataclass(frozen=True)
class Routing:
    """What a step's routing is expected to be.

    Attributes:
        union: Distinct experts of a layer in one step.
        union_source: Where that is from.
        cache_hits: Share of them that a cache of the slots holds.
        static_hits: The same for a fixed choice of as many experts.
        cache_source, static_source: Where these are from.
        fill_hits: The same for a cache whose misses the host computes, while they are copied into the cache; None without a
            trace, since it needs a simulation.
        fill_tokens_per_second: The simulated speed of that, without keys and values.
    """

    union: float
    union_source: str
    cache_hits: float
    static_hits: float
    cache_source: str = UNIFORM
    static_source: str = UNIFORM
    fill_hits: float | None = None
    fill_tokens_per_second: float = 0.0


def fit_model(options: FitOptions) -> Fit:
    """Compute what fits, and the expected speed of each way to run the model.

    Raises:
        SpecmoeError: A number is out of range, the precision is unknown, or the trace is of another model.
    """
    entry = options.entry
    if options.batch < 1 or options.context < 1:
        raise UsageError(f"batch {options.batch}, context {options.context}: expected at least 1")
    precision = options.precision or next(iter(entry.checkpoints))
    memory = memory_use(options, precision)
    costs = costs_of(entry, options.gpu, precision, interconnect=options.interconnect, host=options.host)
    routing = (
        uniform_routing(entry, memory.slots, options.batch)
        if options.trace is None
        else trace_routing(options.trace, options.part, entry, memory.slots, options.batch, costs)
    )
    warnings: list[str] = []
    ways = sorted(_ways(options, memory, costs, routing, warnings), key=lambda way: -way.tokens_per_second)
    if options.context > entry.context:
        warnings.append(f"{entry.name} was made for up to {entry.context:,} tokens of context")
    if 0 < memory.slots < min(routing.union, memory.experts_per_layer):
        warnings.append(
            f"{memory.slots} slots per layer are fewer than the {routing.union:.1f} distinct experts of a step: a cache loads "
            "experts of every step again"
        )
    return Fit(
        model=entry.name,
        precision=precision,
        device=options.gpu.name,
        host=options.host.name,
        context=options.context,
        batch=options.batch,
        kv_bits=options.kv_bits,
        trace=None if options.trace is None else options.trace.path.resolve().name,
        memory=memory,
        union=routing.union,
        union_source=routing.union_source,
        ways=ways,
        warnings=warnings,
        assumptions=_assumptions(options, costs, memory),
    )


def memory_use(options: FitOptions, precision: str) -> MemoryUse:
    """What each part takes, and how many experts fit into the rest."""
    entry = options.entry
    device = float(options.gpu.memory if options.memory is None else options.memory)
    layers, experts = len(entry.moe_layers), entry.experts
    expert_bytes = entry.expert_bytes(precision)
    dense = entry.dense_bytes(precision) / 1e9
    kv_cache = options.batch * entry.kv_cache_bytes(options.context, bits=options.kv_bits) / 1e9
    usable = USED_SHARE * device
    left = usable - dense - kv_cache - options.reserve
    fitting = min(layers * experts, max(0, int(left * 1e9 / expert_bytes)))
    return MemoryUse(
        device=device,
        usable=usable,
        dense=dense,
        kv_cache=kv_cache,
        reserve=options.reserve,
        left=left,
        experts=layers * experts * expert_bytes / 1e9,
        expert_bytes=expert_bytes,
        slots=fitting // layers,
        layers=layers,
        experts_per_layer=experts,
        share=fitting / (layers * experts),
    )


def uniform_routing(entry: ModelEntry, slots: int, batch: int) -> Routing:
    """Routing without knowledge: each token chooses K of E experts at random, independent of the others.

    B tokens then use E (1 - (1 - K/E)^B) distinct experts, and any choice of slots hits slots / E of them.
    """
    union = entry.experts * (1 - (1 - entry.top_k / entry.experts) ** batch)
    rate = min(1.0, slots / entry.experts)
    return Routing(union, "uniform, independent routing: E (1 - (1 - K/E)^B)", rate, rate)


def trace_routing(trace: Trace, part: str, entry: ModelEntry, slots: int, batch: int, costs: Costs) -> Routing:
    """Routing of a part of a trace, with `slots` experts per layer in the cache: least recently used, or fixed.

    Only steps that decode exactly `batch` sequences count; later ones, when the part has too few problems left, do not.

    Raises:
        SpecmoeError: The trace is of another model, or the part has fewer sequences than the batch.
        EmptyPartError: The part, or the training part, has no problem.
    """
    # Imported late: without a trace, nothing needs the compiled simulation.
    from profiler.exporters.chosen_experts import choose_experts
    from speculation.data.routes import load_routes
    from speculation.data.tasks import Shape, Task
    from speculation.offload.requests import requests_of
    from speculation.offload.simulation.records import Miss
    from speculation.offload.simulation.simulate import Setting, Workload, simulate
    from speculation.offload.state import Rule
    from speculation.predictors.features import expert_frequency

    facts = trace.metadata.model
    expected = len(entry.moe_layers), entry.experts, entry.top_k
    if expected != (len(facts.moe_layers), facts.num_experts, facts.top_k):
        raise SpecmoeError(
            f"{entry.name} has {counted(expected[0], 'MoE layer')} of {expected[1]} experts, top-{expected[2]}; the trace has "
            f"{len(facts.moe_layers)} of {facts.num_experts}, top-{facts.top_k}"
        )
    shape = Shape.of(facts, 1, Task.NEXT_TOKEN)
    routes = load_routes(trace, part)
    if not routes.is_decode_T.any():
        routes = replace(routes, is_decode_T=np.ones(len(routes), dtype=np.bool_))
    requests = _full_steps(requests_of(routes, entry.experts, batch=batch), batch, part)
    popularity_LE = expert_frequency(load_routes(trace, "train"), shape)
    is_decode_R = np.repeat(requests.is_decode_S, requests.layers)
    sizes_R = np.diff(requests.starts_R)
    kept_LE = choose_experts(popularity_LE, slots * requests.layers)
    layer_N = np.repeat(np.arange(requests.steps * requests.layers) % requests.layers, sizes_R)
    is_kept_N = kept_LE[layer_N, requests.experts_N]
    workload = Workload(requests, popularity_LE)
    result = simulate(workload, Setting(Rule.LRU, slots))
    filled = simulate(workload, Setting(Rule.LRU, slots, miss=Miss.HOST), costs=costs)
    name = f"{trace.path.resolve().name}, {part} part"
    return Routing(
        union=float(sizes_R[is_decode_R].mean()),
        union_source=f"mean over decoding steps of {batch} {'sequence' if batch == 1 else 'sequences'}, {name}",
        cache_hits=result.hit_rate,
        static_hits=float(is_kept_N[np.repeat(is_decode_R, sizes_R)].mean()),
        cache_source=f"simulated lru cache, {name}",
        static_source=f"experts most used in the training part, {name}",
        fill_hits=filled.hit_rate,
        fill_tokens_per_second=filled.tokens_per_second or 0.0,
    )


def _full_steps(requests: Requests, batch: int, part: str) -> Requests:
    """The requests up to the last step that decodes `batch` sequences. A batch is full until no problem is left to join it."""
    full_S = requests.is_decode_S & (requests.sequences_S == batch)
    if not full_S.any():
        most = int(requests.sequences_S[requests.is_decode_S].max())
        raise SpecmoeError(
            f"batch {batch}: the {part} part of the trace never decodes more than {counted(most, 'sequence')} at the same "
            "time; choose a "
            "batch of at most that many, another part, or a trace of more problems"
        )
    return requests.first_steps(int(np.flatnonzero(full_S)[-1]) + 1)


def _ways(options: FitOptions, memory: MemoryUse, costs: Costs, routing: Routing, warnings: list[str]) -> list[FitWay]:
    """Every way that the memory allows."""
    if memory.left < 0:
        warnings.append(
            f"weights other than experts, keys and values, and the reserve take {memory.usable - memory.left:.1f} GB of "
            f"{memory.usable:.1f}: the model does not fit, even without experts"
        )
        return []
    clock = _Clock(options, costs, routing.union, memory)
    if memory.share == 1:
        return [FitWay(name=ON_GPU, tokens_per_second=clock.speed(clock.resident))]
    if options.host.gpu is not None and options.host.gpu.name == options.gpu.name:
        warnings.append("the GPU has no memory of its own, so the host has no place for the other experts either")
        return []
    whole_layers = int(memory.share * memory.layers + 1e-9)
    on_host = memory.layers - whole_layers
    ways = [
        FitWay(
            name=LAYERS,
            tokens_per_second=clock.speed((whole_layers * clock.resident + on_host * clock.with_host(0.0)) / memory.layers),
            gpu_layers=whole_layers,
            host_gigabytes=memory.experts * on_host / memory.layers,
        )
    ]
    if memory.slots:
        hosted = memory.experts * (1 - memory.slots / memory.experts_per_layer)
        ways += [
            FitWay(
                name=COPY,
                tokens_per_second=clock.speed(clock.with_copies(routing.cache_hits)),
                hit_rate=routing.cache_hits,
                hit_rate_source=routing.cache_source,
                host_gigabytes=memory.experts,
            ),
            FitWay(
                name=COMPUTE,
                tokens_per_second=clock.speed(clock.with_host(routing.static_hits)),
                hit_rate=routing.static_hits,
                hit_rate_source=routing.static_source,
                host_gigabytes=hosted,
            ),
        ]
    if memory.slots and routing.fill_hits is not None:
        ways.append(
            FitWay(
                name=FILL,
                tokens_per_second=clock.with_keys(routing.fill_tokens_per_second),
                hit_rate=routing.fill_hits,
                hit_rate_source=routing.cache_source,
                host_gigabytes=memory.experts,
            )
        )
    if options.host_memory is not None:
        warnings += [
            f"{way.name}: needs {way.host_gigabytes:.1f} GB of host memory, there are {options.host_memory:g}"
            for way in ways
            if way.host_gigabytes > options.host_memory
        ]
        ways = [way for way in ways if way.host_gigabytes <= options.host_memory]
    return ways


class _Clock:
    """Seconds of a layer in one step of B tokens, by where its experts are."""

    def __init__(self, options: FitOptions, costs: Costs, union: float, memory: MemoryUse) -> None:
        self._costs, self._union, self._batch, self._layers = costs, union, options.batch, memory.layers
        self._tokens_per_expert = options.batch * options.entry.top_k / union
        self._rest = max(costs.layer_seconds, options.batch * costs.layer_token_seconds)
        self._kv_seconds = memory.kv_cache / (options.gpu.bandwidth * MEMORY_SHARE)

    @property
    def resident(self) -> float:
        """All experts on the GPU."""
        return self._rest + self._on_gpu(1.0)

    def with_copies(self, hit_rate: float) -> float:
        """The misses are copied before they are computed."""
        return self.resident + self._union * (1 - hit_rate) * self._costs.copy_seconds

    def with_host(self, hit_rate: float) -> float:
        """The misses are computed on the host, at the same time as the hits on the GPU."""
        misses = self._union * (1 - hit_rate)
        slowest = max(self._costs.host_expert_seconds or 0.0, self._tokens_per_expert * self._costs.host_token_seconds)
        host = misses * slowest + min(1.0, misses) * self._costs.host_latency
        return self._rest + max(self._on_gpu(hit_rate), host)

    def speed(self, layer_seconds: float) -> float:
        """Tokens per second, all sequences together."""
        seconds = self._layers * layer_seconds + self._kv_seconds
        return self._batch / seconds if np.isfinite(seconds) else 0.0

    def with_keys(self, tokens_per_second: float) -> float:
        """A speed that leaves out keys and values, with the time to read them."""
        return self._batch / (self._batch / tokens_per_second + self._kv_seconds) if tokens_per_second else 0.0

    def _on_gpu(self, share: float) -> float:
        """The experts that are on the GPU, a share of those of the step."""
        return share * max(self._union * self._costs.expert_seconds, self._batch * self._costs.token_seconds)


def _assumptions(options: FitOptions, costs: Costs, memory: MemoryUse) -> list[str]:
    entry = options.entry
    kept = f"; layers with a window of {entry.window} tokens keep only those" if entry.window is not None else ""
    return [
        f"memory: {USED_SHARE:.0%} of the device's is usable, and {options.reserve:g} GB of it are reserved for activations, "
        "logits and the engine (assumed)",
        f"keys and values: {entry.kv_bytes * options.kv_bits // 16:,} bytes per token (config.json, {options.kv_bits} bits)"
        f"{kept}; all {options.context:,} tokens of each sequence are read in every step",
        f"weights but routed experts: {memory.dense:.2f} GB, all on the GPU, embeddings included",
        *(line for line in costs.describe() if not line.startswith("left out")),
        "experts of the GPU and of the host are computed at the same time, copies before the layer's experts; the speed of a "
        "host is that of one socket",
        "left out: prompts, sampling, prefetching, the state of linear attention, the framework's own overhead",
    ]
