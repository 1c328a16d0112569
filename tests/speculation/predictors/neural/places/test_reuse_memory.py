"""The memory of training texts: what it finds against plain loops, that a text never finds itself, and what is stored."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.routes import routes_of

from profiler.errors import SpecmoeError
from speculation.data.repeats import UNKNOWN_TOKEN
from speculation.data.routes import Routes
from speculation.data.tasks import Shape, Task
from speculation.predictors.neural.places.reuse_features import FEATURES
from speculation.predictors.neural.places.reuse_memory import (
    AFTER_PLACE,
    FADES,
    LENGTHS,
    MEMORY_FEATURES,
    PER_LENGTH,
    PLACES,
    ReuseMemory,
)
from speculation.predictors.neural.reuse import Reuse

SHAPE = Shape(layers=2, experts=8, top_k=2, horizon=1, task=Task.REUSE)
MAX_BYTES = 1 << 20


def texts(lengths: list[int], seed: int, distinct: int = 4) -> Routes:
    """Texts of few distinct tokens, some of them unknown."""
    routes = routes_of([(0, length) for length in lengths], seed=seed)
    keys = np.random.default_rng(seed).integers(UNKNOWN_TOKEN, distinct, len(routes))
    return replace(routes, token_keys_T=keys.astype(np.int64))


def run_at(routes: Routes, token: int, length: int) -> list[int] | None:
    """The run of this length that ends at the token, if the text has one of known tokens."""
    run: list[int] = routes.token_keys_T[max(0, token + 1 - length) : token + 1].tolist()
    return run if token + 1 - length >= routes.first_T[token] and UNKNOWN_TOKEN not in run else None


def test_places_are_those_of_a_plain_search() -> None:
    stored, routes = texts([60, 1, 90], seed=1), texts([40, 3], seed=2)
    memory = ReuseMemory.of(stored, MAX_BYTES)
    kept = replace(stored, token_keys_T=memory.keys_M, first_T=memory.first_M)
    found_TGP = memory.places(routes, np.arange(len(routes)))
    for token in range(len(routes)):
        for number, length in enumerate(LENGTHS):
            run = run_at(routes, token, length)
            every = [] if run is None else [at for at in range(len(kept)) if run_at(kept, at, length) == run]
            found = [at for at in found_TGP[token, number].tolist() if at >= 0]
            assert len(set(found)) == len(found) == min(PLACES, len(every))
            assert set(found) <= set(every)
            if len(every) > 2 * PLACES:
                # Not only the first ones.
                assert max(found) > sorted(every)[len(every) // 2]
    assert (found_TGP[:, 0, -1] >= 0).any()


def test_features_are_those_of_a_plain_loop() -> None:
    memory = ReuseMemory.of(texts([60, 70], seed=1), MAX_BYTES)
    routes = texts([30], seed=3)
    places_TGP = memory.places(routes, np.arange(len(routes)))
    found_TLEF = np.zeros((len(routes), SHAPE.layers, SHAPE.experts, MEMORY_FEATURES), dtype=np.float32)
    memory.add_features(places_TGP, found_TLEF)
    for token in (0, 1, 7, 29):
        for number in range(len(LENGTHS)):
            places = [at for at in places_TGP[token, number].tolist() if at >= 0]
            for layer in range(SHAPE.layers):
                ids = memory.expert_ids_MLK[:, layer]
                for expert in range(SHAPE.experts):
                    rows = []
                    for place in places:
                        end = place + 1
                        while end < min(len(ids), place + 1 + AFTER_PLACE) and memory.first_M[end] == memory.first_M[place]:
                            end += 1
                        later = [at for at in range(place + 1, end) if expert in ids[at]]
                        soon = [math.exp(-(later[0] - place - 1) / fade) if later else 0.0 for fade in FADES]
                        rows.append([float(expert in ids[place]), *soon])
                    means = np.mean(rows, axis=0).tolist() if rows else [0.0] * (1 + len(FADES))
                    expected = [*means, math.log1p(len(places))]
                    found = found_TLEF[token, layer, expert, number * PER_LENGTH : (number + 1) * PER_LENGTH]
                    assert found == pytest.approx(expected, abs=1e-5)


def test_in_training_a_text_does_not_find_itself() -> None:
    """Else its memory would tell the future that is to be predicted."""
    train = texts([50, 60, 70], seed=4)
    predictor = Reuse(SHAPE)
    predictor.prepare(train)
    tokens_T = np.arange(len(train))
    own_T = train.problem_ids_T
    places_TGP = predictor.memory.places(train, tokens_T, own_T)
    assert (places_TGP >= 0).any()
    is_own = predictor.memory.problem_ids_M[places_TGP] == own_T[:, None, None]
    assert not (is_own & (places_TGP >= 0)).any()
    seen: list[torch.Tensor] = []

    class Spy(torch.nn.Module):
        def forward(self, features: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
            seen.append(features[..., FEATURES:])
            return torch.zeros(*features.shape[:2], 1, features.shape[2])

    for is_training in (True, False):
        predictor.loss(Spy().train(is_training), train, tokens_T)
    expected = np.zeros((len(train), SHAPE.layers, SHAPE.experts, MEMORY_FEATURES), dtype=np.float32)
    predictor.memory.add_features(places_TGP, expected)
    np.testing.assert_array_equal(seen[0].numpy(), expected)
    assert (seen[1].numpy() != expected).any()


def test_the_memory_is_bounded_and_keeps_whole_texts() -> None:
    stored = texts([40, 50, 60, 30], seed=6)
    per_token = stored.expert_ids_TLK[0].nbytes
    for tokens in (0, 29, 100, 180):
        memory = ReuseMemory.of(stored, tokens * per_token)
        kept = np.unique(memory.problem_ids_M, return_counts=True)
        assert len(memory.keys_M) <= tokens
        assert [[40, 50, 60, 30][problem] for problem in kept[0]] == kept[1].tolist()
    assert len(memory.keys_M) == 180
    assert not len(ReuseMemory.of(stored, 0).keys_M)
    # An empty memory finds nothing.
    assert (ReuseMemory.empty(SHAPE).places(stored, np.arange(3), stored.problem_ids_T[:3]) == -1).all()


def test_what_is_stored_is_restored() -> None:
    routes = texts([40, 50], seed=7)
    predictor = Reuse(SHAPE)
    predictor.prepare(texts([60, 70], seed=8))
    again = Reuse.restore(SHAPE, predictor.settings(), predictor.arrays())
    np.testing.assert_array_equal(again.memory.places(routes, np.arange(90)), predictor.memory.places(routes, np.arange(90)))
    # Ids of problems mean nothing in another trace.
    assert not any("problem" in name for name in predictor.arrays())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("keys", lambda array: None),
        ("keys", lambda array: array[:-1]),
        ("keys", lambda array: array.astype(np.int32)),
        ("first", lambda array: array + 1),
        ("first", lambda array: array - 1),
        ("first", lambda array: array[::-1].copy()),
        ("expert_ids", lambda array: array[:, :1]),
        ("expert_ids", lambda array: array + 8),
        ("expert_ids", lambda array: array.astype(np.float32)),
    ],
)
def test_a_changed_memory_is_refused(name: str, change: Any) -> None:
    predictor = Reuse(SHAPE)
    predictor.prepare(texts([20, 30], seed=9))
    arrays = predictor.arrays()
    changed = change(arrays.pop(f"memory.{name}"))
    if changed is not None:
        arrays[f"memory.{name}"] = changed
    with pytest.raises(SpecmoeError, match="memory"):
        Reuse.restore(SHAPE, predictor.settings(), arrays)
