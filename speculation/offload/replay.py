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

from profiler.errors import SpecmoeError, UsageError, counted
from speculation.data.history import ABSTAIN, History
from speculation.data.repeats import UNKNOWN_TOKEN
from speculation.data.routes import Routes
from speculation.data.tasks import Task
from speculation.offload.cache import NO_SCORES, ExpertCache
from speculation.offload.costs import COPY_LATENCY, Costs
from speculation.offload.devices import Cpu, Cuda, Device, Event
from speculation.offload.state import TIME_CONSTANT, Rule
from speculation.predictors.base import Predictor

DEVICES: dict[str, type[Cuda] | type[Cpu]] = {"cuda": Cuda, "cpu": Cpu}
# Every measurement is a median of so many timed repetitions, after a warm-up.
REPEATS, WARM_UP = 20, 3


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
        raise UsageError(f"unknown device {kind!r}: expected one of {', '.join(DEVICES)}")
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
    scores_TX: npt.NDArray[np.float32] | None = None,
    time_constant: float = TIME_CONSTANT,
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
        scores_TX: For `Rule.LEARNED`: the worth of every expert at each token, `[T, L * E]`.
        time_constant: Tokens over which `Rule.EWMA` and `Rule.LFU_AGED` forget.

    Raises:
        SpecmoeError: Scores are missing, or the rule, the capacity or the predictor's task cannot be replayed.
    """
    top_k = routes.expert_ids_TLK.shape[2]
    if 0 < capacity < top_k:
        raise SpecmoeError(
            f"a cache of {counted(capacity, 'expert')} per layer cannot hold the {top_k} of one token: choose a larger one"
        )
    if predictor is not None and predictor.shape.task != Task.NEXT_LAYER:
        raise SpecmoeError(f"replay predicts after every layer: expected a {Task.NEXT_LAYER} run, not {predictor.shape.task}")
    if rule == Rule.LEARNED and scores_TX is None:
        raise SpecmoeError("the policy learned needs the scores of every token")
    cache = ExpertCache(rule, [capacity] * sizes.layers, sizes.num_experts, popularity, time_constant)
    count = min(tokens, len(routes))
    work = _PendingWork(device, cache, sizes)
    history: History | None = None
    began = time.perf_counter()
    for token in range(count):
        cache.begin_step(NO_SCORES if scores_TX is None else scores_TX[token])
        if predictor is not None:
            if history is None or routes.first_T[token] == token:
                history = History(predictor.shape, int(routes.token_ids_T[token]))
            key = int(routes.token_keys_T[token])
            history.begin(None if key == UNKNOWN_TOKEN else key, is_decode=bool(routes.is_decode_T[token]))
        for layer in range(sizes.layers):
            # Nothing can be demand-loaded before the router has chosen.
            device.wait(device.compute_rest(layer))
            chosen = routes.expert_ids_TLK[token, layer]
            work.request(layer, chosen.tolist())
            if predictor is not None and history is not None:
                history.add(chosen, routes.weights_TLK[token, layer])
                if layer < sizes.layers - 1:
                    prediction = predictor.predict(history)
                    scores = prediction.scores[:, :experts].tolist()
                    for hop, predicted in enumerate(prediction.expert_ids[:, :experts].tolist(), start=1):
                        work.prefetch(layer + hop, predicted, scores[hop - 1], hop)
        device.wait(work.computation)
    seconds = time.perf_counter() - began
    return ReplayMeasurement(count, seconds, count * sizes.layers * top_k, work.hits, work.late, work.prefetched)


class _PendingWork:
    """The prefetches in flight, the last computation that reads each slot, and the counts so far."""

    def __init__(self, device: Device, cache: ExpertCache, sizes: Sizes) -> None:
        self.device, self.cache, self.sizes = device, cache, sizes
        self.in_flight: dict[int, Event] = {}
        self.computation: Event = None
        self.hits, self.late, self.prefetched = 0, 0, 0
        self.first_uncached_slot = sum(cache.capacities)
        # A transfer must not overwrite a slot that a computation still reads.
        self.last_reads: dict[int, Event] = {}

    def request(self, layer: int, chosen: list[int]) -> None:
        """Compute the chosen experts of a layer, after loading those that are not cached."""
        cache = self.cache
        slots, transfers = [], []
        for place, (expert, is_cached) in enumerate(zip(chosen, cache.look_up(layer, chosen), strict=True)):
            x = layer * self.sizes.num_experts + expert
            if is_cached:
                transfer = self.in_flight.pop(x, None)
                if transfer is None or self.device.is_done(transfer):
                    self.hits += 1
                else:
                    self.late += 1
                    transfers.append(transfer)
                slots.append(int(cache.slot_of_X[x]))
                continue
            slot = self._load(layer, expert, place) if cache.capacities[layer] else self.first_uncached_slot + place
            assert slot is not None  # a layer's slots hold K experts
            transfers.append(self._copy(slot, x))
            slots.append(slot)
        self.computation = self.device.compute_experts(slots, transfers)
        self.last_reads.update(dict.fromkeys(slots, self.computation))
        cache.note_use(layer, chosen)
        # Transfers keep their order and wait for the computation that reads their slot.
        cache.release()

    def prefetch(self, layer: int, predicted: list[int], scores: list[float], layers_ahead: int) -> None:
        """Start to load predicted experts that are not cached, as long as there is room for them."""
        wanted = [(expert, score) for expert, score in zip(predicted, scores, strict=True) if expert != ABSTAIN]
        for expert, _ in wanted:
            self.cache.predict(layer, expert, layers_ahead)
        for expert, score in wanted:
            x = layer * self.sizes.num_experts + expert
            if self.cache.slot_of_X[x] >= 0 or not self.cache.capacities[layer]:
                continue
            slot = self._load(layer, expert, 0, layers_ahead, score)
            if slot is None:
                break
            self.in_flight[x] = self._copy(slot, x)
            self.prefetched += 1

    def _load(self, layer: int, expert: int, place: int, layers_ahead: int | None = None, score: float = 1.0) -> int | None:
        placed = self.cache.load(layer, expert, place, layers_ahead, score)
        if placed is None:
            return None
        if placed.evicted is not None:
            self.in_flight.pop(placed.evicted, None)
        return placed.slot

    def _copy(self, slot: int, x: int) -> Event:
        return self.device.copy(slot, x, self.last_reads.get(slot))
