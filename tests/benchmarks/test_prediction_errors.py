"""Where a predictor is wrong, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.prediction_errors import common_with_last, hits_of, rows
from profiler.trace.schema import RoutingChunk
from speculation.data.routes import make_routes
from speculation.data.tasks import Shape
from speculation.predictors.counting.popularity import Popularity
from speculation.predictors.options import TrainingOptions


def test_by_hand() -> None:
    """Tokens a b a, two layers. Experts 0 and 1 are the popular ones of the second layer."""
    ids = np.array([[[0, 1], [0, 1]], [[2, 3], [0, 1]], [[2, 0], [0, 2]]], dtype=np.uint8)
    chunk = RoutingChunk(np.zeros(3, np.int32), np.arange(3, dtype=np.int32), ids, np.full(ids.shape, 0.5, np.float16))
    routes = replace(make_routes(chunk), token_keys_T=np.array([5, 6, 5]))
    predictor = Popularity(Shape(layers=2, experts=4, top_k=2, horizon=1))
    predictor.fit(routes, None, TrainingOptions(), lambda *_: None)
    assert common_with_last(routes).tolist() == [0, 0.5, 0.5]
    hits = hits_of(predictor, routes)
    found = {(group, value): (share, recall) for group, value, share, recall, _ in rows(hits, routes, has_weights=True)}
    # Only the second layer is predicted, as experts 0 and 1: 2 + 2 + 1 of six are right.
    assert found["all", ""] == pytest.approx((1, 5 / 6))
    ranks = [found["rank of the true expert by weight", rank] for rank in "12"]
    assert ranks == [pytest.approx((0.5, 1)), pytest.approx((0.5, 2 / 3))]
    assert found["last tokens that occurred before in the text", "1"] == pytest.approx((1 / 3, 0.5))
    assert found["last tokens that occurred before in the text", "0"] == pytest.approx((2 / 3, 1))
    values = [value for group, value in found if group == "last tokens that occurred before in the text"]
    assert values == ["0", "1", "2 to 3", "4 to 7", "8 or more"]
    # Without weights, the order of the experts means nothing.
    unordered = {(group, value) for group, value, *_ in rows(hits, routes, has_weights=False)}
    assert found.keys() - unordered == {("rank of the true expert by weight", rank) for rank in "12"}
