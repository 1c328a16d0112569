"""The formula of recent use and repeats: against a plain loop, and its table keeps the ranking."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from support.routes import routes_of

from profiler.errors import SpecmoeError
from speculation.data.next_use import discounted_use
from speculation.data.routes import Routes
from speculation.data.tasks import Shape, Task
from speculation.predictors.counting.ewma_repeats import AFTER_MATCH, FADE, REPEAT, REPEAT_FADE, EwmaRepeats
from speculation.predictors.options import TrainingOptions

SHAPE = Shape(layers=2, experts=8, top_k=2, horizon=1, task=Task.REUSE)


@pytest.fixture(scope="module")
def routes() -> Routes:
    routes = routes_of([(0, 200), (0, 60)])
    keys = np.random.default_rng(0).integers(0, 5, len(routes))
    # A stretch of 10 tokens that occurs twice.
    keys[170:180] = keys[100:110]
    return replace(routes, token_keys_T=keys.astype(np.int64))


@pytest.fixture(scope="module")
def fitted(routes: Routes) -> EwmaRepeats:
    predictor = EwmaRepeats(SHAPE)
    predictor.fit(routes, None, TrainingOptions(), lambda *_: None)
    return predictor


def plain_sum(routes: Routes, token: int, layer: int, expert: int) -> float:
    ids, first = routes.expert_ids_TLK[:, layer], int(routes.first_T[token])
    total = sum(math.exp(-(token - 1 - at) / FADE) for at in range(first, token) if expert in ids[at])
    if routes.matches.order_T[token]:
        place = int(routes.matches.index_T[token])
        later = [at for at in range(place + 1, min(token, place + 1 + AFTER_MATCH)) if expert in ids[at]]
        total += REPEAT * math.exp(-(later[0] - place - 1) / REPEAT_FADE) if later else 0.0
    return total


def test_experts_are_ranked_by_the_sum_of_a_plain_loop(routes: Routes, fitted: EwmaRepeats) -> None:
    assert routes.matches.index_T[178] == 108
    scores_TLE = fitted.probabilities(routes, slice(0, len(routes)))[:, :, 0]
    for token in (0, 1, 5, 178, 199, 200, 203, 259):
        for layer in range(SHAPE.layers):
            sums = np.array([plain_sum(routes, token, layer, expert) for expert in range(SHAPE.experts)])
            found = scores_TLE[token, layer]
            for expert in range(SHAPE.experts):
                # Older uses than the window's weigh less than 1 % together.
                is_larger = sums > sums[expert] + 0.2
                assert (found[is_larger] >= found[expert]).all()


def test_a_score_is_the_discounted_next_use_on_average(routes: Routes, fitted: EwmaRepeats) -> None:
    scores_TLE = fitted.probabilities(routes, slice(0, len(routes)))[:, :, 0]
    true_TLE = discounted_use(routes.expert_ids_TLK, routes.followers_T, np.arange(len(routes)), SHAPE.experts)
    assert float(scores_TLE.mean()) == pytest.approx(float(true_TLE.mean()), rel=0.02)
    assert scores_TLE.min() >= 0
    assert scores_TLE.max() <= 1.001


def test_a_table_that_falls_is_refused(fitted: EwmaRepeats) -> None:
    arrays = fitted.arrays()
    with pytest.raises(SpecmoeError, match="'scores_P' falls"):
        EwmaRepeats.restore(SHAPE, {}, arrays | {"scores_P": arrays["scores_P"][::-1].copy()})
