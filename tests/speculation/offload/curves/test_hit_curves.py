"""Curves of hits by cache size: by hand, against a simulation of every size, and what the slots of each layer make of them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.routes import routes_of

from profiler.errors import SpecmoeError
from speculation.offload.curves.hit_curves import HitCurves, knee, lru_curves, sampled_sizes
from speculation.offload.curves.slots import best_slots, even_slots, hits_of
from speculation.offload.curves.working_sets import WorkingSets, step_sets, window_sets
from speculation.offload.requests import Requests, requests_of
from speculation.offload.simulation.records import Count
from speculation.offload.simulation.simulate import Setting, Workload, simulate
from speculation.offload.state import Rule

# The first example of each test compiles what it calls, unless that is in numba's cache.
compiled = settings(deadline=None)


def decoded(chosen_RN: list[list[int]], layers: int, experts: int) -> Workload:
    """One list of experts for each layer of each step. Caches begin with experts 0, 1, 2, ..."""
    requests = Requests.decoded(
        np.array([expert for chosen in chosen_RN for expert in chosen], dtype=np.int32),
        np.cumsum([0, *map(len, chosen_RN)]),
        layers=layers,
        num_experts=experts,
        top_k=max(map(len, chosen_RN)),
    )
    return Workload(requests, np.tile(np.arange(experts, 0, -1.0), (layers, 1)))


def test_curve_by_hand() -> None:
    # The stack before each use, and the position of the expert:
    # 0123: 0 at 0; 0123: 2 at 2; 2013: 0 at 1; 0213: 3 at 3; 3021: 0 at 1.
    curves = lru_curves(decoded([[0], [2], [0], [3], [0]], 1, 4))
    assert curves.hits_LC.tolist() == [[0, 1, 3, 4, 5]]
    assert curves.hit_rate_C.tolist() == [0, 0.2, 0.6, 0.8, 1.0]


def test_requests_that_stream_by_hand() -> None:
    # One slot holds 0; both requests of two need more. The first keeps 0 (a hit), although 1 counts as used after it.
    # Then 1 is a miss and so is 2, of which the first is kept. Two slots: 01, 10, 12, then 2 is a hit.
    curves = lru_curves(decoded([[1, 0], [1, 2], [2]], 1, 3))
    assert curves.hits_LC.tolist() == [[0, 1, 2 + 1 + 1, 5]]


def test_one_cache_for_all_layers_by_hand() -> None:
    # Experts 0 and 1 of two layers are 0, 1, 2, 3. At first 0 2 1 3: the most popular of any layer.
    # 0 at 0; 2 at 1; then 20 13: 1 at 2; 120 3: 2 at 1.
    curves = lru_curves(decoded([[0], [0], [1], [0]], 2, 2), is_global=True)
    assert curves.hits_LC.tolist() == [[0, 1, 1, 2, 2], [0, 0, 2, 2, 2]]


@st.composite
def schedules(draw: st.DrawFn) -> Workload:
    """Prompts and batches: requests of one expert up to nearly all, for caches that start with arbitrary experts."""
    experts, layers = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    lengths = draw(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 30)), min_size=1, max_size=6))
    top_k, batch, seed = draw(st.integers(1, min(3, experts))), draw(st.integers(1, 5)), draw(st.integers(0, 10**6))
    routes = routes_of(lengths, experts, layers, top_k, seed)
    popularity_LE = np.random.default_rng(seed).integers(0, 5, (layers, experts)).astype(float)
    return Workload(requests_of(routes, experts, batch=batch), popularity_LE)


def simulated(workload: Workload, size: int, is_global: bool) -> tuple[list[int], list[int]]:
    result = simulate(workload, Setting(Rule.LRU, size, is_global))
    return result.counts_LC[:, Count.HIT].tolist(), result.prefill_counts_LC[:, Count.HIT].tolist()


@compiled
@given(schedules(), st.booleans())
def test_one_pass_has_the_hits_of_a_simulation_of_every_size(workload: Workload, is_global: bool) -> None:
    curves = lru_curves(workload, is_global=is_global)
    requests = workload.requests
    sizes = requests.num_experts * (requests.layers if is_global else 1)
    assert curves.hits_LC.shape == (requests.layers, sizes + 1)
    for size in range(sizes + 1):
        found = curves.hits_LC[:, size].tolist(), curves.prefill_hits_LC[:, size].tolist()
        assert found == simulated(workload, size, is_global), size
    full = simulate(workload, Setting(Rule.LRU, 0))
    assert curves.requested_L.tolist() == full.counts_LC[:, Count.REQUESTED].tolist()
    assert curves.prefill_requested_L.tolist() == full.prefill_counts_LC[:, Count.REQUESTED].tolist()


def test_long_runs_of_one_cache_for_all_layers() -> None:
    """The order of uses is compacted many times."""
    workload = Workload(requests_of(routes_of([(0, 2000)], 16, 4, 2, seed=1), 16), np.ones((4, 16)))
    curves = lru_curves(workload, is_global=True)
    for size in (1, 2, 3, 8, 31, 32, 63):
        assert (curves.hits_LC[:, size].tolist(), [0] * 4) == simulated(workload, size, True)


def test_the_knee() -> None:
    assert knee(range(5), [0, 50, 80, 90, 100]) == 2
    # Of sizes that were chosen unevenly: 8 of 16 is the farthest above the chord.
    assert knee([0, 1, 8, 16], [0.0, 0.1, 0.9, 1.0]) == 8
    # A straight line has none: the smallest size is as good as any.
    assert knee(range(5), [0, 1, 2, 3, 4]) == 0


@pytest.mark.parametrize("largest", [1, 8, 13, 14, 32, 512, 30_720])
def test_sampled_sizes(largest: int) -> None:
    sizes = sampled_sizes(largest)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[1], sizes[-1]) == (0, 1, largest)
    assert len(sizes) <= 19
    assert largest < 14 or {largest // 4, largest // 2} < set(sizes)
    # Rounding changes ratios of small sizes most: 2, 5 instead of 2.2, 4.9.
    ratios = np.array(sizes[2:]) / np.array(sizes[1:-1])
    assert max(ratios, default=0) <= max(2, 1.15 * largest ** (1 / 13))


def test_windows_by_hand() -> None:
    # A prompt of two tokens, five generated tokens with a gap after the third, and another problem.
    routes = routes_of([(2, 5), (0, 2)], 8, 1, 1)
    routes.expert_ids_TLK[:, 0, 0] = [7, 6, 0, 1, 0, 1, 2, 2, 2]
    routes.first_T[:] = [0, 0, 0, 0, 0, 5, 5, 7, 7]
    two = window_sets(routes, 8, 2)
    # 01, 10; 12; 22.
    assert two.windows_LE.tolist() == [[0, 1, 3, 0, 0, 0, 0, 0, 0]]
    assert (two.windows, two.mean_L.tolist(), two.percentile(25), two.percentile(26)) == (4, [1.75], 1, 2)
    assert window_sets(routes, 8, 3).windows_LE.tolist() == [[0, 0, 1, 0, 0, 0, 0, 0, 0]]
    none = window_sets(routes, 8, 4)
    assert none.windows == 0
    assert np.isnan(none.mean_L).all()


@compiled
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 20)), min_size=1, max_size=4), st.integers(1, 12), st.integers(0, 99)
)
def test_windows_as_sets(lengths: list[tuple[int, int]], tokens: int, seed: int) -> None:
    routes = routes_of(lengths, 8, 2, 2, seed)
    expected = np.zeros((2, 9), dtype=int)
    for problem in np.unique(routes.problem_ids_T):
        ids_TLK = routes.expert_ids_TLK[(routes.problem_ids_T == problem) & routes.is_decode_T]
        for first, layer in product(range(len(ids_TLK) - tokens + 1), range(2)):
            expected[layer, len(np.unique(ids_TLK[first : first + tokens, layer]))] += 1
    assert window_sets(routes, 8, tokens).windows_LE.tolist() == expected.tolist()


def test_what_a_step_of_a_batch_needs() -> None:
    routes = routes_of([(3, 2), (0, 3)], 8, 1, 1)
    routes.expert_ids_TLK[3:, 0, 0] = [1, 2, 1, 3, 4]
    requests = requests_of(routes, 8, batch=2)
    # 1 with 1, 2 with 3; then 4 alone. Prompts do not count.
    assert step_sets(requests, 2).windows_LE.tolist() == [[0, 1, 1, 0, 0, 0, 0, 0, 0]]
    assert step_sets(requests, 1).windows == 1
    assert step_sets(requests, 3).windows == 0


def test_percentiles_are_of_windows() -> None:
    sets = WorkingSets(np.array([[0, 9, 1], [0, 8, 2]]))
    assert sets.percentile_L(90).tolist() == [1, 2]
    assert sets.percentile(85) == 1
    assert sets.percentile(90) == 2


@compiled
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6), st.data())
def test_no_other_slots_have_more_hits(layers: int, experts: int, seed: int, data: st.DataObject) -> None:
    # Steps up of any size: most of these curves are not concave.
    gains = np.random.default_rng(seed).integers(0, 6, (layers, experts + 1)) ** 2
    hits_LC = np.cumsum(gains, axis=1)
    total = data.draw(st.integers(0, layers * experts))
    slots_L = best_slots(hits_LC, total)
    assert slots_L.sum() == total
    every = (np.array(each) for each in product(range(experts + 1), repeat=layers))
    assert hits_of(hits_LC, slots_L) == max(hits_of(hits_LC, each) for each in every if each.sum() == total)


def test_where_one_slot_after_the_other_goes_wrong() -> None:
    # The second layer's first slot gains nothing, so it would never get one.
    hits_LC = np.array([[0, 5, 6], [0, 0, 9]])
    assert best_slots(hits_LC, 2).tolist() == [0, 2]


def test_slots_that_cannot_be() -> None:
    for total in (-1, 5):
        with pytest.raises(SpecmoeError, match=f"{total} slots: expected 0 to 4, which have room for every expert"):
            best_slots(np.zeros((2, 3), dtype=np.int64), total)
    assert even_slots(4, 10).tolist() == [3, 3, 2, 2]


def test_a_curve_of_nothing() -> None:
    curves = HitCurves(False, *(np.zeros(shape, dtype=np.int64) for shape in ((2, 4), 2, (2, 4), 2)))
    assert curves.hit_rate_C.tolist() == [0, 0, 0, 0]
