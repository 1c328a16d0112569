"""Counts of live rows: by hand, and the same as the analysis of the same rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from support.traces import MakeProblems, MakeTrace

from analysis import count_trace
from analysis.statistics.load import load_statistics
from profiler.live.metrics import (
    BUSIEST,
    DECODE,
    ENTROPY,
    MAX_OVER_MEAN,
    MIXED,
    MOST_STEP_EXPERTS,
    REPEATED,
    STEP_EXPERTS,
    TOTAL,
    Samples,
)
from vllm_patch.live import counts as counts_module
from vllm_patch.live.counts import PARTS, RollingCounts, RoutingCounts, RowCounter


def count(counter: RowCounter, steps: list[list[tuple[int, int, list[list[int]]]]]) -> RoutingCounts:
    """Count steps of rows (request, position, experts of each layer)."""
    rows = [row for step in steps for row in step]
    return counter.count(
        np.array([number for number, _, _ in rows], dtype=np.int32),
        np.array([position for _, position, _ in rows], dtype=np.int32),
        np.array([ids for _, _, ids in rows]),
        np.array([len(step) for step in steps]),
        np.array([len({number for number, _, _ in step}) == len(step) for step in steps]),
    )


def samples_of(counts: RoutingCounts, layers: list[int], top_k: int) -> Samples:
    samples = Samples()
    counts.samples(samples, layers, top_k, TOTAL)
    return samples


def test_counts_by_hand() -> None:
    counter = RowCounter(layers=1, experts=4, top_k=2)
    # A prompt of two tokens, then two sequences with a token each.
    steps = [[(0, 0, [[0, 1]]), (0, 1, [[1, 0]])], [(0, 2, [[1, 2]]), (1, 5, [[3, 2]])]]
    counts = count(counter, steps)
    assert counts.tokens == 4
    assert counts.load_LE.tolist() == [[2, 3, 2, 1]]
    # Of request 0: {0,1} again, then {1,2} shares one. Request 1 has no token before.
    assert (int(counts.compared), counts.repeated_L.tolist()) == (2, [3])
    assert counts.steps_2.tolist() == [1, 1]
    assert (counts.union_2L.tolist(), counts.largest_2L.tolist()) == ([[3], [2]], [[3], [2]])
    samples = samples_of(counts, [7], 2)
    assert samples.get(MAX_OVER_MEAN, 7, TOTAL) == pytest.approx(3 / 2)
    assert samples.get(BUSIEST, 7, TOTAL) == pytest.approx(3 / 8)
    assert samples.get(ENTROPY, 7, TOTAL) == pytest.approx((2 * 2 / 8 * 2 + 3 / 8 * np.log2(8 / 3) + 1 / 8 * 3) / 2)
    assert samples.get(REPEATED, 7, TOTAL) == pytest.approx(3 / 4)
    assert [samples.get(STEP_EXPERTS, 7, kind, TOTAL) for kind in (DECODE, MIXED)] == [3, 2]
    # The next batch continues both sequences; then request 1 ends, and its number means another one.
    counts.add(count(counter, [[(1, 6, [[3, 2]]), (0, 3, [[0, 3]])]]))
    assert (int(counts.compared), counts.repeated_L.tolist(), counts.union_2L[0].tolist()) == (4, [5], [6])
    assert samples_of(counts, [7], 2).get(MOST_STEP_EXPERTS, 7, DECODE, TOTAL) == 3
    counter.forget([1])
    assert count(counter, [[(1, 7, [[3, 2]])]]).compared == 0


@pytest.mark.parametrize(
    ("second", "why"),
    [((0, 1), "computed again after preemption"), ((0, 4), "positions between them were not counted"), ((1, 2), "another one")],
)
def test_only_consecutive_positions_of_one_request_are_compared(second: tuple[int, int], why: str) -> None:
    counts = count(RowCounter(1, 4, 1), [[(0, 1, [[2]])], [(*second, [[2]])]])
    assert counts.compared == 0, why


def test_unknown_requests_are_not_compared_with_each_other() -> None:
    counter = RowCounter(1, 4, 1)
    assert count(counter, [[(-1, 1, [[2]])], [(-1, 2, [[2]])]]).compared == 0
    assert count(counter, [[(-1, 3, [[2]])]]).compared == 0


def test_layers_without_tokens_have_no_load() -> None:
    assert samples_of(RoutingCounts.zeros(2, 4), [0, 1], 2).values == {}


def random_steps(random: np.random.Generator, trace: Any) -> list[list[tuple[int, int, npt.NDArray[Any]]]]:
    """All tokens of a trace in steps as an engine would compute them: prompts in chunks, sequences interleaved."""
    waiting = {
        int(n): list(range(len(trace.arrays(int(n)).token_ids_T))) for n in trace.problems.column("problem_id").to_numpy()
    }
    ids = {number: trace.arrays(number).expert_ids_TLK for number in waiting}
    steps = []
    while waiting:
        chosen = random.permutation(sorted(waiting))[: random.integers(1, 4)]
        step = []
        for number in chosen.tolist():
            for _ in range(int(random.integers(1, 3))):
                if waiting[number]:
                    position = waiting[number].pop(0)
                    step.append((number, position, ids[number][position]))
            if not waiting[number]:
                del waiting[number]
        steps.append(step)
    return steps


@pytest.mark.parametrize(("experts", "top_k", "cells"), [(8, 2, 1 << 21), (8, 1, 40), (300, 4, 1)])
def test_counts_equal_the_analysis_however_steps_are_batched(
    make_trace: MakeTrace,
    random_problems: MakeProblems,
    monkeypatch: pytest.MonkeyPatch,
    experts: int,
    top_k: int,
    cells: int,
) -> None:
    monkeypatch.setattr(counts_module, "MAX_CELLS", cells)
    trace = make_trace(random_problems(9, 12, 3, experts, top_k), experts)
    random = np.random.default_rng(1)
    steps = random_steps(random, trace)
    counter, total = RowCounter(3, experts, top_k), RoutingCounts.zeros(3, experts)
    while steps:
        size = int(random.integers(1, 5))
        batch, steps = steps[:size], steps[size:]
        total.add(count(counter, [[(n, p, ids.tolist()) for n, p, ids in step] for step in batch]))
    expected = count_trace(trace)
    load, samples = load_statistics(expected.load.counts.sum((0, 1))), samples_of(total, [0, 1, 2], top_k)
    shared_L = expected.repetition.same.sum(0)[0, :, 2] / expected.repetition.seen.sum(0)[0] / top_k
    assert total.tokens == 9 * 12
    assert (total.load_LE == load.counts_LE).all()
    for layer in range(3):
        assert samples.get(ENTROPY, layer, TOTAL) == pytest.approx(load.entropy_share[layer])
        assert samples.get(MAX_OVER_MEAN, layer, TOTAL) == pytest.approx(load.max_over_mean[layer])
        assert samples.get(BUSIEST, layer, TOTAL) == pytest.approx(load.share_LE[layer].max())
        assert samples.get(REPEATED, layer, TOTAL) == pytest.approx(shared_L[layer])


def test_the_window_forgets_what_is_older_and_keeps_the_rest() -> None:
    rolling = RollingCounts(1, 2, seconds=PARTS * 5.0)
    counter = RowCounter(1, 2, 1)

    def add(expert: int, now: float) -> None:
        rolling.add(count(counter, [[(0, 0, [[expert]])]]), now)

    add(0, 100.0)
    add(0, 104.9)
    add(1, 105.0)
    assert rolling.total(130.0).load_LE.tolist() == [[2, 1]]
    # The part from 100 to 105 leaves the window when that from 160 to 165 begins: 60 seconds.
    assert rolling.total(159.9).load_LE.tolist() == [[2, 1]]
    assert rolling.total(160.0).load_LE.tolist() == [[0, 1]]
    assert rolling.total(164.9).tokens == 1
    assert rolling.total(165.0).tokens == 0
    add(1, 1e6)
    assert rolling.total(1e6).load_LE.tolist() == [[0, 1]]


def test_the_largest_step_of_the_window_is_a_maximum_not_a_sum() -> None:
    rolling, counter = RollingCounts(1, 8, seconds=60.0), RowCounter(1, 8, 1)
    for now, experts in ((0.0, [1, 2, 3]), (6.0, [4, 5])):
        rolling.add(count(counter, [[(n, 0, [[expert]]) for n, expert in enumerate(experts)]]), now)
    total = rolling.total(7.0)
    assert (total.union_2L[0].tolist(), total.largest_2L[0].tolist()) == ([5], [3])
    assert rolling.total(62.0).largest_2L[0].tolist() == [2]
