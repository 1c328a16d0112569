"""The slot that is found by its key is the one that the policy chooses from the records."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speculation.offload.eviction_policies import choose_victim
from speculation.offload.simulation.occupancy import IN_USE, note_keys, slot_to_vacate
from speculation.offload.simulation.records import POOL, Limits
from speculation.offload.state import NEVER, PRESENT, Rule, expert_records

REQUEST = 100
FEW, MANY = 7, 90


@given(
    st.integers(0, 10**6),
    st.sampled_from([0, 1, FEW, MANY]),
    st.sampled_from([Rule.LRU, Rule.LFRU, Rule.BELADY, Rule.LEAST_STALE]),
    st.integers(1, 1000),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.booleans(),
    st.booleans(),
)
def test_as_the_policy_chooses(
    seed: int, held: int, rule: Rule, distinct: int, in_use: float, predicted: float, is_prefetch: bool, is_served: bool
) -> None:
    random = np.random.default_rng(seed)
    experts = expert_records(np.full(200, NEVER))
    # Keys of both signs, some of them equal, and none at all.
    experts["key"] = random.choice([-np.inf, *random.normal(size=distinct)], 200)
    experts["last_use"] = random.permutation(200)
    experts["chosen_by"] = np.where(random.random(200) < in_use, REQUEST, REQUEST - random.integers(1, 9, 200))
    experts["predicted_for"] = np.where(random.random(200) < predicted, REQUEST + random.integers(0, 3, 200), 0)
    experts["where"] = PRESENT
    pools = np.zeros(1, dtype=POOL)
    pools["first"], pools["capacity"], pools["held"] = 3, held, held
    slots, keys = random.permutation(200), np.zeros(200, dtype=np.int64)
    note_keys(pools[0], experts, slots, keys)
    keys[np.flatnonzero(experts["chosen_by"][slots] == REQUEST)] = IN_USE
    limits = Limits(int(rule), 3, 67, False, 0.0, 0.0, 0.0, 0.0, 0.0, 24.0, False)
    soon = REQUEST + is_served
    found = slot_to_vacate(pools[0], REQUEST, soon, 0.0, is_prefetch, limits, experts, slots, keys)
    chosen = choose_victim(slots[3 : 3 + held], held, int(rule), 3, REQUEST, soon, 0.0, is_prefetch, experts)
    assert found == (3 + chosen if chosen >= 0 else -1)


@pytest.mark.parametrize("values", [[-np.inf, -2.5, -1e-300, 0.0, 1e-300, 1.0, 2.0**60]])
def test_keys_keep_their_order(values: list[float]) -> None:
    experts = expert_records(np.full(len(values), NEVER))
    experts["key"] = values
    pools = np.zeros(1, dtype=POOL)
    pools["held"] = len(values)
    keys = np.zeros(len(values), dtype=np.int64)
    note_keys(pools[0], experts, np.arange(len(values)), keys)
    assert (np.diff(keys) > 0).all()
    assert keys[-1] < IN_USE
