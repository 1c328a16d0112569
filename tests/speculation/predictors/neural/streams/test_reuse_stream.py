"""One token at a time, the reuse predictor computes the same features and scores as for many tokens at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.routes import routes_of

from speculation.data.history import History
from speculation.data.routes import Routes
from speculation.data.tasks import Shape, Task
from speculation.predictors.neural.places.reuse_features import FEATURES, WINDOW, reuse_features
from speculation.predictors.neural.places.reuse_memory import ReuseMemory
from speculation.predictors.neural.reuse import Reuse
from speculation.predictors.neural.reuse_small import ReuseSmall
from speculation.predictors.neural.streams.reuse_stream import RecentUse

SHAPE = Shape(layers=2, experts=8, top_k=2, horizon=1, task=Task.REUSE)


def text(tokens: int, seed: int) -> Routes:
    """One text of few distinct tokens."""
    keys = np.random.default_rng(seed).integers(0, 4, tokens)
    return replace(routes_of([(0, tokens)], seed=seed), token_keys_T=keys.astype(np.int64))


@settings(deadline=None, max_examples=20)  # the first call compiles
@given(st.integers(1, WINDOW + 80), st.integers(0, 1000), st.lists(st.integers(1, 60), max_size=12))
def test_features_do_not_depend_on_how_the_tokens_come(tokens: int, seed: int, steps: list[int]) -> None:
    """Whether tokens are added one by one or many at once, also past the window, the features are those of the batch form."""
    routes = text(tokens, seed)
    at_T = np.unique(np.clip(np.cumsum([0, *steps, 1, 1, 1]), 0, tokens - 1))
    matches_TR = routes.matches.by_length_TR
    expected = reuse_features(routes.expert_ids_TLK, routes.first_T, matches_TR, at_T, SHAPE.experts)
    recent = RecentUse(SHAPE)
    # What a feature was before does not matter.
    found = np.full((SHAPE.layers, SHAPE.experts, FEATURES), np.nan, dtype=np.float32)
    for row, token in enumerate(at_T.tolist()):
        recent.advance(routes.expert_ids_TLK[: token + 1], token)
        recent.features(routes.expert_ids_TLK[: token + 1], matches_TR[token], found)
        np.testing.assert_allclose(found, expected[row], atol=1e-5)


def random_predictor(kind: type[Reuse], seed: int) -> Reuse:
    """A predictor whose weights all matter, with a text in its memory."""
    torch.manual_seed(seed)
    predictor = kind(SHAPE, np.array([0, 2, 3]))
    for parameter in predictor.network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if predictor.memory_bytes:
        predictor.memory = ReuseMemory.of(text(200, 5), predictor.memory_bytes)
    return predictor


def scores_of(predictor: Reuse, history: History) -> npt.NDArray[np.float32]:
    """The scores by expert, `[L, E]`."""
    found = predictor.predict(history)
    return np.take_along_axis(found.scores, np.argsort(found.expert_ids, axis=-1), -1)[:, 0]


def add_layers(history: History, routes: Routes, token: int) -> None:
    for layer in range(SHAPE.layers):
        history.add(routes.expert_ids_TLK[token, layer], routes.weights_TLK[token, layer])


@pytest.mark.parametrize("kind", [Reuse, ReuseSmall])
def test_scores_are_those_of_the_network(kind: type[Reuse]) -> None:
    """Two texts at a time, two predictors in each history, and tokens at which nothing is predicted."""
    tokens = WINDOW + 30
    predictors = [random_predictor(kind, seed) for seed in range(2)]
    texts = [text(tokens, seed) for seed in (1, 2)]
    expected = [[each.probabilities(routes, slice(0, tokens))[:, :, 0] for each in predictors] for routes in texts]
    assert np.abs(expected[0][0] - expected[1][0]).max() > 0.1
    histories = [History(SHAPE), History(SHAPE)]
    for token in range(tokens):
        for number, (history, routes) in enumerate(zip(histories, texts, strict=True)):
            history.begin(int(routes.token_keys_T[token]))
            if token < 3 or token % 37 == number or token > tokens - 3:
                for each, predictor in enumerate(predictors):
                    np.testing.assert_allclose(scores_of(predictor, history), expected[number][each][token], atol=1e-4)
            add_layers(history, routes, token)
