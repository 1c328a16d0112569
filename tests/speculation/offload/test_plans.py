"""Plans: which experts are prefetched, and when, for every task; and how the predictions of several tokens are merged."""

from __future__ import annotations

import numpy as np
import pytest
from support.routes import routes_of

from profiler.errors import SpecmoeError
from speculation.data.tasks import Shape, Task
from speculation.offload.plans import PrefetchPlan, RankedExperts, oracle_plan, plan_of, popularity_plan, ranked
from speculation.offload.requests import Requests, requests_of
from speculation.predictors.counting.conditional_counts import ConditionalCounts
from speculation.predictors.options import TrainingOptions


def entries(plan: PrefetchPlan, requests: Requests) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """(step, layer after which it is known) -> (layer, expert) pairs."""
    found = {}
    points = requests.layers + 1
    for number in range(requests.steps * points):
        span = slice(plan.starts_Q[number], plan.starts_Q[number + 1])
        pairs = list(zip(plan.layers_N[span].tolist(), plan.experts_N[span].tolist(), strict=True))
        if pairs:
            found[number // points, number % points - 1] = pairs
    return found


def shape_of(task: Task, horizon: int = 1) -> Shape:
    return Shape(layers=2, experts=8, top_k=2, horizon=horizon, task=task)


def test_the_oracle_prefetches_across_the_ends_of_steps() -> None:
    routes = routes_of([(0, 2)])
    requests = requests_of(routes, 8)
    ids = routes.expert_ids_TLK.tolist()
    assert entries(oracle_plan(requests, 1), requests) == {
        (0, 0): [(1, expert) for expert in ids[0][1]],
        (0, 1): [(2, expert) for expert in ids[1][0]],
        (1, 0): [(1, expert) for expert in ids[1][1]],
    }
    assert entries(oracle_plan(requests, 2), requests) == {
        (0, 0): [(2, expert) for expert in ids[1][0]],
        (0, 1): [(3, expert) for expert in ids[1][1]],
    }
    with pytest.raises(SpecmoeError, match="horizon 3: expected 1 to 2 layers ahead"):
        oracle_plan(requests, 3)


def test_popularity_prefetches_the_same_at_every_step() -> None:
    requests = requests_of(routes_of([(0, 2)]), 8)
    plan = popularity_plan(np.array([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]]), 2, 1, requests)
    assert entries(plan, requests) == {(0, 0): [(1, 0), (1, 1)], (0, 1): [(2, 1), (2, 2)], (1, 0): [(1, 0), (1, 1)]}


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (Task.NEXT_LAYER, {(0, 0): [(1, 5), (1, 6)], (1, 0): [(1, 1)]}),
        (Task.WHOLE_PATH, {(0, -1): [(0, 5), (0, 6), (1, 7)], (1, -1): [(0, 1), (1, 2), (1, 3)]}),
        (Task.NEXT_TOKEN, {(0, 1): [(2, 5), (2, 6), (3, 7)], (1, 1): [(2, 1), (3, 2), (3, 3)]}),
    ],
)
def test_each_task_prefetches_as_soon_as_it_can_predict(
    task: Task, expected: dict[tuple[int, int], list[tuple[int, int]]]
) -> None:
    requests = requests_of(routes_of([(0, 2)]), 8)
    ids = np.array([[[[5, 6]], [[7, -1]]], [[[1, -1]], [[2, 3]]]], dtype=np.int32)
    best = RankedExperts(ids, np.where(ids >= 0, np.float32(0.5), np.float32(0)))
    found = entries(plan_of(best, shape_of(task), requests), requests)
    assert found == expected


def test_nearer_layers_come_first() -> None:
    shape = Shape(layers=3, experts=8, top_k=1, horizon=2)
    requests = requests_of(routes_of([(0, 1)], layers=3, top_k=1), 8)
    ids = np.arange(6, dtype=np.int32).reshape(1, 3, 2, 1)
    found = entries(plan_of(RankedExperts(ids, np.ones(ids.shape, np.float32)), shape, requests), requests)
    assert found == {(0, 0): [(1, 0), (2, 1)], (0, 1): [(2, 2)]}


def test_together_the_best_of_all_come_first() -> None:
    requests = requests_of(routes_of([(0, 1), (0, 1)]), 8, batch=2)
    ids = np.array([[[[1, 2]], [[0, 0]]], [[[3, 2]], [[0, 0]]]], dtype=np.int32)
    scores = np.array([[[[0.6, 0.5]], [[0, 0]]], [[[0.7, 0.4]], [[0, 0]]]], dtype=np.float32)
    found = entries(plan_of(RankedExperts(ids, scores), shape_of(Task.NEXT_LAYER), requests), requests)
    assert found == {(0, 0): [(1, 2), (1, 3), (1, 1)]}


def test_ranked_are_the_likeliest_above_the_threshold() -> None:
    routes = routes_of([(0, 30), (0, 30)])
    predictor = ConditionalCounts(shape_of(Task.NEXT_LAYER))
    predictor.fit(routes, None, TrainingOptions(), lambda *_: None)
    expected_TE = predictor.probabilities(routes, slice(0, 60))[:, 0, 0]
    best = ranked(predictor, routes, 3, threshold=0.3)
    for token in range(60):
        order = sorted(range(8), key=lambda expert: -expected_TE[token, expert])[:3]
        kept = [expert if expected_TE[token, expert] >= 0.3 else -1 for expert in order]
        assert best.ids_TLHM[token, 0, 0].tolist() == kept
    assert ranked(predictor, routes, 99).ids_TLHM.shape == (60, 2, 1, 8)
