"""The cache of a program with real slots: which expert it evicts for a prefetch, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from profiler.errors import SpecmoeError
from speculation.offload.cache import ExpertCache
from speculation.offload.state import Rule

# One layer of four experts and two slots. Used: 0, 0, 1; so 1 was used last, and 0 more often.
# A prefetch of 2 evicts, by policy:
EVICTED = {
    Rule.LRU: 0,
    Rule.LFU: 1,
    Rule.LFU_AGED: 1,
    Rule.EWMA: 1,
    # 2 uses 2 requests ago, 1 use in the last one: less than half as many per time.
    Rule.LFRU: 0,
    # As if loaded in the order of popularity, the most popular last.
    Rule.FIFO: 1,
    Rule.LEAST_STALE: 1,
    Rule.POPULARITY: 1,
    # Both were used again, but there is room for one only: 0 was protected first, and gives way to 1.
    Rule.SLRU: 0,
    Rule.LEARNED: 1,
}


@pytest.mark.parametrize("rule", list(EVICTED))
def test_what_a_prefetch_evicts(rule: Rule) -> None:
    cache = ExpertCache(rule, [2], 4, np.array([3, 2, 1, 0]), 24.0)
    for expert in (0, 0, 0, 0, 1):
        cache.begin_step(np.array([0.9, 0.3, 0.0, 0.0], dtype=np.float32))
        assert cache.look_up(0, [expert]) == [True]
        cache.note_use(0, [expert])
        cache.release()
    if rule == Rule.LFRU:
        # 0 is left alone until its four uses are fewer per time than the one of 1.
        for _ in range(4):
            cache.begin_step()
            cache.look_up(0, [1])
            cache.note_use(0, [1])
            cache.release()
    cache.predict(0, 2, layers_ahead=1)
    placed = cache.load(0, 2, 0, layers_ahead=1)
    assert placed is not None
    assert placed.evicted == EVICTED[rule]
    # What is predicted is not evicted for another prediction; when both slots are predicted, nothing is.
    cache.predict(0, 3, layers_ahead=1)
    assert cache.load(0, 3, 0, layers_ahead=1) is not None
    assert cache.load(0, placed.evicted, 0, layers_ahead=1) is None


def test_what_a_cache_refuses() -> None:
    ranks = np.arange(4)
    with pytest.raises(SpecmoeError, match="Belady's policy needs to know the future"):
        ExpertCache(Rule.BELADY, [2], 4, ranks, 24.0)
    for time_constant in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(SpecmoeError, match="expected more than 0 steps"):
            ExpertCache(Rule.EWMA, [2], 4, ranks, time_constant)
