"""Requests: each token once, batches as soon as a place is free, prompts before their sequences, unions without repeats."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.routes import routes_of

from profiler.errors import SpecmoeError
from speculation.data.routes import Routes
from speculation.offload.requests import PREFILL_TOKENS, Drafting, requests_of


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


def test_drafts_that_are_all_accepted_or_none() -> None:
    routes = routes_of([(1, 5)])
    # Two draft tokens: three tokens a step, all kept.
    good = requests_of(routes, 8, drafting=Drafting(tokens=2, acceptance=1.0))
    assert [part.tolist() for part in np.split(good.tokens_N, good.first_S[1:-1])] == [[0], [1, 2, 3], [4, 5]]
    assert good.kept_S.tolist() == good.tokens_S.tolist() == [1, 3, 2]
    assert good.sequences_S.tolist() == [1, 1, 1]
    assert good.samples_next_N.tolist() == [True, False, False, True, False, True]
    assert good.is_draft_N.tolist() == [False, False, True, True, False, True]
    # The same steps of a drafter that is always wrong: one token advances.
    bad = requests_of(routes, 8, drafting=Drafting(tokens=2, acceptance=0.0))
    assert bad.tokens_N.tolist() == [0, *[1, 2, 3], *[2, 3, 4], *[3, 4, 5], *[4, 5], 5]
    assert bad.tokens_S.tolist() == [1, 3, 3, 3, 2, 1]
    assert bad.kept_S.tolist() == [1] * 6
    assert bad.is_kept_N.tolist() == bad.samples_next_N.tolist() == (~bad.is_draft_N).tolist()
    # The union of three tokens' experts.
    first = bad.experts_N[bad.starts_R[2] : bad.starts_R[3]].tolist()
    assert set(first) == set(routes.expert_ids_TLK[1:4, 0].reshape(-1).tolist())


def test_a_batch_of_drafts() -> None:
    lengths = [(0, 4), (0, 3)]
    found = requests_of(routes_of(lengths), 8, batch=2, drafting=Drafting(tokens=1, acceptance=1.0))
    assert [part.tolist() for part in np.split(found.tokens_N, found.first_S[1:-1])] == [[0, 1, 4, 5], [2, 3, 6]]
    assert found.sequences_S.tolist() == [2, 2]
    alone = requests_of(routes_of(lengths), 8, batch=1, drafting=Drafting(tokens=1, acceptance=1.0))
    assert [part.tolist() for part in np.split(alone.tokens_N, alone.first_S[1:-1])] == [[0, 1], [2, 3], [4, 5], [6]]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)).filter(any), min_size=1, max_size=6),
    st.integers(1, 3),
    st.integers(0, 4),
    st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    st.integers(0, 100),
)
def test_every_token_is_kept_once(
    lengths: list[tuple[int, int]], batch: int, drafts: int, acceptance: float, seed: int
) -> None:
    routes = routes_of(lengths, seed=seed)
    found = requests_of(routes, 8, batch=batch, drafting=Drafting(tokens=drafts, acceptance=acceptance, seed=seed))
    kept = found.tokens_N[found.is_kept_N]
    assert sorted(kept.tolist()) == list(range(len(routes)))
    step_N = np.repeat(np.arange(found.steps), found.tokens_S)
    for problem in range(len(lengths)):
        own = routes.problem_ids_T[found.tokens_N] == problem
        # Each step has consecutive tokens of a sequence, and the next begins behind the last one that was kept.
        assert (np.diff(found.tokens_N[own & found.is_kept_N]) == 1).all()
        for step in np.unique(step_N[own]).tolist():
            here = own & (step_N == step)
            tokens = found.tokens_N[here].tolist()
            assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
            if found.is_decode_S[step]:
                assert len(tokens) <= drafts + 1
                assert found.is_kept_N[here].tolist() == sorted(found.is_kept_N[here].tolist(), reverse=True)
                assert found.samples_next_N[here].sum() == 1
                assert found.is_kept_N[here][0]
                assert found.is_draft_N[here].tolist() == [False] + [True] * (len(tokens) - 1)
    if drafts == 0:
        plain = requests_of(routes, 8, batch=batch)
        assert (plain.experts_N == found.experts_N).all()
        assert (plain.first_S == found.first_S).all()


def test_as_many_drafts_are_accepted_as_given() -> None:
    """One token for the model's own, and P + P^2 + P^3 for the drafts: each needs the one before it."""
    found = requests_of(routes_of([(0, 60_000)], layers=1), 8, drafting=Drafting(tokens=3, acceptance=0.6))
    expected = 1 + 0.6 + 0.6**2 + 0.6**3
    # Standard deviation of the mean of 27,000 steps: 0.007.
    assert found.kept_S.mean() == pytest.approx(expected, abs=0.035)


@pytest.mark.parametrize(("tokens", "acceptance"), [(-1, 0.5), (2, 1.5), (2, -0.1), (2, float("nan"))])
def test_impossible_drafts(tokens: int, acceptance: float) -> None:
    with pytest.raises(SpecmoeError, match="expected 0 or more tokens, and a probability"):
        requests_of(routes_of([(0, 1)]), 8, drafting=Drafting(tokens=tokens, acceptance=acceptance))


def test_the_strongest_come_first() -> None:
    routes = routes_of([(0, 1)])
    requests = requests_of(routes, 8)
    assert requests.experts_N.tolist() == routes.expert_ids_TLK.reshape(-1).tolist()
    with pytest.raises(SpecmoeError, match="batch 0: expected at least 1"):
        requests_of(routes, 8, batch=0)
