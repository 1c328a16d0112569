"""A trace with real copies and products: dummy experts of the real size, real caches, the real predictor in the loop."""

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
from speculation.offload.devices import Cuda, Device, Processor, Ticket
from speculation.offload.kernel import Rule
from speculation.predictors.base import Predictor

KINDS: dict[str, type[Cuda] | type[Processor]] = {"cuda": Cuda, "cpu": Processor}
# Timed repetitions of what is measured.
REPEATS = 20


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the dummies: bytes of an expert and of the rest of a layer, D, and layers and experts of the trace."""

    expert_bytes: int
    rest_bytes: int
    width: int
    layers: int
    num_experts: int


@dataclass(frozen=True)
class Replayed:
    """tokens in seconds; of the requested experts, how many were in the cache, and how many on their way."""

    tokens: int
    seconds: float
    requested: int
    hits: int
    late: int
    prefetched: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def here() -> str:
    """cuda where there is a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def open_device(kind: str, slots: int, sizes: Sizes) -> Device:
    """cuda or cpu, with that many slots. Raises `SpecmoeError` without a GPU."""
    if kind not in KINDS:
        raise SpecmoeError(f"unknown device {kind!r}: expected one of {', '.join(KINDS)}")
    return KINDS[kind](slots, sizes.expert_bytes, sizes.rest_bytes, sizes.layers, sizes.width)


def measure(kind: str, sizes: Sizes, costs: Costs) -> Costs:
    """These costs with copies, an expert's product and the rest of a layer as measured here, one after the other: medians."""
    device = open_device(kind, 2, sizes)
    try:
        copy = _median_seconds(device, lambda turn: device.copy(turn % 2, turn, None))
        expert = _median_seconds(device, lambda turn: device.experts([turn % 2], []))
        rest = _median_seconds(device, device.rest)
    finally:
        device.close()
    return replace(
        costs,
        device=device.name,
        copy_seconds=copy,
        expert_seconds=expert,
        layer_seconds=rest,
        assumptions=(
            f"measured here, medians of {REPEATS}: a copy of {sizes.expert_bytes / 1e6:.2f} MB "
            f"({sizes.expert_bytes / 1e9 / max(copy - COPY_LATENCY, 1e-9):.1f} GB/s), products of as many bytes of bfloat16",
            "measured for one token: prompts and batches are taken to be as fast per step, which is too fast",
        ),
    )


def _median_seconds(device: Device, begin: Any) -> float:
    seconds = []
    for turn in range(REPEATS + 3):
        began = time.perf_counter()
        device.wait(begin(turn))
        seconds.append(time.perf_counter() - began)
    return median(seconds[3:])


class _Cache:
    """Which expert is in which slot, in pools of a layer each; `Rule`s as in the simulation, but none that sees what comes."""

    def __init__(self, rule: Rule, capacity: int, sizes: Sizes, popularity: npt.NDArray[np.int64]) -> None:
        if rule == Rule.BELADY:
            raise SpecmoeError("Belady's rule knows what comes: it can be simulated, not replayed")
        self.rule, self.capacity, self.popularity = rule, capacity, popularity
        self.slot_of: dict[tuple[int, int], int] = {}
        self.free = [list(range(layer * capacity, (layer + 1) * capacity)) for layer in range(sizes.layers)]
        self.held: list[set[int]] = [set() for _ in range(sizes.layers)]
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
        """Give the expert a free slot."""
        slot = self.slot_of[layer, expert] = self.free[layer].pop()
        self.held[layer].add(expert)
        return slot

    def give_up(self, layer: int, kept: set[int], now: int) -> int | None:
        """Free the slot of the least worthy expert that is not kept, and name it; None if there is none."""
        possible = self.held[layer] - kept
        if not possible:
            return None
        expert = min(possible, key=lambda each: self.worth(layer, each, now))
        self.held[layer].remove(expert)
        self.free[layer].append(self.slot_of.pop((layer, expert)))
        return expert

    def worth(self, layer: int, expert: int, now: int) -> tuple[float, int]:
        last = self.last.get((layer, expert), -1)
        uses = self.uses.get((layer, expert), 0)
        first = {
            Rule.LRU: last,
            Rule.FIFO: self.loaded.get((layer, expert), -1),
            Rule.LFU: uses,
            Rule.LFRU: uses / max(1, now + 64 - last),
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
) -> Replayed:
    """Run the first `tokens` tokens of `routes` one by one. capacity: slots of each layer; at least K, or 0 for none.

    The device needs `layers * capacity + K` slots: the last K take what is not kept. predictor: told every route as it is
    known, and asked after each layer; `experts` of each prediction are copied behind what is needed now. Copies keep order:
    other than in the simulation, none overtakes one that was predicted before. Raises `SpecmoeError` for tasks and capacities
    that cannot be replayed.
    """
    top_k = routes.expert_ids_TLK.shape[2]
    if 0 < capacity < top_k:
        raise SpecmoeError(f"a cache of {capacity} experts per layer cannot hold the {top_k} of one token: choose a larger one")
    if predictor is not None and predictor.shape.task != Task.NEXT_LAYER:
        raise SpecmoeError(f"replay asks after each layer: expected a run for {Task.NEXT_LAYER}, not {predictor.shape.task}")
    cache = _Cache(rule, capacity, sizes, popularity)
    count = min(tokens, len(routes))
    state = _State(device, cache, sizes)
    history: History | None = None
    began = time.perf_counter()
    for token in range(count):
        if predictor is not None:
            if history is None or routes.first_T[token] == token:
                history = History(predictor.shape, int(routes.token_ids_T[token]))
            key = int(routes.token_keys_T[token])
            history.begin(None if key == UNKNOWN_TOKEN else key, is_decode=bool(routes.is_decode_T[token]))
        for layer in range(sizes.layers):
            # The router's answer is needed before anything can be copied for it.
            device.wait(device.rest(layer))
            chosen = routes.expert_ids_TLK[token, layer]
            state.request(layer, chosen.tolist())
            if predictor is not None and history is not None:
                history.add(chosen, routes.weights_TLK[token, layer])
                if layer < sizes.layers - 1:
                    coming = predictor.predict(history)
                    for hop, guesses in enumerate(coming.expert_ids[:, :experts].tolist(), start=1):
                        state.prefetch(layer + hop, guesses)
        device.wait(state.product)
    seconds = time.perf_counter() - began
    return Replayed(count, seconds, count * sizes.layers * top_k, state.hits, state.late, state.prefetched)


