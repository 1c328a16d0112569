"""Replay: its caches are those of the simulation; its transfers and computations really run, in the order that they must."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.routes import routes_of

from profiler.errors import SpecmoeError
from speculation.data.tasks import Shape, Task
from speculation.offload.costs import Costs
from speculation.offload.devices import Cpu
from speculation.offload.replay import Sizes, measure, open_device, replay
from speculation.offload.requests import requests_of
from speculation.offload.simulation.records import Count
from speculation.offload.simulation.simulate import Setting, Workload, simulate
from speculation.offload.state import Rule
from speculation.predictors.counting.conditional_counts import ConditionalCounts
from speculation.predictors.options import TrainingOptions

SIZES = Sizes(expert_bytes=4096, rest_bytes=4096, width=64, layers=3, num_experts=8)
ROUTES = routes_of([(0, 60), (0, 50)], layers=3)
WORKLOAD = Workload(requests_of(ROUTES, 8), np.tile(np.arange(8, 0, -1.0), (3, 1)))


class Instant:
    """A device on which everything is done at once; it remembers which expert is in which slot."""

    name = "instant"

    def __init__(self) -> None:
        self.slots: dict[int, int] = {}
        self.used: list[list[int]] = []

    def copy(self, slot: int, expert: int, after: Any) -> int:
        self.slots[slot] = expert
        return 0

    def compute_experts(self, slots: Sequence[int], after: Sequence[Any]) -> int:
        self.used.append([self.slots.get(slot, -1) for slot in slots])
        return 0

    def compute_rest(self, layer: int) -> int:
        return 0

    def wait(self, event: Any) -> None:
        pass

    def is_done(self, event: Any) -> bool:
        return True

    def close(self) -> None:
        pass


@pytest.mark.parametrize("rule", [rule for rule in Rule if rule != Rule.BELADY])
@pytest.mark.parametrize("capacity", [0, 2, 5, 8])
def test_hits_are_those_of_the_simulation(rule: Rule, capacity: int) -> None:
    device = Instant()
    scores = np.random.default_rng(1).random((110, 24), dtype=np.float32) if rule == Rule.LEARNED else None
    found = replay(device, ROUTES, SIZES, rule, capacity, WORKLOAD.popularity, scores_TX=scores, time_constant=5)
    expected = simulate(WORKLOAD, Setting(rule, capacity, time_constant=5), scores_SX=scores)
    assert found.hits == expected.total(Count.HIT)
    assert found.requested == expected.total(Count.REQUESTED)
    assert (found.tokens, found.late, found.prefetched) == (110, 0, 0)
    # Every computation is of the experts that the token chose; those that the cache began with were never copied.
    for used, layer, chosen in zip(
        device.used, list(range(3)) * 110, ROUTES.expert_ids_TLK.reshape(-1, 2).tolist(), strict=True
    ):
        assert all(number in {layer * 8 + expert, -1} for number, expert in zip(used, chosen, strict=True))


def fitted(horizon: int = 1) -> ConditionalCounts:
    predictor = ConditionalCounts(Shape(layers=3, experts=8, top_k=2, horizon=horizon))
    predictor.fit(ROUTES, None, TrainingOptions(), lambda *_: None)
    return predictor


@pytest.mark.parametrize("horizon", [1, 2])
def test_a_predictor_in_the_loop(horizon: int) -> None:
    device = Instant()
    plain = replay(device, ROUTES, SIZES, Rule.LRU, 4, WORKLOAD.popularity)
    everything = replay(device, ROUTES, SIZES, Rule.LRU, 8, WORKLOAD.popularity, fitted(horizon), experts=2)
    assert everything.prefetched == 0
    some = replay(Instant(), ROUTES, SIZES, Rule.LRU, 4, WORKLOAD.popularity, fitted(horizon), experts=2)
    assert some.prefetched > 100
    assert some.hits != plain.hits
    # With no expert per prediction, the replay is the one without a predictor.
    none = replay(Instant(), ROUTES, SIZES, Rule.LRU, 4, WORKLOAD.popularity, fitted(horizon), experts=0)
    assert (none.hits, none.prefetched) == (plain.hits, 0)


def test_a_learned_policy_keeps_what_is_worth_more_than_a_prediction() -> None:
    """With the highest scores, nothing is evicted for a prediction; with the lowest, as much as under any other policy."""

    def prefetched(score: float, tokens: int = 110) -> int:
        scores = np.full((110, 24), score, dtype=np.float32)
        cache = (SIZES, Rule.LEARNED, 4, WORKLOAD.popularity)
        found = replay(Instant(), ROUTES, *cache, fitted(), experts=2, scores_TX=scores, tokens=tokens)
        return found.prefetched

    # A layer has no scores before its first token.
    assert prefetched(1.0) == prefetched(1.0, tokens=1) < 5
    assert prefetched(0.0) > 100


def test_on_this_processor() -> None:
    device = open_device("cpu", 3 * 3 + 2, SIZES)
    found = replay(device, ROUTES, SIZES, Rule.LRU, 3, WORKLOAD.popularity, fitted(), experts=2, tokens=30)
    device.close()
    assert found.tokens == 30
    assert found.hits + found.late <= found.requested == 180
    assert found.prefetched > 0
    assert found.tokens_per_second > 1


def test_transfers_and_computations_are_real() -> None:
    device = Cpu(2, 4096, 4096, 3, 64)
    event = device.compute_experts([1], [device.copy(1, 5, None)])
    device.wait(event)
    weights = device._weights
    assert torch.equal(weights.slots[1], weights.host[5 % len(weights.host)])
    assert weights.slots[1].nbytes == 4096
    assert torch.equal(weights.slots[0], torch.zeros_like(weights.slots[0]))
    # A transfer that must come after a computation.
    device.wait(device.copy(0, 1, event))
    assert device.is_done(event)
    device.close()


def test_measured_costs() -> None:
    costs = Costs(
        model="synthetic",
        device="",
        precision="bfloat16",
        expert_bytes=4096.0,
        copy_seconds=0.0,
        expert_seconds=0.0,
        token_seconds=0.0,
        layer_seconds=0.0,
        layer_token_seconds=0.0,
    )
    measured = measure("cpu", SIZES, costs)
    assert measured.device == "CPU"
    assert 0 < measured.copy_seconds < 1
    assert 0 < measured.expert_seconds < 1
    assert 0 < measured.layer_seconds < 1
    assert "measured on this machine, medians of 20" in measured.describe()[1]


def test_what_cannot_be_replayed() -> None:
    device = Instant()
    with pytest.raises(SpecmoeError, match="Belady's policy needs to know the future"):
        replay(device, ROUTES, SIZES, Rule.BELADY, 3, WORKLOAD.popularity)
    with pytest.raises(SpecmoeError, match="a cache of 1 expert per layer cannot hold the 2 of one token"):
        replay(device, ROUTES, SIZES, Rule.LRU, 1, WORKLOAD.popularity)
    predictor = ConditionalCounts(Shape(layers=3, experts=8, top_k=2, horizon=1, task=Task.WHOLE_PATH))
    with pytest.raises(SpecmoeError, match="expected a next-layer run, not whole-path"):
        replay(device, ROUTES, SIZES, Rule.LRU, 3, WORKLOAD.popularity, predictor)
    with pytest.raises(SpecmoeError, match="unknown device 'tpu': expected one of cuda, cpu"):
        open_device("tpu", 1, SIZES)
    if not torch.cuda.is_available():
        with pytest.raises(SpecmoeError, match="PyTorch finds no CUDA GPU on this machine: replay on the CPU instead"):
            open_device("cuda", 1, SIZES)
