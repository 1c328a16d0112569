"""A history fed token by token and layer by layer gives the same predictions as whole routes, for every predictor."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.errors import SpecmoeError
from profiler.trace.schema import RoutingChunk
from speculation import load_predictor
from speculation.data.history import ABSTAIN, FIRST_CAPACITY, History, Prediction
from speculation.data.routes import Routes, make_routes
from speculation.data.tasks import Shape, Task
from speculation.predictors.base import Predictor
from speculation.predictors.neural.ensemble import Ensemble
from speculation.predictors.options import TrainingOptions
from speculation.predictors.registry import predictor_classes

LAYERS, EXPERTS, TOP_K = 4, 8, 2
CASES = [(name, task) for name, cls in predictor_classes().items() for task in sorted(cls.tasks) if not cls.needs_router_inputs]


def shape_of(task: Task, horizon: int = 2) -> Shape:
    return Shape(
        layers=LAYERS, experts=EXPERTS, top_k=TOP_K, horizon=1 if task in {Task.WHOLE_PATH, Task.REUSE} else horizon, task=task
    )


def random_routes(problems: int = 12, tokens: int = 25, seed: int = 0) -> Routes:
    """Problems with few distinct tokens, so that many occurred before, and whose routes follow from the tokens."""
    random = np.random.default_rng(seed)
    count = problems * tokens
    keys = random.integers(0, 9, count)
    strongest = (keys[:, None] + np.arange(LAYERS) + (random.random((count, LAYERS)) < 0.2)) % EXPERTS
    ids = np.stack([strongest, (strongest + 3) % EXPERTS], -1).astype(np.uint8)
    share = random.uniform(0.5, 1, (count, LAYERS, 1))
    weights = np.concatenate([share, 1 - share], -1).astype(np.float16)
    places = np.repeat(np.arange(problems), tokens).astype(np.int32), np.tile(np.arange(tokens), problems).astype(np.int32)
    return replace(make_routes(RoutingChunk(*places, ids, weights)), token_keys_T=keys)


@cache
def fitted(name: str, task: Task, horizon: int = 2) -> Predictor:
    predictor = predictor_classes()[name](shape_of(task, horizon))
    predictor.fit(random_routes(), None, TrainingOptions(epochs=1, batch_tokens=64, width=32), lambda *_: None)
    return predictor


def add_tokens(history: History, routes: Routes, tokens: range) -> None:
    for token in tokens:
        history.begin(int(routes.token_keys_T[token]), is_decode=bool(routes.is_decode_T[token]))
        for layer in range(LAYERS):
            history.add(routes.expert_ids_TLK[token, layer], routes.weights_TLK[token, layer])


def by_expert(prediction: Prediction) -> np.ndarray:
    scores = np.empty(prediction.scores.shape)
    np.put_along_axis(scores, prediction.expert_ids, prediction.scores, -1)
    return scores


@given(layers=st.integers(1, 5), experts=st.integers(2, 70), seed=st.integers(0, 99), requests=st.sets(st.integers(0, 60)))
def test_packed_routes_are_those_of_the_known_layers(layers: int, experts: int, seed: int, requests: set[int]) -> None:
    """Whenever they are requested: after any `begin` or `add`, several times or rarely, and across a growth of the arrays."""
    random = np.random.default_rng(seed)
    shape = Shape(layers=layers, experts=experts, top_k=2, horizon=1, task=Task.WHOLE_PATH)
    expected = np.zeros((0, layers * experts), dtype=np.bool_)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("speculation.data.history.FIRST_CAPACITY", 4)
        history = History(shape)

    def check() -> None:
        packed_TW = history.routes.packed(experts)
        bits = np.unpackbits(packed_TW.view(np.uint8), axis=1, bitorder="little")
        assert (bits[:, : layers * experts].astype(np.bool_) == expected).all()
        assert not bits[:, layers * experts :].any()

    step = 0
    for _ in range(11):
        history.begin(int(random.integers(0, 3)))
        expected = np.append(expected, np.zeros((1, layers * experts), dtype=np.bool_), axis=0)
        for layer in range(layers):
            step += 1
            if step in requests:
                check()
            ids = random.choice(experts, 2, replace=False)
            history.add(ids)
            expected[-1, layer * experts + ids] = True
    check()


def test_routes_are_packed_for_predictors_that_need_it_only() -> None:
    history = History(shape_of(Task.NEXT_LAYER))
    add_tokens(history, random_routes(1, 5), range(5))
    fitted("mlp", Task.NEXT_LAYER).probabilities(history.routes, slice(4, 5))
    assert not len(history._packed._packed_TW)
    fitted("recommended-small", Task.NEXT_LAYER).probabilities(history.routes, slice(4, 5))
    assert len(history._packed._packed_TW) == 5


@pytest.mark.parametrize(("name", "task"), CASES)
def test_predictions_are_those_from_whole_routes(name: str, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ensemble, "threshold", 0.0)
    predictor, routes = fitted(name, task), random_routes(1, 18, seed=1)
    history = History(predictor.shape)
    for token in range(18):
        expected_LHE = predictor.probabilities(routes, slice(token, token + 1))[0]
        history.begin(int(routes.token_keys_T[token]), is_decode=False)
        if task in {Task.WHOLE_PATH, Task.REUSE}:
            assert by_expert(predictor.predict(history)) == pytest.approx(expected_LHE, abs=2e-5)
        for layer in range(LAYERS):
            # In any order; it is the weights that say which is the strongest.
            order = [1, 0] if token % 2 else [0, 1]
            history.add(routes.expert_ids_TLK[token, layer, order], routes.weights_TLK[token, layer, order])
            if task == Task.NEXT_LAYER and layer < LAYERS - 1:
                prediction = predictor.predict(history)
                assert prediction.expert_ids.shape == (min(2, LAYERS - 1 - layer), EXPERTS)
                assert (np.diff(prediction.scores, axis=-1) <= 0).all()
                expected_HE = expected_LHE[layer, : len(prediction.scores)]
                assert by_expert(prediction) == pytest.approx(expected_HE, abs=2e-5)
        if task == Task.NEXT_TOKEN:
            assert by_expert(predictor.predict(history)) == pytest.approx(expected_LHE, abs=2e-5)


def test_the_ensemble_abstains_where_it_is_unsure(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, routes = fitted("ensemble", Task.NEXT_LAYER, horizon=1), random_routes(1, 20, seed=6)
    confidence = np.sort(predictor.probabilities(routes, slice(0, 20))[:, :-1, 0], axis=-1)[..., -TOP_K:].mean(-1)
    monkeypatch.setattr(Ensemble, "threshold", float(np.median(confidence)) + 1e-6)
    history = History(predictor.shape)
    silent = 0
    for token in range(20):
        history.begin(int(routes.token_keys_T[token]), is_decode=False)
        for layer in range(LAYERS):
            history.add(routes.expert_ids_TLK[token, layer], routes.weights_TLK[token, layer])
            if layer < LAYERS - 1:
                found = predictor.predict(history)
                is_sure = confidence[token, layer] >= Ensemble.threshold
                assert (found.expert_ids == ABSTAIN).all() != is_sure
                assert (found.scores > 0).all() == is_sure
                silent += not is_sure
    assert 20 < silent < 40


def test_a_layer_that_was_not_asked_about_changes_nothing() -> None:
    """The state is carried on, whether or not somebody wanted the prediction in between."""
    predictor, routes = fitted("recommended-small", Task.NEXT_LAYER), random_routes(1, 5, seed=2)
    every, last = History(predictor.shape), History(predictor.shape)
    for history in (every, last):
        add_tokens(history, routes, range(4))
        history.begin(int(routes.token_keys_T[4]))
    for layer in range(LAYERS - 1):
        for history in (every, last):
            history.add(routes.expert_ids_TLK[4, layer], routes.weights_TLK[4, layer])
        found = predictor.predict(every)
    # Asked twice, the same.
    for history in (every, last):
        assert by_expert(predictor.predict(history)) == pytest.approx(by_expert(found), abs=1e-7)


def test_two_predictors_and_two_histories_do_not_mix() -> None:
    one, other = fitted("recommended-small", Task.NEXT_LAYER), fitted("recommended-small", Task.NEXT_LAYER, horizon=1)
    first, second = random_routes(1, 6, seed=3), random_routes(1, 6, seed=4)
    histories = [History(one.shape), History(one.shape)]
    for history, routes in zip(histories, (first, second), strict=True):
        add_tokens(history, routes, range(5))
        history.begin(int(routes.token_keys_T[5]))
        history.add(routes.expert_ids_TLK[5, 0], routes.weights_TLK[5, 0])
    for _ in range(2):
        for history, routes in zip(histories, (first, second), strict=True):
            for predictor in (one, other):
                expected = predictor.probabilities(routes, slice(5, 6))[0, 0]
                assert by_expert(predictor.predict(history)) == pytest.approx(expected[: predictor.shape.horizon], abs=2e-5)


def test_long_sequences_and_unknown_tokens() -> None:
    count = 2 * FIRST_CAPACITY + 3
    routes = random_routes(1, count, seed=5)
    unknown = np.random.default_rng(0).random(count) < 0.1
    routes = replace(routes, token_keys_T=np.where(unknown, -1, routes.token_keys_T), token_ids_T=routes.token_ids_T + 40)
    history = History(shape_of(Task.NEXT_TOKEN), position=40)
    for token in range(count):
        history.begin(None if unknown[token] else int(routes.token_keys_T[token]), is_decode=False)
        for layer in range(LAYERS):
            history.add(routes.expert_ids_TLK[token, layer], routes.weights_TLK[token, layer])
    for name in Routes.__dataclass_fields__:
        assert np.array_equal(getattr(history.routes, name), getattr(routes, name)), name
    assert np.array_equal(history.routes.previous_T, routes.previous_T)
    assert np.array_equal(history.routes.matches.order_T, routes.matches.order_T)
    assert np.array_equal(history.routes.matches.index_T, routes.matches.index_T)


def test_what_cannot_be_told_or_predicted_is_named(tmp_path: Path) -> None:
    predictor = fitted("popularity", Task.NEXT_LAYER)
    history = History(predictor.shape)
    with pytest.raises(SpecmoeError, match="begin a token first"):
        history.add([0, 1])
    with pytest.raises(SpecmoeError, match="next-layer predicts nothing before the first token"):
        predictor.predict(history)
    history.begin(5)
    with pytest.raises(SpecmoeError, match="predicts nothing after layer -1 of token 0"):
        predictor.predict(history)
    for wrong in ([0, 8], [0], [-1, 2]):
        with pytest.raises(SpecmoeError, match="expected 2 from 0 to 7"):
            history.add(wrong)
    for ids, weights in (([3, 3], None), ([0, 1], [float("nan"), 1.0])):
        with pytest.raises(SpecmoeError, match="expected distinct experts, finite weights"):
            history.add(ids, weights)
    history.add([0, 1])
    with pytest.raises(SpecmoeError, match="token 0 has routes of 1 layer, expected 4"):
        history.begin(6)
    for _ in range(3):
        history.add([0, 1])
    with pytest.raises(SpecmoeError, match="predicts nothing after layer 3 of token 0"):
        predictor.predict(history)
    with pytest.raises(SpecmoeError, match="begin a token first"):
        history.add([0, 1])
    with pytest.raises(SpecmoeError, match="the history is for"):
        predictor.predict(History(Shape(layers=5, experts=8, top_k=2, horizon=2)))
    history = History(predictor.shape)
    history.begin(1)
    with pytest.raises(SpecmoeError, match=r"router input of shape \(3, 8\)"):
        history.add([0, 1], None, np.zeros((3, 8)))
    # Nothing of it stays.
    assert history.layer == -1
    history.add([0, 1], None, np.zeros(8))
    with pytest.raises(SpecmoeError, match="router input is missing: expected one for every token and layer"):
        history.add([0, 1])
    with pytest.raises(SpecmoeError, match="is not a run"):
        load_predictor(tmp_path)
