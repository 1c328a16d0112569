"""Replay a trace with real transfers and GEMMs.

The experts are dummies of the real size. The caches are real, and the predictor runs after every layer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from profiler.errors import SpecmoeError
from speculation.data.history import History
from speculation.data.repeats import UNKNOWN_TOKEN
from speculation.data.routes import Routes
from speculation.data.tasks import Task
from speculation.offload.costs import COPY_LATENCY, Costs
from speculation.offload.devices import Cpu, Cuda, Device, Event
from speculation.offload.state import Rule
from speculation.predictors.base import Predictor

DEVICES: dict[str, type[Cuda] | type[Cpu]] = {"cuda": Cuda, "cpu": Cpu}
# Every measurement is a median of so many timed repetitions, after a warm-up.
REPEATS, WARM_UP = 20, 3
# Steps between two requests in the order of uses: the K experts of a request need a step each.
_ORDER = 64


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the dummy weights.

    Attributes:
        expert_bytes: Bytes of one expert.
        rest_bytes: Bytes of a layer's other weights.
        width: D, the hidden size.
        layers: L, the MoE layers of the trace.
        num_experts: E, the experts of a layer.
    """

    expert_bytes: int
    rest_bytes: int
    width: int
    layers: int
    num_experts: int


@dataclass(frozen=True)
class ReplayMeasurement:
    """What one replay measured.

    Attributes:
        tokens: Tokens that were replayed.
        seconds: The time that they took.
        requested: Experts that were requested.
        hits: Requested experts that were in the cache.
        late: Requested experts whose prefetch was still in flight.
        prefetched: Transfers that were started for predictions.
    """

    tokens: int
    seconds: float
    requested: int
    hits: int
    late: int
    prefetched: int

    @property
    def tokens_per_second(self) -> float:
        """Throughput."""
        return self.tokens / self.seconds


