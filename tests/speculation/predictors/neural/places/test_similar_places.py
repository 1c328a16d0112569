"""Places of the same token: the search against a plain one, what is looked up there, and that nothing unknown is read."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from support.routes import routes_of

from speculation.data.history import History
from speculation.data.repeats import UNKNOWN_TOKEN
from speculation.data.routes import Routes, pack_routes
from speculation.data.tasks import Shape
from speculation.predictors.neural.places import similar_places
from speculation.predictors.neural.places.similar_places import LONGEST_RUN, common_now, find_places, routes_at
from speculation.predictors.neural.places.text_memory import TextMemory

SHAPE = Shape(layers=3, experts=30, top_k=2, horizon=1)
MAX_BYTES = 1 << 20


def texts(lengths: list[int], seed: int, distinct: int = 4) -> Routes:
    """Texts of few distinct tokens, some of them unknown, whose routes agree here and there."""
    routes = routes_of([(0, length) for length in lengths], layers=3, experts=5, seed=seed)
    keys = np.random.default_rng(seed).integers(UNKNOWN_TOKEN, distinct, len(routes))
    # Experts up to 29, so that the bits of a route fill more than one word.
    return replace(routes, token_keys_T=keys.astype(np.int64), expert_ids_TLK=routes.expert_ids_TLK + np.uint8(25))


def common(one: np.ndarray, other: np.ndarray) -> float:
    """The share of experts that two routes have in common."""
    return float(np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(one.tolist(), other.tolist(), strict=True)]))


def plain_worth(routes: Routes, token: int, other: Routes, place: int, is_own: bool, known_back: int) -> float:
    """What a place is worth, by the definition."""
    run = 0
    while (
        run < LONGEST_RUN
        and min(token - run - routes.first_T[token], place - run - other.first_T[place]) > 0
        and routes.token_keys_T[token - run - 1] == other.token_keys_T[place - run - 1] != UNKNOWN_TOKEN
    ):
        run += 1
    shares = [0.0, 0.0]
    for back in range(2):
        here, there = token - known_back - back, place - known_back - back
        if here >= routes.first_T[token] and there >= other.first_T[place]:
            shares[back] = common(routes.expert_ids_TLK[here], other.expert_ids_TLK[there])
    return 1.5 * math.log2(1 + run) / 3 + is_own + 9.6 * shares[0] + 5.8 * shares[1]


@pytest.mark.parametrize("known_back", [0, 1])
def test_places_are_the_best_of_a_plain_search(known_back: int) -> None:
    stored, routes = texts([60, 1, 90], seed=1), texts([40, 3], seed=2)
    memory = TextMemory.of(stored, MAX_BYTES)
    kept = replace(stored, token_keys_T=memory.keys_M, first_T=memory.first_M, expert_ids_TLK=memory.expert_ids_MLK)
    found = find_places(routes, memory, np.arange(len(routes)), SHAPE.experts, 8, known_back)
    for token, key in enumerate(routes.token_keys_T.tolist()):
        own = [
            plain_worth(routes, token, routes, place, True, known_back)
            for place in range(int(routes.first_T[token]), token)
            if key == routes.token_keys_T[place] != UNKNOWN_TOKEN
        ]
        others = [
            plain_worth(routes, token, kept, place, False, known_back)
            for place in np.flatnonzero((memory.keys_M == key) & (key != UNKNOWN_TOKEN)).tolist()
        ]
        best = sorted(own + others, reverse=True)[:8]
        assert (found.index_TP[token] >= 0).sum() == len(best)
        worth = [
            plain_worth(routes, token, routes if is_own else kept, place, is_own, known_back)
            for place, is_own in zip(found.index_TP[token].tolist(), found.is_own_TP[token].tolist(), strict=True)
            if place >= 0
        ]
        assert worth == pytest.approx(best)
    assert found.is_own_TP.any()
    assert (~found.is_own_TP & (found.index_TP >= 0)).any()


@pytest.mark.parametrize("ahead", [range(1), range(1, 3)])
def test_routes_at_places_are_those_that_are_known(ahead: range) -> None:
    known_back = 1 if ahead.start == 0 else 0
    routes = texts([40, 3], seed=2)
    memory = TextMemory.of(texts([60, 1, 90], seed=1), MAX_BYTES)
    tokens_T = np.arange(len(routes))
    places = find_places(routes, memory, tokens_T, SHAPE.experts, 4, known_back)
    found = routes_at(places, routes, memory, tokens_T, known_back, ahead)
    missing = 0
    for token, slot in np.argwhere(places.index_TP >= 0).tolist():
        place, is_own = int(places.index_TP[token, slot]), places.is_own_TP[token, slot]
        ids_XLK = routes.expert_ids_TLK if is_own else memory.expert_ids_MLK
        first = int((routes.first_T if is_own else memory.first_M)[place])
        end = token - known_back + 1 if is_own else int(memory.ends_M[place])
        for number, step in enumerate(ahead):
            exists = place + step < end
            missing += not exists
            assert found.exists_TPS[token, slot, number] == exists
            if exists:
                assert (found.ids_TPSLK[token, slot, number] == ids_XLK[place + step]).all()
        if token - known_back >= routes.first_T[token] and place - known_back >= first:
            there = ids_XLK[place - known_back]
            by_layer = [common(routes.expert_ids_TLK[token - known_back, [n]], there[[n]]) for n in range(SHAPE.layers)]
            assert found.common_TPL[token, slot].tolist() == pytest.approx(by_layer)
        else:
            assert not found.common_TPL[token, slot].any()
    assert missing or ahead.start == 0
    assert not found.exists_TPS[places.index_TP < 0].any()


def test_what_places_have_in_common_with_the_token_itself() -> None:
    routes = texts([20], seed=2)
    ids_TPLK = routes.expert_ids_TLK[None, :3].repeat(20, axis=0).astype(np.int64)
    found_TPL = common_now(routes, np.arange(20), ids_TPLK)
    assert found_TPL[7, 2, 1] == common(routes.expert_ids_TLK[7, [1]], routes.expert_ids_TLK[2, [1]])
    assert (found_TPL[[0, 1, 2], [0, 1, 2]] == 1).all()


def test_a_problem_is_left_out_and_own_places_are_earlier_ones() -> None:
    stored = texts([30, 30], seed=1, distinct=1)
    memory = TextMemory.of(stored, MAX_BYTES)
    tokens_T = np.arange(30)
    without_T = stored.problem_ids_T[tokens_T]
    found = find_places(stored, memory, tokens_T, SHAPE.experts, 60, 1, without_T)
    from_memory = found.index_TP[(found.index_TP >= 0) & ~found.is_own_TP]
    assert len(from_memory)
    assert (memory.problem_ids_M[from_memory] != without_T[0]).all()
    # All of the text's own places are earlier ones.
    own = np.argwhere(found.is_own_TP)
    assert (found.index_TP[found.is_own_TP] < own[:, 0]).all()


def test_a_history_has_the_bits_of_its_routes() -> None:
    routes = texts([300], seed=4)
    history = History(SHAPE)
    for key, ids_LK in zip(routes.token_keys_T.tolist(), routes.expert_ids_TLK.tolist(), strict=True):
        history.begin(None if key < 0 else key)
        for ids_K in ids_LK:
            history.add(ids_K)
    assert (history.routes.packed(SHAPE.experts) == routes.packed(SHAPE.experts)).all()
    assert similar_places.SCANNED > 0


def test_packed_routes_by_hand() -> None:
    packed_TW = pack_routes(np.array([[[0, 39], [1, 39]]], dtype=np.uint8), experts=40)
    assert packed_TW.tolist() == [[1 | 1 << 39 | 1 << 41, 1 << (79 - 64)]]


def test_typical_routes_are_the_most_frequent_experts() -> None:
    routes = texts([200], seed=3)
    memory = TextMemory.typical(routes, np.array([1, 2, 77]), SHAPE)
    assert memory.keys_M.tolist() == [1, 2]
    assert memory.first_M.tolist() == [0, 1]
    for number, key in enumerate((1, 2)):
        for layer in range(SHAPE.layers):
            counts_E = np.bincount(routes.expert_ids_TLK[routes.token_keys_T == key, layer].ravel(), minlength=SHAPE.experts)
            ids_K = memory.expert_ids_MLK[number, layer].tolist()
            assert sorted(counts_E[ids_K].tolist()) == sorted(counts_E.tolist())[-SHAPE.top_k :]
            assert len(set(ids_K)) == SHAPE.top_k


def test_many_places_are_sampled_over_the_whole_memory() -> None:
    stored = texts([6 * similar_places.SCANNED], seed=1, distinct=1)
    memory = TextMemory.of(stored, MAX_BYTES)
    _, order = memory.by_key
    assert len(order) > 2 * similar_places.SCANNED
    known = replace(texts([1], seed=2), token_keys_T=np.zeros(1, dtype=np.int64))
    # Without any token before it, all places are worth the same, and the first that are compared are kept.
    found = find_places(known, memory, np.array([0]), SHAPE.experts, similar_places.SCANNED + 1, 1)
    index_P = found.index_TP[0][found.index_TP[0] >= 0]
    assert len(index_P) == similar_places.SCANNED
    assert np.diff(np.searchsorted(order, index_P)).max() <= len(order) // similar_places.SCANNED + 1
    assert index_P[-1] > order[len(order) * 9 // 10]


def test_texts_that_do_not_fit_are_left_out_and_groups_get_their_share() -> None:
    long_and_short = texts([10, 1000, *[10] * 19], seed=1)
    per_token = long_and_short.expert_ids_TLK[0].nbytes
    memory = TextMemory.of(long_and_short, 500 * per_token)
    assert len(memory.keys_M) == 200
    assert (np.bincount(memory.problem_ids_M) <= 10).all()

    class Groups:
        def __init__(self) -> None:
            self.parts = (texts([10] * 30, seed=1), texts([10] * 30, seed=2))
            self.group_tokens = [300, 300]

        def __len__(self) -> int:
            return 600

        @property
        def problem_ids(self) -> np.ndarray:
            return np.arange(30, dtype=np.int32)

        def group(self, number: int) -> Routes:
            return self.parts[number]

    groups = Groups()
    memory = TextMemory.of(groups, 200 * per_token)
    assert len(memory.keys_M) == 200
    # The first half is of the first group.
    for half, part in zip((slice(0, 100), slice(100, 200)), groups.parts, strict=True):
        starts = {tuple(part.expert_ids_TLK[first].ravel().tolist()) for first in np.unique(part.first_T)}
        assert all(tuple(route.ravel().tolist()) in starts for route in memory.expert_ids_MLK[half][::10])


def test_without_known_tokens_nothing_is_kept() -> None:
    routes = texts([30], seed=1)
    unknown = replace(routes, token_keys_T=np.full(len(routes), UNKNOWN_TOKEN, dtype=np.int64))
    assert not len(TextMemory.of(unknown, MAX_BYTES).keys_M)
