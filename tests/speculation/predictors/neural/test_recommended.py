"""The inputs of `recommended`, by hand; and that it uses them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from profiler.trace.schema import RoutingChunk
from speculation.data.routes import Routes, make_routes
from speculation.data.tasks import Shape, Task
from speculation.evaluation.evaluate import evaluate_predictor, shuffled
from speculation.predictors.features import recent_use
from speculation.predictors.neural.places.text_memory import TextMemory
from speculation.predictors.neural.recommended import Recommended
from speculation.predictors.neural.recommended_small import MAX_BYTES, RecommendedSmall


def routes_of(ids_TLK: np.ndarray, keys: np.ndarray, problem_T: np.ndarray | None = None) -> Routes:
    count = len(ids_TLK)
    problem_T = np.zeros(count, np.int32) if problem_T is None else problem_T
    position_T = np.arange(count) - np.searchsorted(problem_T, problem_T)
    weights = np.broadcast_to(np.array([0.75, 0.25], np.float16), ids_TLK.shape)
    chunk = RoutingChunk(problem_T.astype(np.int32), position_T.astype(np.int32), ids_TLK.astype(np.uint8), weights.copy())
    return replace(make_routes(chunk), token_keys_T=keys.astype(np.int64))


def test_recent_use_by_hand() -> None:
    ids = np.array([[[0, 1]], [[2, 3]], [[0, 2]], [[1, 0]], [[3, 2]], [[3, 0]]])
    routes = routes_of(ids, np.arange(6), np.array([0, 0, 0, 0, 0, 1]))
    tokens = np.array([0, 2, 4, 5])
    found = recent_use(routes, tokens, routes.previous_T[tokens], 4, Recommended.windows)
    assert found.shape == (4, len(Recommended.windows), 1, 4)
    assert (found[[0, 3]] == 0).all()
    # Two tokens are known at place 2, in every window; at 4 four are, just what the shortest window holds.
    assert found[1, :, 0] == pytest.approx(np.tile(np.array([0.75, 0.25, 0.75, 0.25]) / 2, (3, 1)), abs=1e-4)
    assert found[2, :, 0] == pytest.approx(np.tile(np.array([1.75, 1.0, 1.0, 0.25]) / 4, (3, 1)), abs=1e-4)


def test_windows_end_where_they_should() -> None:
    random = np.random.default_rng(0)
    ids = random.random((200, 2, 5)).argsort(-1)[:, :, :2]
    routes = routes_of(ids, np.arange(200))
    tokens = np.array([3, 17, 150, 199])
    found = recent_use(routes, tokens, tokens, 5, Recommended.windows)
    weight = np.zeros((200, 2, 5))
    np.put_along_axis(weight, ids, np.array([0.75, 0.25]), axis=2)
    for row, token in enumerate(tokens):
        for window, size in enumerate(Recommended.windows):
            assert found[row, window] == pytest.approx(weight[max(0, token + 1 - size) : token + 1].mean(0), abs=1e-4)


@pytest.mark.parametrize("task", [task for task in Task if task.predicts_experts])
def test_inputs_by_hand(task: Task) -> None:
    """Tokens a b c a b: the last two repeat the first two."""
    ids = np.arange(5)[:, None, None] + np.array([[[0, 1], [2, 3]]])
    routes = routes_of(ids, np.array([7, 8, 9, 7, 8]))
    horizon = 3 if task == Task.NEXT_TOKEN else 1
    predictor = Recommended(Shape(layers=2, experts=8, top_k=2, horizon=horizon, task=task), np.array([7, 8]))
    found = predictor.inputs(routes, np.array([0, 4]))
    assert found["rows"].tolist() == [[1, 0, 0], [2, 1, 0]]
    # b came before at place 1, where a comes before it too. For next-token, what follows it is c, a, b.
    assert found["place_exists"][:, :, 0].sum(1).tolist() == [0, 1]
    places = [2, 3, 4] if task == Task.NEXT_TOKEN else [1]
    assert (found["place_ids"][1, 0] == ids[places]).all()
    assert found["place_facts"][1, 0] == pytest.approx([1 / 3, 0, 0, 1, 1 / (1 + np.log2(3))], abs=1e-6)
    assert (found["place_last"] == 0).all()
    last = 4 if task == Task.NEXT_TOKEN else 3
    assert (found["last_ids"][1] == ids[last]).all()
    assert found["last_weights"][0].sum() == (2 if task == Task.NEXT_TOKEN else 0)
    assert ("now_ids" in found) == (task == Task.NEXT_LAYER)


def test_it_learns_what_repeats_and_falls_to_chance_on_shuffled_experts() -> None:
    """Every problem repeats 12 random tokens four times: routes can be predicted only from the earlier occurrences."""
    random = np.random.default_rng(0)

    def repeating(problems: int) -> Routes:
        ids, keys, owner = [], [], []
        for problem in range(problems):
            once = random.random((12, 3, 8)).argsort(-1)[:, :, :2]
            ids.append(np.tile(once, (4, 1, 1)))
            keys.append(np.tile(random.permutation(500)[:12], 4))
            owner.append(np.full(48, problem))
        return routes_of(np.concatenate(ids), np.concatenate(keys), np.concatenate(owner))

    predictor = Recommended(Shape(layers=3, experts=8, top_k=2, horizon=1, task=Task.WHOLE_PATH))
    options = replace(Recommended.defaults, epochs=6, batch_tokens=128)
    predictor.fit(repeating(100), repeating(15), options, lambda *_: None)
    test = repeating(20)
    recall = evaluate_predictor(predictor, test, {}).metrics["h=1"]["recall@2"]
    # Three quarters are repetitions; the rest is chance, a quarter.
    assert recall == pytest.approx(0.75 + 0.25 * 0.25, abs=0.04)
    control = evaluate_predictor(predictor, shuffled(test, seed=0), {}, test).metrics["h=1"]["recall@2"]
    assert control == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("sizes", [(24, 32, 4), (26, 64, 6), (48, 64, 8), (8, 8, 2)])
def test_the_small_one_takes_at_most_a_megabyte_for_up_to_64_experts(sizes: tuple[int, int, int]) -> None:
    layers, experts, top_k = sizes
    shape = Shape(layers=layers, experts=experts, top_k=top_k, horizon=1)
    predictor = RecommendedSmall(shape, np.arange(RecommendedSmall.max_vocabulary))
    count = RecommendedSmall.typical_tokens(shape)
    predictor.memory = TextMemory(
        np.arange(count), np.arange(count), np.zeros((count, layers, top_k), np.uint8), np.zeros(count, np.int32)
    )
    assert 100_000 < sum(array.nbytes for array in predictor.arrays().values()) <= MAX_BYTES


def test_a_predictor_finds_the_same_in_the_texts_that_it_keeps_after_it_was_stored() -> None:
    routes = routes_of(np.arange(40)[:, None, None] % 5 + np.array([[[0, 1], [2, 3]]]), np.arange(40) % 7)
    shape = Shape(layers=2, experts=8, top_k=2, horizon=1)
    predictor = Recommended(shape, np.arange(7))
    predictor.memory = TextMemory.of(routes, 1 << 20)
    restored = Recommended.restore(shape, predictor.settings(), predictor.arrays())
    other = routes_of(np.arange(9)[:, None, None] % 3 + np.array([[[0, 1], [2, 3]]]), np.arange(9) % 7)
    one, two = (each.inputs(other, np.arange(9)) for each in (predictor, restored))
    assert one["place_exists"].any()
    for name, array in one.items():
        assert (array == two[name]).all(), name


@pytest.mark.parametrize("cls", [Recommended, RecommendedSmall])
def test_in_training_a_problem_finds_nothing_of_its_own(cls: type[Recommended], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each problem has routes of its own, by which what is found betrays where it comes from."""
    ids = np.repeat(np.arange(8), 6)[:, None, None] + np.array([[[0, 10], [20, 30]]])
    routes = routes_of(ids, np.tile(np.arange(6), 8), np.repeat(np.arange(8), 6))
    predictor = cls(Shape(layers=2, experts=40, top_k=2, horizon=1, task=Task.WHOLE_PATH), np.arange(6))
    predictor.prepare(routes)
    found: list[dict[str, np.ndarray]] = []
    plain = cls._inputs

    def spy(self: Recommended, *args: Any) -> dict[str, np.ndarray]:
        found.append(plain(self, *args))
        return found[-1]

    monkeypatch.setattr(cls, "_inputs", spy)
    for is_training in (True, False):
        predictor.loss(predictor.network.train(is_training), routes, np.arange(len(routes)))
    training, evaluation = found
    own = {}
    for name, inputs in (("training", training), ("evaluation", evaluation)):
        first_expert_TP = inputs["place_ids"][:, :, 0, 0, 0]
        exists_TP = inputs["place_exists"][:, :, 0]
        assert exists_TP.any(1).all()
        own[name] = ((first_expert_TP == routes.problem_ids_T[:, None]) & exists_TP).any()
    assert own == {"training": False, "evaluation": True}