def default_device() -> str:
    """`cuda` if PyTorch finds a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def open_device(kind: str, slots: int, sizes: Sizes) -> Device:
    """Allocate a device, `cuda` or `cpu`, with room for `slots` experts.

    Raises:
        SpecmoeError: The device is unknown, or it is `cuda` and PyTorch finds no GPU.
    """
    if kind not in DEVICES:
        raise SpecmoeError(f"unknown device {kind!r}: expected one of {', '.join(DEVICES)}")
    return DEVICES[kind](slots, sizes.expert_bytes, sizes.rest_bytes, sizes.layers, sizes.width)


def measure(kind: str, sizes: Sizes, costs: Costs) -> Costs:
    """Replace the times in `costs` by measured ones.

    Measured one after the other, not overlapping, each as a median: the transfer of an expert, the computation of an expert,
    and the computation of the rest of a layer.
    """
    device = open_device(kind, 2, sizes)
    try:
        copy = _median_seconds(device, lambda turn: device.copy(turn % 2, turn, None))
        expert = _median_seconds(device, lambda turn: device.compute_experts([turn % 2], []))
        rest = _median_seconds(device, device.compute_rest)
    finally:
        device.close()
    return replace(
        costs,
        device=device.name,
        copy_seconds=copy,
        expert_seconds=expert,
        layer_seconds=rest,
        assumptions=(
            f"measured on this machine, medians of {REPEATS}: a transfer of {sizes.expert_bytes / 1e6:.2f} MB "
            f"({sizes.expert_bytes / 1e9 / max(copy - COPY_LATENCY, 1e-9):.1f} GB/s), bfloat16 GEMMs with as many bytes of "
            "weights",
            "measured for one token: a step with a prompt or a batch is assumed to take as long, which is optimistic",
        ),
    )


def _median_seconds(device: Device, start: Any) -> float:
    seconds = []
    for turn in range(REPEATS + WARM_UP):
        began = time.perf_counter()
        device.wait(start(turn))
        seconds.append(time.perf_counter() - began)
    return median(seconds[WARM_UP:])


class _ExpertCache:
    """Which expert is in which slot. Every layer has its own slots.

    Eviction follows the simulation's `Rule`s, but for Belady's, which needs the future.
    """

    def __init__(self, rule: Rule, capacity: int, sizes: Sizes, popularity: npt.NDArray[np.int64]) -> None:
        if rule == Rule.BELADY:
            raise SpecmoeError("Belady's rule needs to know the future: it can be simulated, but not replayed")
        self.rule, self.capacity, self.popularity = rule, capacity, popularity
        self.slot_of: dict[tuple[int, int], int] = {}
        self.free = [list(range(layer * capacity, (layer + 1) * capacity)) for layer in range(sizes.layers)]
        self.cached: list[set[int]] = [set() for _ in range(sizes.layers)]
        self.last: dict[tuple[int, int], int] = {}
        self.loaded: dict[tuple[int, int], int] = {}
        self.uses: dict[tuple[int, int], int] = {}
        for layer in range(sizes.layers):
            ranks = popularity[layer * sizes.num_experts : (layer + 1) * sizes.num_experts]
            for rank, expert in enumerate(np.argsort(-ranks, kind="stable")[:capacity].tolist()):
                self.last[layer, expert] = self.loaded[layer, expert] = -1 - rank
                self.place(layer, expert)
        self.num_experts = sizes.num_experts

    def place(self, layer: int, expert: int) -> int:
        """Assign a free slot to the expert."""
        slot = self.slot_of[layer, expert] = self.free[layer].pop()
        self.cached[layer].add(expert)
        return slot

    def evict(self, layer: int, protected: set[int], now: int) -> int | None:
        """Evict the expert that the rule values least, and return it; None if all are protected."""
        evictable = self.cached[layer] - protected
        if not evictable:
            return None
        expert = min(evictable, key=lambda each: self.priority(layer, each, now))
        self.cached[layer].remove(expert)
        self.free[layer].append(self.slot_of.pop((layer, expert)))
        return expert

    def priority(self, layer: int, expert: int, now: int) -> tuple[float, int]:
        """What the rule compares, then the last use: the smallest is evicted first."""
        last = self.last.get((layer, expert), -1)
        uses = self.uses.get((layer, expert), 0)
        first = {
            Rule.LRU: last,
            Rule.FIFO: self.loaded.get((layer, expert), -1),
            Rule.LFU: uses,
            Rule.LFRU: uses / max(1, now + _ORDER - last),
            Rule.POPULARITY: int(self.popularity[layer * self.num_experts + expert]),
        }[self.rule]
        return first, last


def replay(
    device: Device,
    routes: Routes,
    sizes: Sizes,
    rule: Rule,
    capacity: int,
    popularity: npt.NDArray[np.int64],
    predictor: Predictor | None = None,
    *,
    experts: int = 0,
    tokens: int = 1000,
) -> ReplayMeasurement:
    """Run the first `tokens` tokens of `routes`, one at a time.

    Transfers keep their order. Unlike in the simulation, a demand load does not overtake a prefetch that was queued before.

    Args:
        device: A device with `layers * capacity + K` slots. The last K hold demand-loaded experts when there is no cache.
        routes: The tokens, with their experts.
        sizes: Sizes of the dummy weights.
        rule: Which expert a full cache evicts.
        capacity: Slots per layer: at least K, or 0 for no cache.
        popularity: Rank `[L * E]` of each expert, the most popular highest. Caches start with the most popular experts.
        predictor: A predictor for next-layer. It sees each layer's routes when they are known, and predicts after each layer.
        experts: Experts to prefetch per prediction and layer. Their transfers are queued behind those needed now.
        tokens: Tokens to replay.

    Raises:
        SpecmoeError: The rule, the capacity or the predictor's task cannot be replayed.
    """
    top_k = routes.expert_ids_TLK.shape[2]
    if 0 < capacity < top_k:
        raise SpecmoeError(f"a cache of {capacity} experts per layer cannot hold the {top_k} of one token: choose a larger one")
    if predictor is not None and predictor.shape.task != Task.NEXT_LAYER:
        raise SpecmoeError(f"replay predicts after every layer: expected a {Task.NEXT_LAYER} run, not {predictor.shape.task}")
    cache = _ExpertCache(rule, capacity, sizes, popularity)
    count = min(tokens, len(routes))
    work = _PendingWork(device, cache, sizes)
    history: History | None = None
    began = time.perf_counter()
    for token in range(count):
        if predictor is not None:
            if history is None or routes.first_T[token] == token:
                history = History(predictor.shape, int(routes.token_ids_T[token]))
            key = int(routes.token_keys_T[token])
            history.begin(None if key == UNKNOWN_TOKEN else key, is_decode=bool(routes.is_decode_T[token]))
        for layer in range(sizes.layers):
            # Nothing can be loaded on demand before the router has chosen.
            device.wait(device.compute_rest(layer))
            chosen = routes.expert_ids_TLK[token, layer]
            work.request(layer, chosen.tolist())
            if predictor is not None and history is not None:
                history.add(chosen, routes.weights_TLK[token, layer])
                if layer < sizes.layers - 1:
                    prediction = predictor.predict(history)
                    for hop, predicted in enumerate(prediction.expert_ids[:, :experts].tolist(), start=1):
                        work.prefetch(layer + hop, predicted)
        device.wait(work.computation)
    seconds = time.perf_counter() - began
    return ReplayMeasurement(count, seconds, count * sizes.layers * top_k, work.hits, work.late, work.prefetched)


class _PendingWork:
    """The prefetches in flight, the last computation that reads each slot, and the counts so far."""

    def __init__(self, device: Device, cache: _ExpertCache, sizes: Sizes) -> None:
        self.device, self.cache, self.sizes = device, cache, sizes
        self.in_flight: dict[tuple[int, int], Event] = {}
        self.computation: Event = None
        self.hits, self.late, self.prefetched, self.now = 0, 0, 0, 0
        self.first_uncached_slot = sizes.layers * cache.capacity
        # A transfer must not overwrite a slot that a computation still reads.
        self.last_reads: dict[int, Event] = {}

    def request(self, layer: int, chosen: list[int]) -> None:
        """Compute the chosen experts of a layer, after loading those that are not cached."""
        cache, protected = self.cache, set(chosen)
        slots, transfers = [], []
        for number, expert in enumerate(chosen):
            pair = layer, expert
            if expert in cache.cached[layer]:
                transfer = self.in_flight.pop(pair, None)
                if transfer is None or self.device.is_done(transfer):
                    self.hits += 1
                else:
                    self.late += 1
                    transfers.append(transfer)
                slots.append(cache.slot_of[pair])
                continue
            slot = self._slot(layer, expert, protected) if cache.capacity else self.first_uncached_slot + number
            assert slot is not None  # a layer's slots hold K experts
            cache.loaded[pair] = (self.now + 1) * _ORDER - number
            transfers.append(self._copy(slot, pair))
            slots.append(slot)
        self.computation = self.device.compute_experts(slots, transfers)
        self.last_reads.update(dict.fromkeys(slots, self.computation))
        for number, expert in enumerate(chosen):
            cache.last[layer, expert] = (self.now + 1) * _ORDER - number
            cache.uses[layer, expert] = cache.uses.get((layer, expert), 0) + 1
        self.now += 1

    def prefetch(self, layer: int, predicted: list[int]) -> None:
        """Start to load predicted experts that are not cached, as long as there is room for them."""
        # -1 where a predictor abstains.
        wanted = [expert for expert in predicted if expert >= 0]
        for expert in wanted:
            if expert in self.cache.cached[layer] or not self.cache.capacity:
                continue
            slot = self._slot(layer, expert, set(wanted))
            if slot is None:
                break
            self.cache.last[layer, expert] = self.cache.loaded[layer, expert] = (self.now + 1) * _ORDER
            self.in_flight[layer, expert] = self._copy(slot, (layer, expert))
            self.prefetched += 1

    def _slot(self, layer: int, expert: int, protected: set[int]) -> int | None:
        if not self.cache.free[layer]:
            evicted = self.cache.evict(layer, protected, self.now * _ORDER)
            if evicted is None:
                return None
            self.in_flight.pop((layer, evicted), None)
        return self.cache.place(layer, expert)

    def _copy(self, slot: int, pair: tuple[int, int]) -> Event:
        return self.device.copy(slot, pair[0] * self.sizes.num_experts + pair[1], self.last_reads.get(slot))
