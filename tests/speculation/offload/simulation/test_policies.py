"""What each policy evicts: by hand, as a plain simulator does, and the laws that hold for all traces."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.routes import routes_of
from support.workloads import Steps, hits, play, scores_for, traces, workload_from

from speculation.offload.requests import requests_of
from speculation.offload.simulation.records import Count
from speculation.offload.simulation.simulate import Setting, Workload, simulate
from speculation.offload.state import Rule

# One layer, one expert per step, room for two, which are 0 and 1 at first. By hand:
SEQUENCE = [0, 2, 0, 3, 2, 0, 0, 1, 2, 3, 2]


BY_HAND = {
    # 0+ 2(out 1) 0+ 3(out 2) 2(out 0) 0(out 3) 0+ 1(out 2) 2(out 0) 3(out 1) 2+
    Rule.LRU: 4,
    # 0+ 2(out 1, loaded longest ago) 0+ 3(out 0) 2+ 0(out 2) 0+ 1(out 3) 2(out 0) 3(out 1) 2+
    Rule.FIFO: 5,
    # 0+ 2(out 1: never used) 0+ 3(out 2) 2(out 3) 0+ 0+ 1(out 2) 2(out 1) 3(out 2) 2(out 3)
    Rule.LFU: 4,
    # The same: 0 has the most uses, and is never the least for its time.
    Rule.LFRU: 4,
    # 0 is the most popular and stays: hits are its four.
    Rule.POPULARITY: 4,
    # 0+ 2(out 1) 0+ 3(out 0: needed later than 2) 2+ 0(out 3) 0+ 1(out 0: never again) 2+ 3(out 1) 2+
    Rule.BELADY: 6,
    # Expert 0 always has the largest sum (at the second 3: 1 + e^(2/24) + e^(5/24) + e^(6/24) against e^(1/24) + e^(4/24) +
    # e^(8/24) of expert 2), so it stays; hits are its four.
    Rule.EWMA: 4,
    # All uses are in the same 24 tokens: as LFU.
    Rule.LFU_AGED: 4,
    # 0 is hit at once, so it is protected and stays.
    Rule.SLRU: 4,
    # With one layer, what the current step uses is in use anyway: as FIFO.
    Rule.LEAST_STALE: 5,
}


@pytest.mark.parametrize("policy", list(BY_HAND))
def test_by_hand(policy: Rule) -> None:
    workload = workload_from([[[expert]] for expert in SEQUENCE], 4)
    result = simulate(workload, Setting(policy, 2))
    assert result.total(Count.HIT) == BY_HAND[policy]
    assert result.total(Count.LOADS) == result.total(Count.MISS) == len(SEQUENCE) - BY_HAND[policy]


class PlainCache:
    """The same rules, as a reader would write them down."""

    def __init__(
        self,
        rule: Rule,
        capacity: int,
        popularity: dict[tuple[int, int], int],
        future: list[set[tuple[int, int]]],
        layers: int,
        scores: Callable[[int, tuple[int, int]], float],
    ):
        self.layers, self.scores = layers, scores
        self.rule, self.capacity, self.popularity, self.future = rule, capacity, popularity, future
        order = sorted(popularity, key=lambda expert: -popularity[expert])
        self.held = set(order[:capacity])
        self.last = {expert: (-1, -rank) for rank, expert in enumerate(order)}
        self.loaded = dict(self.last)
        self.uses = dict.fromkeys(order, 0)
        self.steps_used: dict[tuple[int, int], list[int]] = {expert: [] for expert in order}
        # Protected experts of segmented LRU, and when each expert came into its segment.
        self.protected: set[tuple[int, int]] = set()
        self.entered = dict(self.last)

    def worth(self, expert: tuple[int, int], now: int) -> tuple[float, ...]:
        next_use = self.next_use(expert, now)
        last = self.last[expert]
        age = (now + 1) * 8192 - ((last[0] + 1) * 8192 + 2 * last[1] if last[0] >= 0 else -1 + last[1])
        step, used = now // self.layers, self.steps_used[expert]
        is_current = bool(used) and used[-1] == step
        return {
            Rule.EWMA: (sum(math.exp((at - step) / 24) for at in used), *last),
            Rule.LFU_AGED: (sum(0.5 ** (step // 24 - at // 24) for at in used), *last),
            Rule.SLRU: (expert in self.protected, *self.entered[expert], *last),
            Rule.LEAST_STALE: (is_current, *self.loaded[expert], *last),
            # Layers that the step has not reached keep the scores of the step before.
            Rule.LEARNED: (self.scores(step - (expert[0] > now % self.layers), expert), *last),
            Rule.LRU: last,
            Rule.FIFO: (*self.loaded[expert], *last),
            Rule.LFU: (self.uses[expert], *last),
            Rule.LFRU: (self.uses[expert] / age, *last),
            Rule.POPULARITY: (self.popularity[expert],),
            Rule.BELADY: (-next_use, *last),
        }[self.rule]

    def next_use(self, expert: tuple[int, int], since: int) -> int:
        return next((at for at in range(since, len(self.future)) if expert in self.future[at]), 10**9)

    def request(self, experts: list[tuple[int, int]], now: int) -> int:
        found = sum(expert in self.held for expert in experts)
        for place, expert in enumerate(experts):
            if expert not in self.held:
                if len(self.held) >= self.capacity:
                    others = [other for other in self.held if other not in experts]
                    if others:
                        self.held.remove(min(others, key=lambda other: self.worth(other, now)))
                    elif self.rule == Rule.BELADY and self.held:
                        # Which of a request that is too large stay.
                        farthest = max(self.held, key=lambda other: self.next_use(other, now + 1))
                        if self.next_use(farthest, now + 1) <= self.next_use(expert, now + 1):
                            continue
                        self.held.remove(farthest)
                    else:
                        continue
                self.held.add(expert)
                self.protected.discard(expert)
                self.loaded[expert] = self.entered[expert] = (now, -place)
        for place, expert in enumerate(experts):
            self.last[expert] = (now, -place)
            self.uses[expert] += 1
            self.steps_used[expert].append(now // self.layers)
            if expert in self.held and self.loaded[expert][0] < now:
                self.protected.add(expert)
                self.entered[expert] = (now, -place)
                protected = sorted(self.protected & self.held, key=lambda each: self.entered[each])
                if len(protected) > self.capacity // 2:
                    # It moves to the end of the other segment: as if it had entered right after the last one there.
                    self.protected.remove(protected[0])
                    others = [self.entered[each] for each in self.held if each not in self.protected]
                    self.entered[protected[0]] = max(others)
        return found


def plain_hits(steps: Steps, experts: int, rule: Rule, capacity: int, *, is_global: bool) -> int:
    layers = len(steps[0])
    requests = [[(layer, expert) for expert in chosen] for step in steps for layer, chosen in enumerate(step)]
    future = [set(request) for request in requests]
    # As `Workload` ranks: equal experts of several layers by their number.
    ranks = sorted(
        ((layer, expert) for layer in range(layers) for expert in range(experts)),
        key=lambda pair: (experts - pair[1], -(pair[0] * experts + pair[1])),
    )
    popularity = {expert: rank for rank, expert in enumerate(ranks)}
    scores_SX = scores_for(workload_from(steps, experts))

    def scores(step: int, expert: tuple[int, int]) -> float:
        return float(scores_SX[step, expert[0] * experts + expert[1]]) if step >= 0 else 0.0

    if is_global:
        caches = [PlainCache(rule, capacity, popularity, future, layers, scores)] * layers
    else:
        caches = [
            PlainCache(
                rule, capacity, {pair: rank for pair, rank in popularity.items() if pair[0] == layer}, future, layers, scores
            )
            for layer in range(layers)
        ]
    return sum(caches[number % layers].request(request, number) for number, request in enumerate(requests))


@given(traces(), st.sampled_from(list(Rule)), st.integers(0, 8), st.booleans())
def test_as_a_plain_simulator(trace: tuple[Steps, int], policy: Rule, capacity: int, is_global: bool) -> None:
    steps, experts = trace
    expected = plain_hits(steps, experts, policy, capacity, is_global=is_global)
    assert hits(workload_from(steps, experts), policy, capacity, is_global=is_global) == expected


@given(traces(), st.integers(3, 12), st.booleans())
def test_belady_is_never_beaten(trace: tuple[Steps, int], capacity: int, is_global: bool) -> None:
    workload = workload_from(*trace)
    best = hits(workload, Rule.BELADY, capacity, is_global=is_global)
    assert all(hits(workload, policy, capacity, is_global=is_global) <= best for policy in Rule)


@given(traces(), st.booleans())
def test_a_larger_lru_cache_has_every_hit_of_a_smaller_one(trace: tuple[Steps, int], is_global: bool) -> None:
    workload = workload_from(*trace)
    top_k = workload.requests.top_k
    found = [simulate(workload, Setting(Rule.LRU, size, is_global)) for size in range(top_k, 14)]
    by_layer = np.array([result.counts_LC[:, Count.HIT] for result in found])
    assert (np.diff(by_layer, axis=0) >= 0).all()


@pytest.mark.parametrize("policy", [rule for rule in Rule if rule != Rule.BELADY])
@pytest.mark.parametrize("capacity", [4, 8, 16])
def test_independent_uniform_requests_hit_as_often_as_there_is_room(policy: Rule, capacity: int) -> None:
    random = np.random.default_rng(capacity)
    steps = [[random.choice(32, 4, replace=False).tolist() for _ in range(2)] for _ in range(4000)]
    result = play(workload_from(steps, 32), Setting(policy, capacity))
    # Four of 32 without repetition vary less than independent draws do: five standard deviations of these.
    spread = 5 * (capacity / 32 * (1 - capacity / 32) / result.total(Count.REQUESTED)) ** 0.5
    assert result.hit_rate == pytest.approx(capacity / 32, abs=spread)


@given(st.integers(2, 6), st.integers(1, 7), st.integers(0, 500), st.sampled_from(list(Rule)))
def test_belady_is_not_beaten_by_requests_beyond_the_cache(batch: int, capacity: int, seed: int, policy: Rule) -> None:
    routes = routes_of([(0, 12)] * batch, layers=2, seed=seed)
    workload = Workload(requests_of(routes, 8, batch=batch), np.tile(np.arange(8, 0, -1.0), (2, 1)))
    assert hits(workload, policy, capacity) <= hits(workload, Rule.BELADY, capacity)
