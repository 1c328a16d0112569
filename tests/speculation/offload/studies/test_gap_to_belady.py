"""The share of the gap between lru and Belady's policy: hand-computed, its interval, and the policies at its ends."""

from __future__ import annotations

import numpy as np
import pytest
from support.routes import routes_of

from speculation.offload.requests import requests_of
from speculation.offload.simulation.records import Count
from speculation.offload.simulation.simulate import Setting, Workload, simulate
from speculation.offload.state import Rule
from speculation.offload.studies.gap_to_belady import Gap

ROUTES = routes_of([(0, 40), (5, 30), (0, 25)], layers=3)
WORKLOAD = Workload(requests_of(ROUTES, 8), np.tile(np.arange(8, 0, -1.0), (3, 1)))


def test_the_ends_and_between() -> None:
    gap = Gap(WORKLOAD, 4, is_global=False)
    ends = [simulate(WORKLOAD, Setting(rule, 4)) for rule in (Rule.LRU, Rule.BELADY)]
    assert gap.captured(ends[0]) == (0.0, 0.0, 0.0)
    assert gap.captured(ends[1]) == (1.0, 1.0, 1.0)
    lru, belady = (end.total(Count.HIT) for end in ends)
    for rule in (Rule.FIFO, Rule.LFU, Rule.EWMA):
        own = simulate(WORKLOAD, Setting(rule, 4))
        captured, low, high = gap.captured(own)
        assert captured == pytest.approx((own.total(Count.HIT) - lru) / (belady - lru))
        assert captured is not None
        assert low is not None
        assert high is not None
        assert low <= captured <= high
        assert low < high


def test_hits_are_added_up_by_problem() -> None:
    gap = Gap(WORKLOAD, 4, is_global=False)
    result = simulate(WORKLOAD, Setting(Rule.LRU, 4))
    # One sequence at a time: a decoding step is a token.
    hits_S, problem_S = (array[WORKLOAD.requests.is_decode_S] for array in (result.hits_S, WORKLOAD.requests.problem_S))
    expected = [int(hits_S[problem_S == problem].sum()) for problem in range(3)]
    assert gap._by_problem(result).tolist() == expected
    assert sum(expected) == result.total(Count.HIT)


def test_without_an_interval() -> None:
    # Sequences that are decoded together share their steps.
    together = Workload(requests_of(ROUTES, 8, batch=3), WORKLOAD.popularity_LE)
    captured, low, high = Gap(together, 5, is_global=True).captured(simulate(together, Setting(Rule.FIFO, 5, is_global=True)))
    assert captured is not None
    assert (low, high) == (None, None)
    # With room for every expert, there is no gap.
    everything = simulate(WORKLOAD, Setting(Rule.FIFO, 8))
    assert Gap(WORKLOAD, 8, is_global=False).captured(everything) == (None, None, None)
