"""The reuse predictor: its features against a plain loop, its size, and what it learns from a known pattern."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from support.routes import routes_of

from profiler.errors import SpecmoeError
from speculation.data.next_use import FADE
from speculation.data.repeats import RUN_LENGTHS
from speculation.data.routes import Routes
from speculation.data.tasks import Shape, Task
from speculation.predictors.neural.places.reuse_features import (
    AFTER_MATCH,
    FADES,
    FEATURES,
    MATCH_FADES,
    WINDOW,
    reuse_features,
)
from speculation.predictors.neural.reuse import Reuse
from speculation.predictors.neural.reuse_small import ReuseSmall
from speculation.predictors.options import TrainingOptions

EXPERTS = 8


@pytest.fixture(scope="module")
def routes() -> Routes:
    """Two problems, one longer than the window, of tokens that repeat."""
    routes = routes_of([(0, WINDOW + 40), (0, 50)], layers=2)
    keys = np.random.default_rng(0).integers(0, 4, len(routes))
    # A stretch of 10 tokens that occurs twice.
    keys[200:210] = keys[100:110]
    return replace(routes, token_keys_T=keys.astype(np.int64))


def plain_features(routes: Routes, token: int, layer: int, expert: int) -> list[float]:
    """The features of one expert, as their documentation says."""
    ids, keys = routes.expert_ids_TLK[:, layer], routes.token_keys_T.tolist()
    first = int(routes.first_T[token])
    begin = max(first, token - WINDOW)
    used = [at for at in range(begin, token) if expert in ids[at]]
    found = [math.log(sum(math.exp(-(token - 1 - at) / fade) for at in used) / fade + 0.01) + 2.5 for fade in FADES]
    found.append(math.log(token - used[-1] if used else token - begin + 20) - 2.0)
    for length in RUN_LENGTHS:
        run = keys[token + 1 - length : token + 1]
        places = [at for at in range(first + length - 1, token) if keys[at + 1 - length : at + 1] == run]
        if token + 1 - length < first or not places:
            found += [0.0] * (1 + len(MATCH_FADES))
            continue
        place = places[-1]
        later = [at for at in range(place + 1, min(token, place + 1 + AFTER_MATCH)) if expert in ids[at]]
        found.append(float(expert in ids[place]))
        found += [math.exp(-(later[0] - place - 1) / fade) if later else 0.0 for fade in MATCH_FADES]
    return found


def test_features_are_those_of_a_plain_loop(routes: Routes) -> None:
    tokens_T = np.array([0, 1, 2, 37, 105, 209, 210, WINDOW + 39, WINDOW + 40, WINDOW + 41, len(routes) - 1])
    found = reuse_features(routes.expert_ids_TLK, routes.first_T, routes.matches.by_length_TR, tokens_T, EXPERTS)
    assert found.shape == (len(tokens_T), 2, EXPERTS, FEATURES)
    for row, token in enumerate(tokens_T.tolist()):
        for layer in range(2):
            for expert in range(EXPERTS):
                expected = plain_features(routes, token, layer, expert)
                assert found[row, layer, expert] == pytest.approx(expected, abs=1e-5), (token, layer, expert)
    # The repeated stretch is found by its longer runs; shorter ones also end at later places.
    assert (routes.matches.by_length_TR[209] == [202, 154, 109, 109]).all()


def test_the_small_form_is_small() -> None:
    shape = Shape(layers=24, experts=32, top_k=4, horizon=1, task=Task.REUSE)
    parameters = ReuseSmall.parameters_for(shape)
    assert parameters is not None
    # Stored in half precision.
    assert 2 * parameters < 1e6
    with pytest.raises(SpecmoeError, match="horizon 2: reuse has no horizon to choose, expected 1"):
        Shape(layers=24, experts=32, top_k=4, horizon=2, task=Task.REUSE)


def test_it_learns_a_period() -> None:
    """Token t uses experts t mod 8 and t + 4 mod 8: what comes next is certain, whatever was used most."""
    count = 600
    ids = np.stack([np.arange(count) % EXPERTS, (np.arange(count) + 4) % EXPERTS], axis=1)
    routes = routes_of([(0, count)], layers=2)
    routes = replace(
        routes,
        expert_ids_TLK=np.repeat(ids[:, None], 2, axis=1).astype(np.uint8),
        token_keys_T=np.arange(count) % 4,
    )
    predictor = Reuse(Shape(layers=2, experts=EXPERTS, top_k=2, horizon=1, task=Task.REUSE))
    options = TrainingOptions(epochs=15, batch_tokens=32, width=16, average=20, learning_rate=5e-3)
    predictor.fit(routes, None, options, lambda *_: None)
    scores_LE = predictor.probabilities(routes, slice(300, 301))[0, :, 0]
    # 300 mod 8 is 4: used next are 5 and 1, then 6 and 2, then 7 and 3, then 0 and 4.
    expected = [math.exp(-3 / FADE), 1.0, math.exp(-1 / FADE), math.exp(-2 / FADE)] * 2
    assert np.abs(scores_LE - expected).max() < 0.15
    assert [set(np.argsort(-row)[:2].tolist()) for row in scores_LE] == [{1, 5}, {1, 5}]
