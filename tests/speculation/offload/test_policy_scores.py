"""Learned policies: perfect scores are Belady's policy, scores of a step of several sequences, the predictor's own time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from support.costs import COSTS
from support.routes import routes_of

from profiler.errors import SpecmoeError
from speculation.data.next_use import discounted_use
from speculation.data.routes import Routes
from speculation.data.tasks import Shape, Task
from speculation.offload.plans import no_plan, oracle_plan
from speculation.offload.policy_scores import Evictor, learned_evictors, policy_seconds, scores_by_step
from speculation.offload.requests import Drafting, Requests, requests_of
from speculation.offload.simulation.records import Count
from speculation.offload.simulation.simulate import Setting, Workload, simulate
from speculation.offload.state import Rule
from speculation.offload.studies.sweep import PlannedPrefetcher, prefetchers_for
from speculation.predictors.counting.popularity import Popularity
from speculation.predictors.neural.reuse import Reuse

ROUTES = routes_of([(0, 120), (0, 90)], layers=3)
WORKLOAD = Workload(requests_of(ROUTES, 8), np.tile(np.arange(8, 0, -1.0), (3, 1)))
SHAPE = Shape(layers=3, experts=8, top_k=2, horizon=1, task=Task.REUSE)


class Perfect(Reuse):
    """Knows when each expert is used again."""

    def probabilities(self, routes: Routes, tokens: slice) -> npt.NDArray[np.float32]:
        tokens_T = np.arange(*tokens.indices(len(routes)))
        return discounted_use(routes.expert_ids_TLK, routes.followers_T, tokens_T, 8, 8.0)[:, :, None]


def test_perfect_scores_are_belady_s_policy() -> None:
    # Of one problem, because no score looks beyond the end of one.
    routes = routes_of([(0, 150)], layers=3)
    workload = Workload(requests_of(routes, 8), WORKLOAD.popularity_LE)
    learned, control = learned_evictors(Perfect(SHAPE), "perfect", routes, workload.requests)
    assert (learned.name, control.name) == ("perfect", "perfect, shuffled control")
    for capacity in (3, 4, 6):
        found = simulate(workload, Setting(Rule.LEARNED, capacity), scores_SX=learned.scores_SX)
        best = simulate(workload, Setting(Rule.BELADY, capacity))
        assert found.total(Count.HIT) == best.total(Count.HIT)
        shuffled = simulate(workload, Setting(Rule.LEARNED, capacity), scores_SX=control.scores_SX)
        assert shuffled.total(Count.HIT) < best.total(Count.HIT)


def test_scores_of_a_step_of_several_sequences() -> None:
    requests = requests_of(ROUTES, 8, batch=2)
    scores_TX = np.random.default_rng(0).random((210, 24), dtype=np.float32)
    scores_SX = scores_by_step(scores_TX, requests)
    # The first 90 steps decode both.
    assert scores_SX[3] == pytest.approx(1 - (1 - scores_TX[3]) * (1 - scores_TX[123]), abs=1e-6)
    assert (scores_SX[100] == scores_TX[100]).all()
    # A prompt's chunk has the scores at its first token, and draft tokens those at the token before them: what is known then.
    prompt = replace(ROUTES, is_decode_T=np.arange(210) >= 20)
    assert (scores_by_step(scores_TX, requests_of(prompt, 8))[0] == scores_TX[0]).all()
    drafted = requests_of(ROUTES, 8, drafting=Drafting(tokens=2, acceptance=1.0))
    first_S = drafted.tokens_N[drafted.first_S[:-1]]
    assert drafted.tokens_S.max() == 3
    assert (scores_by_step(scores_TX, drafted) == scores_TX[first_S]).all()


def played(scores: Any = None, **settings: Any) -> float:
    rule = Rule.LRU if scores is None else Rule.LEARNED
    result = simulate(WORKLOAD, Setting(rule, 4, **settings), None, COSTS, scores)
    return result.decode_stall


def test_a_policy_pays_for_its_own_time() -> None:
    plain = played()
    assert played(policy_seconds=0.5) > plain
    # Scores that are ready before the first router has chosen cost nothing; slower ones come late and choose worse.
    (learned, _) = learned_evictors(Perfect(SHAPE), "perfect", ROUTES, WORKLOAD.requests)
    assert played(learned.scores_SX, score_seconds=0.5) == played(learned.scores_SX)
    assert played(learned.scores_SX, score_seconds=5.0) > played(learned.scores_SX)


def test_scores_that_come_late_by_hand() -> None:
    # One layer, one expert of four a step, a cache of two: at first 0 and 1, 0 as if used last.
    requests = Requests.decoded(np.array([2, 3, 0, 1], dtype=np.int32), np.arange(5), layers=1, num_experts=4, top_k=1)
    workload = Workload(requests, np.arange(4, 0, -1.0)[None])
    # Keep 1 above all, then 0.
    scores = np.tile(np.array([[0.5, 0.9, 0.1, 0.2]], dtype=np.float32), (4, 1))
    at_once = simulate(workload, Setting(Rule.LEARNED, 2), None, COSTS, scores)
    # 2 evicts 0, 3 evicts 2, 0 evicts 3, 1 is a hit.
    assert at_once.hits_S.tolist() == [0, 0, 0, 1]
    # In the first step all are worth nothing: 2 evicts 1, which was used longest ago. Then 3 evicts 2, and 0 is a hit.
    late = simulate(workload, Setting(Rule.LEARNED, 2, score_seconds=3.0), None, COSTS, scores)
    assert late.hits_S.tolist() == [0, 0, 1, 0]


def test_time_of_a_choice_by_hand() -> None:
    # One layer, one expert, a cache of one, which holds expert 0.
    routes = routes_of([(0, 1)], layers=1)
    routes = replace(routes, expert_ids_TLK=np.array([[[1]]], dtype=np.uint8), weights_TLK=np.ones((1, 1, 1), np.float16))
    workload = Workload(requests_of(routes, 2), np.array([[2.0, 1.0]]))
    choosing = simulate(workload, Setting(Rule.LRU, 1, policy_seconds=3.0), None, COSTS)
    assert choosing.decode_stall == 3.0 + 10.0


def test_a_policy_s_time_is_measured() -> None:
    seconds = policy_seconds(WORKLOAD, Evictor.of(Rule.LRU), 4, is_global=False)
    assert 0 < seconds < 1e-3


def test_a_control_is_played_with_one_prefetcher() -> None:
    none, other = (
        PlannedPrefetcher("none", no_plan(WORKLOAD.requests)),
        PlannedPrefetcher("oracle", oracle_plan(WORKLOAD.requests, 1)),
    )
    assert prefetchers_for(Evictor.of(Rule.LRU), [none, other]) == [none, other]
    control = Evictor("run, shuffled control", Rule.LEARNED, is_control=True)
    assert prefetchers_for(control, [other, none]) == [none]
    assert prefetchers_for(control, [other]) == [other]


def test_a_run_of_another_task_is_not_a_policy() -> None:
    predictor = Popularity(Shape(layers=3, experts=8, top_k=2, horizon=1, task=Task.WHOLE_PATH))
    with pytest.raises(SpecmoeError, match="was trained for whole-path: a policy needs a run of 'specmoe train --task reuse'"):
        list(learned_evictors(predictor, "counts", ROUTES, WORKLOAD.requests))
