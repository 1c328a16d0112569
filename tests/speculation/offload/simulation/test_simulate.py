"""The simulation of a cache: counts that add up, times by hand, prefetches, and bounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.costs import COSTS
from support.routes import routes_of
from support.workloads import Steps, plan_from, play, traces, workload_from

from profiler.errors import SpecmoeError
from speculation.data.tasks import Shape, Task
from speculation.offload.plans import no_plan, oracle_plan, plan_of, popularity_plan, ranked
from speculation.offload.requests import Drafting, requests_of
from speculation.offload.simulation.records import Count
from speculation.offload.simulation.simulate import Setting, SimulationResult, Workload, capacities, simulate
from speculation.offload.state import Rule
from speculation.predictors.counting.previous_token import PreviousToken
from speculation.predictors.options import TrainingOptions


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


def test_collisions_are_misses_of_what_was_evicted_in_the_same_step() -> None:
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


def test_what_was_demand_loaded_may_wait_again() -> None:
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
