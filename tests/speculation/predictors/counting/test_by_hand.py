"""What counting predictors predict, computed by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.traces import MakeTrace

from profiler.trace.reader import Trace
from profiler.trace.schema import RoutingChunk
from speculation.data.routes import Routes, load_routes, make_routes
from speculation.data.tasks import Shape, Task
from speculation.predictors.counting.conditional_counts import ConditionalCounts
from speculation.predictors.counting.popularity import Popularity
from speculation.predictors.counting.previous_token import PreviousToken
from speculation.predictors.counting.token_identity import TokenIdentity
from speculation.predictors.options import TrainingOptions

OPTIONS = TrainingOptions()


def no_progress(*_: object) -> None:
    pass


def test_popularity_by_hand(make_trace: MakeTrace) -> None:
    ids = np.array([[[0, 1], [2, 3]], [[0, 2], [2, 1]]])
    routes = load_routes(make_trace([(ids, np.tile([0.6, 0.4], (2, 2, 1)))], 4), "all")
    popularity = Popularity(Shape(layers=2, experts=4, top_k=2, horizon=1))
    popularity.fit(routes, None, OPTIONS, no_progress)
    assert popularity.probabilities(routes, slice(0, 1))[0, 0, 0].tolist() == [0, 0.5, 1, 0.5]


def test_conditional_counts_know_the_current_layer(markov_trace: Trace) -> None:
    routes = load_routes(markov_trace, "train")
    counts = ConditionalCounts(Shape(layers=4, experts=8, top_k=2, horizon=2))
    counts.fit(routes, None, OPTIONS, no_progress)
    probabilities = counts.probabilities(routes, slice(0, 50))
    for token in range(50):
        strongest = int(routes.expert_ids_TLK[token, 0, 0])
        assert set(np.argsort(-probabilities[token, 0, 0])[:2].tolist()) == {(strongest + 1) % 8, (strongest + 5) % 8}
        assert set(np.argsort(-probabilities[token, 0, 1])[:2].tolist()) == {(strongest + 2) % 8, (strongest + 6) % 8}


def hand_made(ids: list[list[int]], keys: list[int] | None = None) -> Routes:
    """One problem, one layer, one row of K experts per token."""
    ids_TLK = np.array(ids, np.uint8)[:, None]
    count = len(ids)
    chunk = RoutingChunk(np.zeros(count, np.int32), np.arange(count, dtype=np.int32), ids_TLK, None)
    routes = make_routes(chunk)
    return routes if keys is None else replace(routes, token_keys_T=np.array(keys, np.int64))


def test_previous_token_by_hand() -> None:
    routes = hand_made([[0, 1], [0, 2], [2, 0], [3, 1]])
    predictor = PreviousToken(Shape(layers=1, experts=4, top_k=2, horizon=1, task=Task.NEXT_TOKEN))
    predictor.fit(routes, None, OPTIONS, no_progress)
    # Of three tokens that follow one: the strongest is selected again twice (0 of 0, 1; 0 of 0, 2; not 2), the second once.
    again = [(2 + 0.5) / 4, (1 + 0.5) / 4]
    found = predictor.probabilities(routes, slice(2, 3))[0, 0, 0]
    assert found[[2, 0]] == pytest.approx(again)
    # 1 was absent from two of the three, and then came once; 3 from three, once. Popularity, a half and a quarter, is added.
    assert found[[1, 3]] == pytest.approx([(1 + 0.5) / 3, (1 + 0.25) / 4])


def test_token_identity_by_hand() -> None:
    routes = hand_made([[0, 1], [2, 3], [0, 2]], keys=[7, 9, 7])
    predictor = TokenIdentity(Shape(layers=1, experts=4, top_k=2, horizon=1, task=Task.WHOLE_PATH))
    predictor.fit(routes, None, OPTIONS, no_progress)
    popularity = np.array([2, 1, 2, 1]) / 3
    asked = replace(routes, token_keys_T=np.array([7, 9, 1], np.int64))
    found = predictor.probabilities(asked, slice(0, 3))[:, 0, 0]
    assert found[0] == pytest.approx((np.array([2, 1, 1, 0]) + popularity) / 3)
    assert found[1] == pytest.approx((np.array([0, 0, 1, 1]) + popularity) / 2)
    assert found[2] == pytest.approx(popularity)
    ahead = TokenIdentity(Shape(layers=1, experts=4, top_k=2, horizon=2, task=Task.NEXT_TOKEN))
    ahead.fit(routes, None, OPTIONS, no_progress)
    found = ahead.probabilities(asked, slice(0, 1))[0, 0]
    assert found[0] == pytest.approx((np.array([0, 0, 1, 1]) + popularity) / 2)
    assert found[1] == pytest.approx((np.array([1, 0, 1, 0]) + popularity) / 2)