class _State:
    """What is on its way, and what is in use."""

    def __init__(self, device: Device, cache: _Cache, sizes: Sizes) -> None:
        self.device, self.cache, self.sizes = device, cache, sizes
        self.coming: dict[tuple[int, int], Ticket] = {}
        self.product: Ticket = None
        self.hits, self.late, self.prefetched, self.now = 0, 0, 0, 0
        self.spare = sizes.layers * cache.capacity
        # The last products with each slot's expert: no copy may come before these are over.
        self.used: dict[int, Ticket] = {}

    def request(self, layer: int, chosen: list[int]) -> None:
        cache, kept = self.cache, set(chosen)
        slots, tickets = [], []
        for number, expert in enumerate(chosen):
            pair = layer, expert
            if expert in cache.held[layer]:
                ticket = self.coming.pop(pair, None)
                if ticket is None or self.device.is_over(ticket):
                    self.hits += 1
                else:
                    self.late += 1
                    tickets.append(ticket)
                slots.append(cache.slot_of[pair])
                continue
            slot = self._slot(layer, expert, kept) if cache.capacity else self.spare + number
            assert slot is not None  # a layer's slots hold K experts
            cache.loaded[pair] = (self.now + 1) * 64 - number
            tickets.append(self._copy(slot, pair))
            slots.append(slot)
        self.product = self.device.experts(slots, tickets)
        self.used.update(dict.fromkeys(slots, self.product))
        for number, expert in enumerate(chosen):
            cache.last[layer, expert] = (self.now + 1) * 64 - number
            cache.uses[layer, expert] = cache.uses.get((layer, expert), 0) + 1
        self.now += 1

    def prefetch(self, layer: int, guesses: list[int]) -> None:
        # Nobody (-1) where a predictor abstains.
        wanted = [expert for expert in guesses if expert >= 0]
        for expert in wanted:
            if expert in self.cache.held[layer] or not self.cache.capacity:
                continue
            slot = self._slot(layer, expert, set(wanted))
            if slot is None:
                break
            self.cache.last[layer, expert] = self.cache.loaded[layer, expert] = (self.now + 1) * 64
            self.coming[layer, expert] = self._copy(slot, (layer, expert))
            self.prefetched += 1

    def _slot(self, layer: int, expert: int, kept: set[int]) -> int | None:
        if not self.cache.free[layer]:
            gone = self.cache.give_up(layer, kept, self.now * 64)
            if gone is None:
                return None
            self.coming.pop((layer, gone), None)
        return self.cache.place(layer, expert)

    def _copy(self, slot: int, pair: tuple[int, int]) -> Ticket:
        return self.device.copy(slot, pair[0] * self.sizes.num_experts + pair[1], self.used.get(slot))
