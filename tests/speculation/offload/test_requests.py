"""Requests: each token once, batches as soon as a place is free, prompts before their sequences, unions without repeats."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.routes import routes_of

from profiler.errors import SpecmoeError
from speculation.data.routes import Routes
from speculation.offload.requests import PREFILL_TOKENS, requests_of


def steps_of(routes: Routes, batch: int) -> list[tuple[bool, list[tuple[int, int]]]]:
    """(generated or not, its (problem, token)s) of each step."""
    requests = requests_of(routes, 8, batch=batch)
    found = []
    for step in range(requests.steps):
        tokens = requests.tokens_N[requests.first_S[step] : requests.first_S[step + 1]]
        pairs = list(zip(routes.problem_ids_T[tokens].tolist(), routes.token_ids_T[tokens].tolist(), strict=True))
        found.append((bool(requests.is_decode_S[step]), pairs))
    return found


def test_one_at_a_time_is_in_order() -> None:
    assert steps_of(routes_of([(2, 2), (1, 1)]), 1) == [
        (False, [(0, 0), (0, 1)]),
        (True, [(0, 2)]),
        (True, [(0, 3)]),
        (False, [(1, 0)]),
        (True, [(1, 1)]),
    ]


def test_the_next_begins_where_one_ends() -> None:
    # Two places: problem 2 takes that of problem 1, after its single token.
    assert steps_of(routes_of([(1, 3), (1, 1), (2, 2)]), 2) == [
        (False, [(0, 0)]),
        (False, [(1, 0)]),
        (True, [(0, 1), (1, 1)]),
        (False, [(2, 0), (2, 1)]),
        (True, [(0, 2), (2, 2)]),
        (True, [(0, 3), (2, 3)]),
    ]


def test_long_prompts_are_several_steps() -> None:
    steps = steps_of(routes_of([(PREFILL_TOKENS + 3, 1)]), 4)
    assert [len(pairs) for _, pairs in steps] == [PREFILL_TOKENS, 3, 1]


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(any), min_size=1, max_size=8),
    st.integers(1, 5),
    st.integers(0, 100),
)
def test_every_token_is_computed_once_in_its_order(lengths: list[tuple[int, int]], batch: int, seed: int) -> None:
    routes = routes_of(lengths, seed=seed)
    requests = requests_of(routes, 8, batch=batch)
    assert sorted(requests.tokens_N.tolist()) == list(range(len(routes)))
    at = np.empty(len(routes), dtype=np.int64)
    at[requests.tokens_N] = np.repeat(np.arange(requests.steps), requests.tokens_S)
    for problem in range(len(lengths)):
        own = at[routes.problem_ids_T == problem]
        assert (np.diff(own) >= 0).all()
        generated = own[routes.is_decode_T[routes.problem_ids_T == problem]]
        assert (np.diff(generated) > 0).all()
    assert requests.tokens_S[requests.is_decode_S].max(initial=0) <= batch
    for step in range(requests.steps):
        tokens = requests.tokens_N[requests.first_S[step] : requests.first_S[step + 1]]
        assert set(routes.is_decode_T[tokens].tolist()) == {bool(requests.is_decode_S[step])}
        for layer in range(2):
            request = step * 2 + layer
            experts = requests.experts_N[requests.starts_R[request] : requests.starts_R[request + 1]].tolist()
            assert len(set(experts)) == len(experts)
            assert set(experts) == set(routes.expert_ids_TLK[tokens, layer].reshape(-1).tolist())


def test_the_strongest_come_first() -> None:
    routes = routes_of([(0, 1)])
    requests = requests_of(routes, 8)
    assert requests.experts_N.tolist() == routes.expert_ids_TLK.reshape(-1).tolist()
    with pytest.raises(SpecmoeError, match="batch 0: expected at least 1"):
        requests_of(routes, 8, batch=0)
