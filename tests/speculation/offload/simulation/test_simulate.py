"""Caches: every policy against hand-computed traces and a plain simulator, and the laws that hold for all traces."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.costs import COSTS
from support.routes import routes_of

from profiler.errors import SpecmoeError
from speculation.data.tasks import Shape, Task
from speculation.offload.costs import Costs
from speculation.offload.plans import PrefetchPlan, no_plan, oracle_plan, plan_of, popularity_plan, ranked
from speculation.offload.requests import Drafting, Requests, requests_of
from speculation.offload.simulation.records import Count
from speculation.offload.simulation.simulate import Setting, SimulationResult, Workload, capacities, simulate
from speculation.offload.state import Rule
from speculation.predictors.counting.previous_token import PreviousToken
from speculation.predictors.options import TrainingOptions

Steps = list[list[list[int]]]


def requests_from(steps: Steps, experts: int) -> Requests:
    """Of one token each, decoded: the experts of each layer of each step."""
    flat = [layer for step in steps for layer in step]
    return Requests.decoded(
        np.array([expert for layer in flat for expert in layer], dtype=np.int32),
        np.cumsum([0, *map(len, flat)]),
        layers=len(steps[0]),
        num_experts=experts,
        top_k=len(flat[0]),
    )


def workload_from(steps: Steps, experts: int) -> Workload:
    """Caches begin with experts 0, 1, 2, ..."""
    return Workload(requests_from(steps, experts), np.tile(np.arange(experts, 0, -1.0), (len(steps[0]), 1)))


def plan_from(requests: Requests, entries: dict[tuple[int, int], list[tuple[int, int]]]) -> PrefetchPlan:
    """entries: (step, layer after which it is known) -> (layer, expert) pairs."""
    points = requests.layers + 1
    lists = [entries.get((number // points, number % points - 1), []) for number in range(requests.steps * points)]
    flat = np.array([pair for pairs in lists for pair in pairs], dtype=np.int32).reshape(-1, 2)
    scores = np.ones(len(flat), dtype=np.float32)
    return PrefetchPlan(np.cumsum([0, *map(len, lists)]), flat[:, 0].copy(), flat[:, 1].copy(), scores)


def scores_for(workload: Workload) -> npt.NDArray[np.float32]:
    """Made-up scores of all experts in each step, all different."""
    requests = workload.requests
    size = (requests.steps, requests.layers * requests.num_experts)
    return np.random.default_rng(5).random(size, dtype=np.float32)


def play(
    workload: Workload, setting: Setting, plan: PrefetchPlan | None = None, costs: Costs | None = None
) -> SimulationResult:
    """Simulate any policy, also the one that needs scores."""
    return simulate(workload, setting, plan, costs, scores_for(workload) if setting.policy == Rule.LEARNED else None)


def hits(workload: Workload, policy: Rule, capacity: int, **more: Any) -> int:
    return play(workload, Setting(policy, capacity, **more)).total(Count.HIT)


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


@st.composite
def traces(draw: st.DrawFn) -> tuple[Steps, int]:
    """A few steps of up to 3 layers, of one to three experts of up to 6, some more popular than others."""
    experts, layers, top_k = draw(st.integers(3, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    seed, count = draw(st.integers(0, 10**6)), draw(st.integers(1, 60))
    random = np.random.default_rng(seed)
    share = random.dirichlet(np.full(experts, 0.7)) + 0.02
    steps = [
        [random.choice(experts, top_k, replace=False, p=share / share.sum()).tolist() for _ in range(layers)]
        for _ in range(count)
    ]
    return steps, experts


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


@given(traces(), st.sampled_from(list(Rule)), st.integers(0, 8), st.integers(1, 3), st.integers(1, 5), st.booleans())
def test_what_is_counted_adds_up(
    trace: tuple[Steps, int], policy: Rule, capacity: int, horizon: int, queue: int, is_oracle: bool
) -> None:
    workload = workload_from(*trace)
    requests = workload.requests
    ahead = min(horizon, requests.layers)
    plan = oracle_plan(requests, ahead) if is_oracle else popularity_plan(workload.popularity_LE, 2, ahead, requests)
    result = play(workload, Setting(policy, capacity, queue=queue), plan, COSTS)
    of = result.total
    assert of(Count.REQUESTED) == len(requests.experts_N) == of(Count.HIT) + of(Count.LATE) + of(Count.MISS)
    assert of(Count.PREFETCHED) == of(Count.USEFUL) + of(Count.WASTED)
    assert of(Count.MISS) <= of(Count.LOADS) - of(Count.PREFETCHED) <= of(Count.MISS) + of(Count.LATE)
    assert of(Count.STREAMED) <= of(Count.LOADS) - of(Count.PREFETCHED)
    # Nothing is faster than computation alone, and nothing slower than a copy for every expert, and one that was not requested.
    least = requests.steps * requests.layers * 2.0 + len(requests.experts_N) * 1.0
    assert least <= result.decode_seconds <= least + 10.0 * (2 * len(requests.experts_N) + requests.steps * requests.layers)
    assert result.decode_seconds == pytest.approx(least + result.decode_stall)


def test_time_by_hand() -> None:
    # Two layers, one expert each; a cache of one per layer, which has expert 0.
    workload = workload_from([[[0], [1]], [[1], [1]]], 3)
    result = simulate(workload, Setting(Rule.LRU, 1), costs=COSTS)
    # 2 + 1 (hit), 2 + 10 + 1, 2 + 10 + 1, 2 + 1 (hit).
    assert result.decode_seconds == 32.0
    assert result.decode_stall == 20.0
    assert result.tokens_per_second == 2 / 32
    # Known after layer 0, at 2 s: copied from 2 to 12 while expert 0 works until 3 and the rest of layer 1 until 5.
    plan = plan_from(workload.requests, {(0, 0): [(1, 1)]})
    ahead = simulate(workload, Setting(Rule.LRU, 1), plan, COSTS)
    assert ahead.decode_stall == 7.0 + 10.0
    assert (ahead.total(Count.LATE), ahead.total(Count.USEFUL), ahead.total(Count.MISS)) == (1, 1, 1)
    # A predictor of 2.5 s: the copy begins at 4.5.
    slow = simulate(workload, Setting(Rule.LRU, 1, predict_seconds=2.5), plan, COSTS)
    assert slow.decode_stall == 9.5 + 10.0
    # A wrong guess, at 2 s: the copy of what is needed waits for its end, at 12.
    wrong = plan_from(workload.requests, {(0, 0): [(1, 2)]})
    misled = simulate(workload, Setting(Rule.LRU, 1), wrong, COSTS)
    assert misled.decode_stall == 7.0 + 10.0 + 10.0
    assert (misled.total(Count.WASTED), misled.total(Count.LOADS)) == (1, 3)


def test_over_the_end_of_a_step() -> None:
    workload = workload_from([[[0], [0]], [[1], [0]]], 3)
    # Known after layer 1 of step 0, at 5 s, of layer 0 of the next step: needed at 8 s, there at 15.
    plan = plan_from(workload.requests, {(0, 1): [(2, 1)]})
    result = simulate(workload, Setting(Rule.LRU, 1), plan, COSTS)
    assert result.decode_stall == 7.0
    assert result.total(Count.LATE) == 1


def test_collisions_are_misses_of_what_was_given_up_in_the_same_step() -> None:
    # One cache of two experts: 0 of both layers. The guess pushes out 0 of layer 1, which was used longest ago; that is a miss
    # in the same step, and pushes out 0 of layer 0, which is a miss in the next step, and pushes out the older of the guess
    # (known to be wrong by now) and 0 of layer 1: the latter, as a guess counts as used when it is due.
    workload = workload_from([[[0], [0]], [[0], [0]]], 3)
    plan = plan_from(workload.requests, {(0, 0): [(0 + 2, 2)]})
    plain = simulate(workload, Setting(Rule.LRU, 2, is_global=True), costs=COSTS)
    assert plain.total(Count.HIT) == 4
    result = simulate(workload, Setting(Rule.LRU, 2, is_global=True), plan, COSTS)
    assert result.counts_LC[:, Count.COLLISION].tolist() == [0, 2]
    assert result.counts_LC[:, Count.MISS].tolist() == [1, 2]
    assert result.total(Count.WASTED) == 1


def test_a_prefetched_expert_is_not_evicted_for_another_prefetch() -> None:
    workload = workload_from([[[0], [0]], [[0], [0]]], 3)
    plan = plan_from(workload.requests, {(0, 0): [(1, 0), (1, 2)]})
    result = simulate(workload, Setting(Rule.LRU, 1), plan, COSTS)
    assert result.total(Count.HIT) == 4
    assert result.total(Count.DROPPED) == 1


def test_a_full_queue_drops() -> None:
    workload = workload_from([[[0], [0]], [[0], [1]]], 6)
    plan = plan_from(workload.requests, {(0, 0): [(1, 3), (1, 4), (1, 5)]})
    result = simulate(workload, Setting(Rule.LRU, 3, queue=2), plan, COSTS)
    # Two wait; the third is dropped at once; of the two, one is copied before layer 1, and one comes too late.
    assert result.total(Count.PREFETCHED) == 1
    assert result.total(Count.DROPPED) == 2


FAST = replace(COSTS, copy_seconds=1e-3)


@given(traces(), st.sampled_from(list(Rule)))
def test_a_perfect_predictor_with_enough_bandwidth_has_no_stalls(trace: tuple[Steps, int], policy: Rule) -> None:
    workload = workload_from(*trace)
    requests = workload.requests
    # Room for what a layer uses and for what it will use next.
    capacity = min(2 * requests.top_k, requests.num_experts)
    result = play(workload, Setting(policy, capacity), oracle_plan(requests, 1), FAST)
    # The very first layer is not prefetched.
    assert result.decode_stall <= requests.top_k * FAST.copy_seconds + 1e-9
    assert result.total(Count.HIT) >= result.total(Count.REQUESTED) - requests.top_k
    assert result.total(Count.WASTED) == 0


@given(traces(), st.sampled_from(list(Rule)), st.integers(0, 4))
def test_zero_bandwidth_makes_prefetching_useless(trace: tuple[Steps, int], policy: Rule, capacity: int) -> None:
    workload = workload_from(*trace)
    closed = replace(COSTS, copy_seconds=float("inf"))
    with_help = play(workload, Setting(policy, capacity), oracle_plan(workload.requests, 1), closed)
    without = play(workload, Setting(policy, capacity), costs=closed)
    assert with_help.total(Count.PREFETCHED) == 0
    assert with_help.tokens_per_second == without.tokens_per_second
    assert without.tokens_per_second == 0 or without.total(Count.MISS) == 0


def test_everything_resident_is_the_upper_bound_and_nothing_the_lower() -> None:
    random = np.random.default_rng(0)
    steps = [[random.choice(8, 2, replace=False).tolist() for _ in range(3)] for _ in range(50)]
    workload = workload_from(steps, 8)
    found = [simulate(workload, Setting(Rule.LRU, capacity), costs=COSTS) for capacity in range(9)]
    speeds = [result.tokens_per_second for result in found]
    assert speeds == sorted(speeds, key=lambda speed: speed or 0)
    assert found[8].decode_stall == found[8].total(Count.LOADS) == 0
    assert found[0].decode_stall == 10.0 * found[0].total(Count.REQUESTED) == 10.0 * 300
    assert found[0].total(Count.STREAMED) == 300


def test_without_costs_copies_take_no_time() -> None:
    workload = workload_from([[[0], [1]], [[2], [0]]], 3)
    result = simulate(workload, Setting(Rule.LRU, 1), oracle_plan(workload.requests, 1))
    assert result.tokens_per_second is None
    assert result.total(Count.LATE) == 0
    assert result.total(Count.HIT) == 4


def test_predictions_are_made_one_after_the_other() -> None:
    # Three layers of 3 s (2 and 1). Layers 1 and 2 are prefetched after layers 0 and 1; each prediction takes 4 s.
    workload = workload_from([[[0], [1], [1]], [[0], [0], [0]]], 3)
    plan = plan_from(workload.requests, {(0, 0): [(1, 1)], (0, 1): [(2, 1)]})
    instant = simulate(workload, Setting(Rule.LRU, 1, predict_seconds=0.0), plan, replace(COSTS, copy_seconds=0.5))
    assert instant.decode_stall == 2 * 0.5  # of layers 1 and 2 in the second step
    # The first is known at 2 + 4 = 6, after layer 1 was routed at 5, where it is demand-loaded until 5.5; the computation ends
    # at 6.5. The second begins at 6, not at 5.5, and is known at 10; layer 2 is routed at 8.5.
    slow = simulate(workload, Setting(Rule.LRU, 1, predict_seconds=4.0), plan, replace(COSTS, copy_seconds=0.5))
    assert slow.decode_stall == 4 * 0.5
    assert slow.total(Count.PREFETCHED) == 0
    # Two tokens at a time take twice as long.
    both = replace(
        workload.requests,
        tokens_N=np.arange(4),
        first_S=np.array([0, 2, 4]),
        samples_next_N=np.ones(4, dtype=np.bool_),
        is_draft_N=np.zeros(4, dtype=np.bool_),
        is_kept_N=np.ones(4, dtype=np.bool_),
    )
    two = simulate(
        replace(workload, requests=both), Setting(Rule.LRU, 1, predict_seconds=1.5), plan, replace(COSTS, copy_seconds=0.5)
    )
    one = simulate(workload, Setting(Rule.LRU, 1, predict_seconds=3.0), plan, replace(COSTS, copy_seconds=0.5))
    assert (two.decode_stall, two.decode_seconds) == (one.decode_stall, one.decode_seconds)


def test_what_is_in_use_is_not_overwritten() -> None:
    # One place for all layers: the next layer's expert cannot be copied before the computation ends, a second after routing.
    workload = workload_from([[[0], [1]]] * 4, 2)
    fast = replace(COSTS, copy_seconds=0.9)
    result = simulate(workload, Setting(Rule.LRU, 1, is_global=True), oracle_plan(workload.requests, 1), fast)
    # It begins when these end, 2 s before the next routing: in time, but not before.
    assert result.decode_stall == 0.0
    slow = replace(COSTS, copy_seconds=2.5)
    late = simulate(workload, Setting(Rule.LRU, 1, is_global=True), oracle_plan(workload.requests, 1), slow)
    # Half a second late each time, where it could have been in time if it had begun with the routing.
    assert late.decode_stall == 7 * 0.5


@given(st.integers(2, 6), st.integers(1, 7), st.integers(0, 500), st.sampled_from(list(Rule)))
def test_belady_is_not_beaten_by_requests_beyond_the_cache(batch: int, capacity: int, seed: int, policy: Rule) -> None:
    routes = routes_of([(0, 12)] * batch, layers=2, seed=seed)
    workload = Workload(requests_of(routes, 8, batch=batch), np.tile(np.arange(8, 0, -1.0), (2, 1)))
    assert hits(workload, policy, capacity) <= hits(workload, Rule.BELADY, capacity)


@pytest.mark.parametrize("task", [Task.WHOLE_PATH, Task.NEXT_LAYER])
def test_nothing_is_won_in_prompts_of_independent_routes(task: Task) -> None:
    """A predictor that repeats the token before must not know it while its prompt is computed."""
    routes = routes_of([(40, 1)] * 20, experts=64, layers=4, top_k=1)
    predictor = PreviousToken(Shape(layers=4, experts=64, top_k=1, horizon=1, task=task))
    predictor.fit(routes, None, TrainingOptions(), lambda *_: None)
    requests = requests_of(routes, 64)
    workload = Workload(requests, np.tile(np.arange(64, 0, -1.0), (4, 1)))
    plan = plan_of(ranked(predictor, routes, 1), predictor.shape, requests)
    without, with_plan = (simulate(workload, Setting(Rule.LRU, 32), each, FAST) for each in (None, plan))
    assert without.prefill_hit_rate == pytest.approx(0.5, abs=0.05)
    assert with_plan.prefill_hit_rate == pytest.approx(without.prefill_hit_rate, abs=0.02)


@pytest.mark.parametrize("task", [Task.WHOLE_PATH, Task.NEXT_LAYER, Task.NEXT_TOKEN])
def test_nothing_is_won_in_drafts_of_independent_routes(task: Task) -> None:
    """A predictor that repeats the token before must not know it while both are verified in one step."""
    routes = routes_of([(0, 800)], experts=64, layers=4, top_k=1)
    predictor = PreviousToken(Shape(layers=4, experts=64, top_k=1, horizon=1, task=task))
    predictor.fit(routes, None, TrainingOptions(), lambda *_: None)
    requests = requests_of(routes, 64, drafting=Drafting(tokens=7, acceptance=0.9))
    workload = Workload(requests, np.tile(np.arange(64, 0, -1.0), (4, 1)))
    plan = plan_of(ranked(predictor, routes, 1), predictor.shape, requests)
    # The last token that a step keeps is known after it, and is not computed again.
    without, with_plan = (simulate(workload, Setting(Rule.LRU, 32), each, FAST) for each in (None, plan))
    assert with_plan.hit_rate == pytest.approx(without.hit_rate, abs=0.02)
    assert with_plan.decode_tokens == 800


def test_what_was_copied_on_demand_may_wait_again() -> None:
    # Expert 1 of layer 1 is prefetched twice; a demand load overtakes the first prefetch, and must not cost the second.
    workload = workload_from([[[0], [1]], [[0], [0]], [[0], [1]]], 3)
    plan = plan_from(workload.requests, {(0, 0): [(1, 2), (1, 1)], (1, 1): [(3, 1)]})
    result = simulate(workload, Setting(Rule.LRU, 1), plan, COSTS)
    # After layer 1 of step 1, at most one copy is in flight: the prefetch for step 2 happens, and is late.
    assert result.counts_LC[1, Count.MISS] == 2
    assert result.counts_LC[1, Count.LATE] == 1


def test_capacities() -> None:
    workload = workload_from([[[0], [1]]], 10)
    assert list(capacities(workload, [0.1, 0.25, 1.0], [], None, False)) == [1, 2, 10]
    assert list(capacities(workload, [0.25], [], None, True)) == [5]
    assert list(capacities(workload, [], [7.9, 100.0], COSTS, False)) == [3, 10]
    assert list(capacities(workload, [], [7.9], COSTS, True)) == [7]
    with pytest.raises(SpecmoeError, match=r"cache fraction 1\.5: expected 0 to 1"):
        list(capacities(workload, [1.5], [], None, False))
    with pytest.raises(SpecmoeError, match="a cache size in GB needs the size of an expert"):
        list(capacities(workload, [], [1.0], None, False))
    for size in (float("nan"), float("inf"), -1.0):
        with pytest.raises(SpecmoeError, match="GB: expected 0 or more"):
            list(capacities(workload, [], [size], COSTS, False))
    with pytest.raises(SpecmoeError, match="capacity -1: expected at least 0"):
        simulate(workload, Setting(Rule.LRU, -1))


def test_a_plan_without_entries_is_none() -> None:
    workload = workload_from([[[0], [1]], [[2], [0]]], 3)
    results: list[SimulationResult] = [
        simulate(workload, Setting(Rule.LRU, 1), plan, COSTS) for plan in (None, no_plan(workload.requests))
    ]
    assert (results[0].counts_LC == results[1].counts_LC).all()
