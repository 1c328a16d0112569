"""Training by groups of shards: the same counts, every token once in an epoch, one group in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.traces import MakeProblems, MakeTrace

from profiler.errors import SpecmoeError
from profiler.trace.reader import Trace
from speculation.data.groups import RouteGroups
from speculation.data.routes import Routes, each_group, load_routes
from speculation.data.tasks import Shape, Task
from speculation.evaluation.evaluate import evaluate
from speculation.predictors.options import TrainingOptions
from speculation.predictors.registry import find_predictor
from speculation.training.fit import train

OPTIONS = replace(find_predictor("mlp").defaults, epochs=4, batch_tokens=64, shards_per_group=1)
ARRAYS = ("expert_ids_TLK", "weights_TLK", "problem_ids_T", "token_ids_T", "token_keys_T", "is_decode_T", "first_T")


def no_progress(done: int, total: int, entry: dict[str, float]) -> None:
    pass


@pytest.fixture
def trace(make_trace: MakeTrace, random_problems: MakeProblems, monkeypatch: pytest.MonkeyPatch) -> Trace:
    """40 problems of 20 tokens in 8 shards of one row group each, that end in the middle of problems."""
    monkeypatch.setattr("profiler.trace.writer.ROWS_PER_GROUP", 330)
    monkeypatch.setattr("profiler.trace.writer.ROWS_PER_FILE", 330)
    vocabulary = list(np.random.default_rng(0).integers(0, 30, (40, 21)))
    trace = make_trace(random_problems(count=40, tokens=20, layers=3, num_experts=8, top_k=2), 8, vocab_ids=vocabulary)
    assert len(trace.routing_files) == 8
    return trace


@pytest.mark.parametrize("shards", [1, 3, 8, 100])
@pytest.mark.parametrize("part", ["train", "all"])
def test_groups_together_are_the_part(part: str, shards: int, trace: Trace) -> None:
    groups, whole = RouteGroups(trace, part, shards), load_routes(trace, part)
    loaded = list(each_group(groups))
    assert groups.group_tokens == [len(routes) for routes in loaded]
    # Of 8 shards; a group may have no problem of the part.
    assert 0 <= -(-8 // shards) - len(loaded) <= 1
    assert len(loaded) == 1 or shards < 8
    assert len(groups) == len(whole)
    assert (groups.problem_ids == whole.problem_ids).all()
    assert sum(len(routes.problem_ids) for routes in loaded) == len(whole.problem_ids)
    for name in ARRAYS:
        offsets = np.cumsum([0, *groups.group_tokens[:-1]]) if name == "first_T" else [0] * len(loaded)
        joined = np.concatenate([getattr(routes, name) + offset for routes, offset in zip(loaded, offsets, strict=True)])
        assert (joined == getattr(whole, name)).all(), name


@pytest.mark.parametrize("task", [task for task in Task if task.predicts_experts])
@pytest.mark.parametrize("name", ["popularity", "previous-token", "conditional-counts", "token-identity"])
def test_counts_are_those_of_the_whole(name: str, task: Task, trace: Trace) -> None:
    shape = Shape.of(trace.metadata.model, 1 if task in {Task.WHOLE_PATH, Task.REUSE} else 2, task)
    fitted = []
    for source in (load_routes(trace, "train"), RouteGroups(trace, "train", 2)):
        predictor = find_predictor(name)(shape)
        predictor.fit(source, None, TrainingOptions(), no_progress)
        fitted.append(predictor.arrays())
    assert all((fitted[0][key] == array).all() for key, array in fitted[1].items())


def test_an_epoch_takes_every_token_once_and_holds_one_group(
    trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    sources: set[int] = set()
    mlp = find_predictor("mlp")
    loss: Any = mlp.loss  # type: ignore[attr-defined] # of networks only

    def counted(self: Any, network: Any, routes: Routes, tokens_T: Any) -> Any:
        if network.training:
            seen.extend(zip(routes.problem_ids_T[tokens_T], routes.token_ids_T[tokens_T], strict=True))
            sources.add(len(routes))
        return loss(self, network, routes, tokens_T)

    monkeypatch.setattr(mlp, "loss", counted)
    run = train(trace, "mlp", tmp_path / "run", options=replace(OPTIONS, epochs=1))
    whole = load_routes(trace, "train")
    assert sorted(seen) == list(zip(whole.problem_ids_T, whole.token_ids_T, strict=True))
    assert seen != sorted(seen)
    assert max(sources) < len(whole) / 4
    assert len(run.trained_on) == len(whole.problem_ids)


def test_a_training_by_groups_resumes_to_the_very_same_weights(trace: Trace, tmp_path: Path) -> None:
    options = replace(OPTIONS, checkpoint_seconds=0.0, batch_tokens=16)
    steps = 0

    def cut_off(done: int, total: int, entry: dict[str, float]) -> None:
        raise KeyboardInterrupt

    whole = train(trace, "mlp", tmp_path / "whole", options=options)
    mlp = find_predictor("mlp")
    loss: Any = mlp.loss  # type: ignore[attr-defined] # of networks only

    def fails(self: Any, network: Any, *rest: Any) -> Any:
        nonlocal steps
        steps += network.training
        # In the middle of a group in the middle of the second epoch.
        if steps == 55:
            raise KeyboardInterrupt
        return loss(self, network, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlp, "loss", fails)
        with pytest.raises(KeyboardInterrupt):
            train(trace, "mlp", tmp_path / "cut", options=options)
    with pytest.raises(SpecmoeError, match="from a training with other options or data"):
        train(trace, "mlp", tmp_path / "cut", options=replace(options, shards_per_group=2), resume=True)
    resumed = train(trace, "mlp", tmp_path / "cut", options=options, resume=True)
    expected, found = whole.predictor.arrays(), resumed.predictor.arrays()
    assert all((expected[name] == array).all() for name, array in found.items())


def test_one_group_is_trained_as_the_whole(trace: Trace, tmp_path: Path) -> None:
    runs = [
        train(trace, "mlp", tmp_path / str(shards), options=replace(OPTIONS, shards_per_group=shards)) for shards in (None, 8)
    ]
    expected, found = (run.predictor.arrays() for run in runs)
    assert all((expected[name] == array).all() for name, array in found.items())


def test_what_needs_all_routes_says_so(trace: Trace, tmp_path: Path) -> None:
    for name in ("backoff-counts", "product-of-experts", "boosted-trees"):
        with pytest.raises(SpecmoeError, match=f"{name} is fitted to all routes at once: leave out shards_per_group"):
            train(trace, name, tmp_path / name, options=TrainingOptions(shards_per_group=1))
        assert not (tmp_path / name).exists()


def test_the_evaluation_of_a_run_by_groups_is_held_out(trace: Trace, tmp_path: Path) -> None:
    run = train(trace, "conditional-counts", tmp_path / "run", options=TrainingOptions(shards_per_group=3))
    assert evaluate(run, trace).trained_on == 0
    assert evaluate(run, trace, part="train").trained_on == len(run.trained_on)
