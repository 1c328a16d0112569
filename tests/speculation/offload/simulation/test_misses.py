"""Misses on the host and from storage: by hand, against a plain simulator, and at the limits of bandwidth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.costs import COSTS as COPY_COSTS
from support.plain_machine import PlainMachine, Times
from support.workloads import Steps, plan_from, workload_from

from profiler.errors import SpecmoeError
from speculation.offload.costs import Costs
from speculation.offload.plans import oracle_plan, popularity_plan
from speculation.offload.simulation.event_loop import play
from speculation.offload.simulation.records import Count, Miss
from speculation.offload.simulation.simulate import Setting, SimulationResult, Workload, simulate
from speculation.offload.state import Rule

# In seconds: a copy takes 10, an expert 1, the rest of a layer 2, an expert on the host 4 after a latency of .5, a read 20.
COSTS = replace(COPY_COSTS, host_expert_seconds=4.0, host_latency=0.5, storage_seconds=20.0)


def counted(result: SimulationResult) -> dict[str, int]:
    names = {"hit", "late", "miss", "loads", "host", "filled"}
    return {count.name.lower(): result.total(count) for count in Count if count.name.lower() in names}


# Two layers, two experts each, room for two, which are 0 and 1 at first. Layer 0 misses 2 and 3, layer 1 misses 2.
TOKEN: Steps = [[[2, 3], [0, 2]]]


@pytest.mark.parametrize(
    ("miss", "seconds", "copied", "host"),
    [
        # Layer 0: 2, copies until 22, two experts until 24. Layer 1: 26, a copy until 36, two experts until 38.
        (Miss.COPY, 38.0, 3, 0),
        # Layer 0: 2, the host from 2.5 to 10.5. Layer 1, at 12.5: the device's expert until 13.5, the host's from 13 to 17.
        (Miss.HOST, 17.0, 0, 3),
        # Layer 0: on the host 6.5 and 10.5, both before a copy could be computed, at 13. Layer 1 as above.
        (Miss.CHEAPEST, 17.0, 0, 3),
    ],
)
def test_time_by_hand(miss: Miss, seconds: float, copied: int, host: int) -> None:
    result = simulate(workload_from(TOKEN, 4), Setting(Rule.LRU, 2, miss=miss), costs=COSTS)
    assert result.decode_seconds == seconds
    assert result.decode_stall == seconds - 4.0 - (1.0 if host else 4.0)
    assert result.total(Count.HOST) == host
    assert result.total(Count.LOADS) - result.total(Count.FILLED) == copied


def test_computing_on_arrival_by_hand() -> None:
    on_arrival = replace(COPY_COSTS, computes_on_arrival=True)
    # Layer 0: at 2, copies until 12 and 22, computed until 13 and 23. Layer 1: at 25, expert 0 until 26, a copy until 35, 36.
    result = simulate(workload_from(TOKEN, 4), Setting(Rule.LRU, 2), costs=on_arrival)
    assert result.decode_seconds == 36.0
    assert result.decode_stall == 36.0 - 4.0 - 4.0
    # An expert takes longer than a copy: copies wait for nothing, at 12 and 22, computed until 26 and 40; layer 1: 42, 56, 70.
    slow = simulate(workload_from(TOKEN, 4), Setting(Rule.LRU, 2), costs=replace(on_arrival, expert_seconds=14.0))
    assert slow.decode_seconds == 70.0
    # Expert 3 is prefetched at 0 and there at 10, although it is the second one; expert 2 at 20: computed until 11 and 21.
    # Layer 1 as above, from 23.
    plan = plan_from(workload_from(TOKEN, 4).requests, {(0, -1): [(0, 3)]})
    ahead = simulate(workload_from(TOKEN, 4), Setting(Rule.LRU, 2), plan, on_arrival)
    assert ahead.total(Count.LATE) == 1
    assert ahead.decode_seconds == 34.0
    # Transfers that take no time after a policy that takes one second: both arrive at 3, computed until 4 and 5. Layer 1: at 7,
    # expert 0 until 8, expert 2 until 9.
    free = replace(on_arrival, copy_seconds=0.0)
    assert simulate(workload_from(TOKEN, 4), Setting(Rule.LRU, 2, policy_seconds=1.0), costs=free).decode_seconds == 9.0


def test_whole_numbers_for_floats_compile_nothing_again() -> None:
    whole = replace(COSTS, copy_seconds=10, expert_seconds=1, host_expert_seconds=4, host_latency=1, storage_seconds=20)
    settings = [Setting(Rule.LRU, 2, miss=Miss.CHEAPEST, ram=4), Setting(Rule.LRU, 2)]
    for setting in settings:
        simulate(workload_from(TOKEN, 4), setting, costs=COSTS)
    compiled = len(play.signatures)
    for setting in settings:
        setting = replace(setting, time_constant=16, predict_seconds=0, policy_seconds=0, score_seconds=0)
        simulate(workload_from(TOKEN, 4), setting, costs=whole)
    assert len(play.signatures) == compiled


def test_the_cheapest_uses_both() -> None:
    """One layer of four misses: the host has them at 6, 10, 14 and 18, after 2; the device at 13, 23, ..."""
    workload = workload_from([[[4, 5, 6, 7]]], 8)
    costs = replace(COSTS, host_latency=0.0)
    result = simulate(workload, Setting(Rule.LRU, 4, miss=Miss.CHEAPEST), costs=costs)
    # 4 and 5 on the host (6, 10), 6 as a copy (13 before 14), 7 on the host (14 before 23).
    assert (result.total(Count.HOST), result.total(Count.LOADS) - result.total(Count.FILLED)) == (3, 1)
    assert result.decode_seconds == 14.0


def test_what_the_host_computed_is_copied_in_the_background() -> None:
    """The cache learns: the second token finds what the first one missed, once its copy has arrived."""
    workload = workload_from([[[2], [0]], [[2], [0]], [[2], [0]]], 3)
    result = simulate(workload, Setting(Rule.LRU, 1, miss=Miss.HOST), costs=COSTS)
    # Token 0: layer 0 at 2, the host until 6.5; the copy begins at 2 already, as the cached expert is not in use, until 12.
    # Layer 1 until 9.5. Token 1: layer 0 at 11.5, in transfer until 12, which is sooner than the host.
    assert counted(result) == {"hit": 4, "late": 1, "miss": 1, "loads": 1, "host": 1, "filled": 1}
    # 9.5; 12 + 1; 16; 19; 22.
    assert result.decode_seconds == 22.0


def test_what_is_late_is_computed_on_the_host_if_that_is_sooner() -> None:
    workload = workload_from([[[2], [0]], [[2], [0]]], 3)
    slow = replace(COSTS, copy_seconds=100.0)
    result = simulate(workload, Setting(Rule.LRU, 1, miss=Miss.HOST), costs=slow)
    assert counted(result) == {"hit": 2, "late": 1, "miss": 1, "loads": 1, "host": 2, "filled": 1}
    assert result.decode_seconds == 2 * (2 + 4.5 + 2 + 1)


def test_a_fill_expires_when_its_layer_comes_again() -> None:
    """One layer, room for one. The interconnect is busy with the first fill while the others wait."""
    workload = workload_from([[[1]], [[2]], [[3]], [[4]]], 5)
    result = simulate(workload, Setting(Rule.LRU, 1, miss=Miss.HOST), costs=replace(COSTS, copy_seconds=10.0))
    # Tokens take 6.5: fills begin at 2 (until 12), and, at 12, that of token 1, routed at 8.5, whose layer comes at 15 again;
    # at 22, that of token 3, routed at 21.5; that of token 2 expired.
    assert result.total(Count.FILLED) == 3


def test_a_fill_does_not_evict_what_the_policy_ranks_higher() -> None:
    steps: Steps = [[[2]]] * 3
    static = simulate(workload_from(steps, 3), Setting(Rule.POPULARITY, 1, miss=Miss.HOST), costs=COSTS)
    assert (static.total(Count.FILLED), static.total(Count.HOST)) == (0, 3)
    learning = simulate(workload_from(steps, 3), Setting(Rule.LFU, 1, miss=Miss.HOST), costs=COSTS)
    assert (learning.total(Count.FILLED), learning.total(Count.HIT) + learning.total(Count.LATE)) == (1, 2)


def test_predictions_go_before_fills() -> None:
    # Layer 0 misses 2, which the host computes until 6.5. Known then too: 1 of layer 1.
    workload = workload_from([[[2], [1]]], 3)
    plan = plan_from(workload.requests, {(0, 0): [(1, 1)]})
    result = simulate(workload, Setting(Rule.LRU, 1, miss=Miss.HOST), plan, COSTS)
    # Its copy begins at 2 and ends at 12. Layer 1, at 8.5: the host would have it at 13, the device at 13.
    assert result.counts_LC[1, Count.LATE] == result.counts_LC[1, Count.HOST] == 1
    assert result.decode_seconds == 13.0
    quick = simulate(workload, Setting(Rule.LRU, 1, miss=Miss.HOST), plan, replace(COSTS, copy_seconds=9.0))
    assert quick.total(Count.USEFUL) == 1
    assert quick.decode_seconds == 12.0


def test_many_tokens_keep_the_host_busy() -> None:
    """An expert that the host computes for many tokens is limited by FLOP/s: here 8 tokens of an expert, 1 s each."""
    workload = workload_from([[[1]]], 2)
    many = replace(
        workload.requests,
        tokens_N=np.arange(8),
        first_S=np.array([0, 8]),
        samples_next_N=np.ones(8, dtype=np.bool_),
        is_draft_N=np.zeros(8, dtype=np.bool_),
        is_kept_N=np.ones(8, dtype=np.bool_),
    )
    costs = replace(COSTS, host_token_seconds=1.0)
    result = simulate(replace(workload, requests=many), Setting(Rule.LRU, 1, miss=Miss.HOST), costs=costs)
    assert result.decode_seconds == 2 + 0.5 + 8
    alone = simulate(workload, Setting(Rule.LRU, 1, miss=Miss.HOST), costs=costs)
    assert alone.decode_seconds == 2 + 0.5 + 4


def test_storage_by_hand() -> None:
    """One layer of four experts, one on the device (0), two in host memory (1 and 2)."""
    workload = workload_from([[[1]], [[3]], [[1]], [[2]], [[1]]], 4)
    result = simulate(workload, Setting(Rule.LRU, 1, ram=2), costs=COSTS)
    # 1 is copied (13); 3 is read in 20 for 2, used longest ago, and copied (+ 33); 1 is still in memory (+ 13); 2 is read for 3
    # (+ 33); 1 (+ 13).
    assert result.decode_seconds == 13 + 33 + 13 + 33 + 13
    assert (result.total(Count.RAM_MISS), result.total(Count.READS), result.total(Count.MISS)) == (2, 2, 5)
    # On the host: 2.5 + 4, and 20 more for a read.
    host = simulate(workload, Setting(Rule.POPULARITY, 1, ram=2, miss=Miss.HOST), costs=COSTS)
    assert host.decode_seconds == 3 * 6.5 + 2 * 26.0


def test_reads_and_copies_overlap() -> None:
    """Two misses, both on storage: the second is read while the first is copied. In memory are 4 and 5."""
    workload = workload_from([[[2, 3]]], 6)
    costs = replace(COSTS, copy_seconds=30.0)
    requests = replace(workload.requests)
    cold = Workload(requests, np.array([[6.0, 5.0, 1.0, 2.0, 4.0, 3.0]]))
    result = simulate(cold, Setting(Rule.LRU, 2, ram=2), costs=costs)
    # Reads end at 22 and 42, copies at 52 and 82, experts at 84.
    assert result.decode_seconds == 84.0
    # What needs no read goes first, whatever its place: 3 is in memory, copied from 2 to 32; 2 is read until 22, copied to 62.
    warm = Workload(requests, np.array([[6.0, 5.0, 1.0, 3.0, 4.0, 2.0]]))
    assert simulate(warm, Setting(Rule.LRU, 2, ram=2), costs=costs).decode_seconds == 64.0


def test_predicted_experts_are_read_ahead() -> None:
    workload = workload_from([[[0], [2]]], 3)
    cold = Workload(workload.requests, np.array([[3.0, 2.0, 1.5], [3.0, 2.0, 1.0]]))
    plan = plan_from(workload.requests, {(0, 0): [(1, 2)]})
    setting = Setting(Rule.LRU, 1, ram=3)
    # At first, 0 of both layers is on the device, and 1 of both and 2 of layer 0 are in memory.
    assert simulate(cold, setting, costs=COSTS).decode_seconds == 3 + 2 + 20 + 10 + 1
    result = simulate(cold, setting, plan, COSTS)
    # Known at 2, read until 22; needed at 5, when it is being read, which nothing needs to repeat: copied until 32.
    assert result.decode_seconds == 33.0
    assert (result.total(Count.READS), result.total(Count.RAM_MISS), result.total(Count.MISS)) == (1, 0, 1)
    # A quick read and copy: there when it is needed.
    quick = replace(COSTS, storage_seconds=1.0, copy_seconds=1.5)
    ahead = simulate(cold, setting, plan, quick)
    assert (ahead.total(Count.HIT), ahead.decode_seconds) == (2, 6.0)


@st.composite
def traces(draw: st.DrawFn) -> tuple[Steps, int]:
    experts, layers, top_k = draw(st.integers(3, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    share = random.dirichlet(np.full(experts, 0.7)) + 0.02
    steps = [
        [random.choice(experts, top_k, replace=False, p=share / share.sum()).tolist() for _ in range(layers)]
        for _ in range(draw(st.integers(1, 40)))
    ]
    return steps, experts


# Those that need no predictor.
rules = st.sampled_from([rule for rule in Rule if rule != Rule.LEARNED])
# Multiples of an eighth: sums are exact.
times = st.integers(0, 80).map(lambda number: number / 8)


@st.composite
def machines(draw: st.DrawFn) -> Times:
    return Times(
        copy=draw(times), expert=draw(times), layer=draw(times), host=draw(times), latency=draw(times), read=draw(times)
    )


@given(
    traces(),
    st.sampled_from([Rule.LRU, Rule.LFU, Rule.FIFO, Rule.POPULARITY]),
    st.integers(0, 7),
    st.booleans(),
    st.sampled_from(list(Miss)),
    st.none() | st.integers(0, 20),
    machines(),
)
def test_as_a_plain_simulator(
    trace: tuple[Steps, int], rule: Rule, capacity: int, is_global: bool, miss: Miss, ram: int | None, machine: Times
) -> None:
    steps, experts = trace
    layers = len(steps[0])
    ranks = sorted(
        ((layer, expert) for layer in range(layers) for expert in range(experts)),
        key=lambda pair: (experts - pair[1], -(pair[0] * experts + pair[1])),
    )
    plain = PlainMachine(
        rule=rule.name.lower(),
        capacity=capacity,
        is_global=is_global,
        miss=miss.name.lower(),
        ram=ram,
        times=machine,
        popularity={pair: rank for rank, pair in enumerate(ranks)},
    )
    expected = plain.run(steps)
    costs = replace(
        COSTS,
        copy_seconds=machine.copy,
        expert_seconds=machine.expert,
        layer_seconds=machine.layer,
        host_expert_seconds=machine.host,
        host_latency=machine.latency,
        storage_seconds=machine.read,
    )
    setting = Setting(rule, capacity, is_global, queue=500, miss=miss, ram=ram)
    result = simulate(workload_from(steps, experts), setting, costs=costs)
    found = {
        name: result.total(Count[name.upper()]) for name in ("requested", "late", "miss", "loads", "host", "filled", "streamed")
    }
    assert found == {name: expected[name] for name in found}
    assert result.total(Count.READS) == result.total(Count.RAM_MISS) == expected["read"]
    assert result.decode_seconds == plain.now


def least_seconds(workload: Workload) -> float:
    return workload.requests.steps * workload.requests.layers * COSTS.layer_seconds


@given(traces(), rules, st.integers(0, 6), st.sampled_from([Miss.HOST, Miss.CHEAPEST]))
def test_limits_of_bandwidth(trace: tuple[Steps, int], rule: Rule, capacity: int, miss: Miss) -> None:
    workload = workload_from(*trace)
    plan = oracle_plan(workload.requests, 1)

    def run(how: Miss, **changed: float) -> SimulationResult:
        return simulate(workload, Setting(rule, capacity, miss=how), plan, replace(COSTS, **changed))  # type: ignore[arg-type]

    # A host that takes no time leaves the rest of the layers, and what the device computes.
    free = run(miss, host_expert_seconds=0.0, host_latency=0.0)
    computed = free.total(Count.REQUESTED) - free.total(Count.HOST)
    assert free.decode_seconds <= least_seconds(workload) + computed * COSTS.expert_seconds
    # Without an interconnect, the device computes what it has, and the host all else: the cache stays as it was.
    closed = run(miss, copy_seconds=float("inf"))
    assert closed.total(Count.LOADS) == 0
    assert closed.total(Count.HOST) == closed.total(Count.MISS)
    assert np.isfinite(closed.decode_seconds)
    # A host that never ends: the cheapest is to copy, as if there were no host.
    never = run(Miss.CHEAPEST, host_expert_seconds=float("inf"))
    copied = run(Miss.COPY)
    assert never.total(Count.HOST) == 0
    assert (never.counts_LC == copied.counts_LC).all()
    assert never.decode_seconds == copied.decode_seconds
    # Neither: nothing ends that misses.
    dead = run(miss, copy_seconds=float("inf"), host_expert_seconds=float("inf"))
    assert dead.tokens_per_second == 0 or dead.total(Count.MISS) == 0


@given(traces(), rules, st.integers(0, 6), st.sampled_from(list(Miss)), st.integers(1, 20))
def test_limits_of_storage(trace: tuple[Steps, int], rule: Rule, capacity: int, miss: Miss, ram: int) -> None:
    workload = workload_from(*trace)
    plan = popularity_plan(workload.popularity_LE, 2, 1, workload.requests)
    everything = workload.requests.layers * workload.requests.num_experts

    def run(room: int | None, seconds: float) -> SimulationResult:
        setting = Setting(rule, capacity, miss=miss, ram=room)
        return simulate(workload, setting, plan, replace(COSTS, storage_seconds=seconds))

    without = run(None, 20.0)
    # Room for all is as if there were no storage.
    enough = run(everything, 20.0)
    assert enough.total(Count.READS) == 0
    assert (enough.counts_LC == without.counts_LC).all()
    assert enough.decode_seconds == without.decode_seconds
    some = run(ram, 20.0)
    of = some.total
    assert of(Count.RAM_MISS) <= of(Count.MISS)
    assert of(Count.RAM_MISS) <= of(Count.READS)
    assert of(Count.REQUESTED) == of(Count.HIT) + of(Count.LATE) + of(Count.MISS)
    assert of(Count.PREFETCHED) == of(Count.USEFUL) + of(Count.WASTED)
    # Storage that never answers.
    closed = run(ram, float("inf"))
    assert closed.tokens_per_second == 0 or closed.total(Count.RAM_MISS) == 0


def test_a_draft_model_takes_its_time() -> None:
    workload = workload_from([[[0]], [[0]]], 2)
    plain = simulate(workload, Setting(Rule.LRU, 1), costs=COSTS)
    drafted = simulate(workload, Setting(Rule.LRU, 1, draft_seconds=0.25), costs=COSTS)
    assert drafted.decode_seconds == plain.decode_seconds + 2 * 0.25


@pytest.mark.parametrize(
    ("setting", "costs", "text"),
    [
        (Setting(Rule.LRU, 1, miss=Miss.HOST), replace(COSTS, host_expert_seconds=None), "choose a host"),
        (Setting(Rule.LRU, 1, miss=Miss.CHEAPEST), None, "which is not known: name a model of known sizes"),
        (Setting(Rule.LRU, 1, ram=1), None, "which is not known: name a model of known sizes"),
        (Setting(Rule.LRU, 1, ram=1), replace(COSTS, storage_seconds=None), "choose a storage"),
        (Setting(Rule.LRU, 1, miss=Miss.HOST), replace(COSTS, computes_on_arrival=True), "without a host and storage only"),
        (Setting(Rule.LRU, 1, ram=1), replace(COSTS, computes_on_arrival=True), "without a host and storage only"),
        (Setting(Rule.LRU, 1, ram=-1), COSTS, "room for -1 experts in host memory: expected at least 0"),
    ],
)
def test_what_the_costs_lack(setting: Setting, costs: Costs | None, text: str) -> None:
    with pytest.raises(SpecmoeError, match=text):
        simulate(workload_from([[[0]]], 2), setting, costs=costs)
