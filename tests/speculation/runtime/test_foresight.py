"""Predictions while a model runs: what is prefetched, and what happens to a predictor that is too slow or fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from profiler.errors import SpecmoeError
from speculation.data.history import History, Prediction
from speculation.data.tasks import Shape, Task
from speculation.predictors.counting.popularity import Popularity
from speculation.runtime import CacheSize, OffloadedModel
from speculation.runtime.foresight import (
    Foreseen,
    Foresight,
    ForesightThread,
    PredictorPrefetcher,
    RoutedLayer,
    reuse_scores,
)

LAYERS, EXPERTS = 3, 4
PROMPT = [17, 301, 44, 45, 46, 301, 44, 9, 120]


class Fixed(Popularity):
    """Predicts expert 3 with .9, 2 with .6, 1 with .3, 0 with .1, wherever and whenever it is asked."""

    def predict(self, history: History) -> Prediction:
        self.check(history)
        row = np.array([0.1, 0.3, 0.6, 0.9])
        if self.shape.task == Task.NEXT_LAYER:
            return Prediction.of(np.tile(row, (min(self.shape.horizon, LAYERS - 1 - history.layer), 1)))
        return Prediction.of(np.tile(row, (LAYERS, 1, 1)))


def shape(task: Task, horizon: int = 1) -> Shape:
    return Shape(layers=LAYERS, experts=EXPERTS, top_k=2, horizon=horizon, task=task)


def foreseen_in_two_tokens(task: Task, horizon: int, experts: int, threshold: float) -> list[tuple[int, list[Foreseen]]]:
    """What is foreseen after which request, while two tokens of one sequence are decoded."""
    found: list[tuple[int, list[Foreseen]]] = []
    prefetcher = PredictorPrefetcher(Fixed(shape(task, horizon)), experts, threshold)
    follow = Foresight(
        shape(Task.WHOLE_PATH),
        prefetcher,
        None,
        on_foreseen=lambda all_, request: found.append((request, list(all_))),
        on_scores=lambda _scores: None,
    )
    follow.start(1)
    request = -1
    for token in (7, 8):
        follow.begin_decode(request, [0], [token])
        for layer in range(LAYERS):
            request += 1
            routed = RoutedLayer(layer, np.array([[0, 1]]), np.array([[0.6, 0.4]], dtype=np.float32), torch.zeros(1, 2))
            follow.after_layer(request, [0], routed)
    return [(after, foreseen) for after, foreseen in found if foreseen]


def test_when_each_task_prefetches_what() -> None:
    next_layer = foreseen_in_two_tokens(Task.NEXT_LAYER, 2, 1, 0.0)
    assert [(after, [(each.layer, each.layers_ahead) for each in all_]) for after, all_ in next_layer] == [
        (0, [(1, 1), (2, 2)]),
        (1, [(2, 1)]),
        (3, [(1, 1), (2, 2)]),
        (4, [(2, 1)]),
    ]
    assert {each.expert for _, all_ in next_layer for each in all_} == {3}
    whole_path = foreseen_in_two_tokens(Task.WHOLE_PATH, 1, 2, 0.0)
    assert [after for after, _ in whole_path] == [-1, 2]
    assert [(each.layer, each.layers_ahead, each.expert) for each in whole_path[0][1]] == [
        (0, 1, 3),
        (0, 1, 2),
        (1, 2, 3),
        (1, 2, 2),
        (2, 3, 3),
        (2, 3, 2),
    ]
    next_token = foreseen_in_two_tokens(Task.NEXT_TOKEN, 1, 1, 0.0)
    assert [(after, [(each.layer, each.layers_ahead) for each in all_]) for after, all_ in next_token] == [
        (2, [(0, 1), (1, 2), (2, 3)]),
        (5, [(0, 1), (1, 2), (2, 3)]),
    ]


def test_only_what_is_likely_enough_is_prefetched() -> None:
    found = foreseen_in_two_tokens(Task.WHOLE_PATH, 1, 4, 0.5)
    assert [each.expert for each in found[0][1] if each.layer == 0] == [3, 2]
    assert [round(each.score, 3) for each in found[0][1] if each.layer == 0] == [0.9, 0.6]


def test_scores_of_several_sequences_are_combined_as_if_independent() -> None:
    predictor = Fixed(shape(Task.WHOLE_PATH))
    histories = []
    for _ in range(2):
        histories.append(History(shape(Task.WHOLE_PATH)))
        histories[-1].begin(1)
    assert reuse_scores(predictor, histories[:1]).reshape(LAYERS, EXPERTS)[1].round(4).tolist() == pytest.approx(
        [0.1, 0.3, 0.6, 0.9]
    )
    assert reuse_scores(predictor, histories).reshape(LAYERS, EXPERTS)[2].tolist() == pytest.approx([0.19, 0.51, 0.84, 0.99])


def test_a_predictor_of_reuse_is_not_a_prefetcher() -> None:
    class Reuse(Fixed):
        tasks = frozenset({Task.REUSE})

    with pytest.raises(SpecmoeError, match="use it as the policy"):
        PredictorPrefetcher(Reuse(shape(Task.REUSE)), 2)


def test_a_slow_predictor_gets_a_thread_of_its_own(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load: Callable[..., OffloadedModel] = OffloadedModel.load
    with load(str(mixtral), CacheSize(fraction=0.5), predictor="next-gate", dtype="float32", device="cpu") as offloaded:
        (quick,) = offloaded.generate([PROMPT], max_new_tokens=24, ignore_eos=True)
    monkeypatch.setattr("speculation.runtime.experts.MAX_FORESIGHT", 0.0)
    with load(str(mixtral), CacheSize(fraction=0.5), predictor="next-gate", dtype="float32", device="cpu") as offloaded:
        (slow,) = offloaded.generate([PROMPT], max_new_tokens=24, ignore_eos=True)
        assert offloaded.experts.transfers.counts.prefetched > 0
        (note,) = offloaded.experts.notes
    assert "they are made in a thread of their own" in note
    assert slow == quick


def test_what_fails_in_the_thread_is_raised_by_the_next_call() -> None:
    def fail(_foresight: Foresight) -> None:
        raise SpecmoeError("the run is damaged")

    prefetcher = PredictorPrefetcher(Fixed(shape(Task.WHOLE_PATH)), 1)
    thread = ForesightThread(
        Foresight(shape(Task.WHOLE_PATH), prefetcher, None, on_foreseen=lambda _all, _at: None, on_scores=lambda _scores: None)
    )
    thread.call(fail)
    thread.close()
    with pytest.raises(SpecmoeError, match="the run is damaged"):
        thread.call(lambda foresight: foresight.start(1))
