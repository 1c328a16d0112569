"""Training: cut off and resumed it ends where it would have; another trace to stop early on must be another."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.routes import routes_of
from support.traces import MakeProblems, MakeTrace

from profiler.errors import SpecmoeError
from profiler.trace.reader import Trace
from speculation.data.router_inputs import RouterInputs
from speculation.data.routes import load_routes, route_digests
from speculation.data.tasks import Shape, Task
from speculation.evaluation.evaluate import evaluate
from speculation.predictors.options import Progress
from speculation.predictors.registry import find_predictor
from speculation.training.fit import train

EPOCHS = 4
OPTIONS = replace(find_predictor("mlp").defaults, epochs=EPOCHS, batch_tokens=64)


@pytest.fixture
def trace(make_trace: MakeTrace, random_problems: MakeProblems) -> Trace:
    return make_trace(random_problems(count=40, tokens=20, layers=3, num_experts=8, top_k=2), 8)


class KilledError(Exception):
    pass


def cut_off_at(epoch: int) -> Callable[[int, int, dict[str, float]], None]:
    def progress(done: int, total: int, entry: dict[str, float]) -> None:
        if done == epoch:
            raise KilledError

    return progress


def weights(run: Path) -> dict[str, np.ndarray]:
    stored: dict[str, np.ndarray] = load_file(run / "model.safetensors")
    return stored


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_resumed_training_ends_with_the_very_same_weights(accumulate: int, trace: Trace, tmp_path: Path) -> None:
    # A checkpoint at every step: the last one is from the end of an epoch, before its evaluation.
    options = replace(OPTIONS, checkpoint_seconds=0.0, accumulate=accumulate)
    whole = train(trace, "mlp", tmp_path / "whole", options=options)
    with pytest.raises(KilledError):
        train(trace, "mlp", tmp_path / "cut", options=options, on_progress=cut_off_at(2))
    with pytest.raises(SpecmoeError, match="choose another folder, or resume its training"):
        train(trace, "mlp", tmp_path / "cut", options=options)
    with pytest.raises(SpecmoeError, match="from a training with other options or data: resume with those, or remove it"):
        train(trace, "mlp", tmp_path / "cut", options=replace(options, learning_rate=1e-4), resume=True)
    with pytest.raises(SpecmoeError, match="from a training with other options or data"):
        train(trace, "mlp", tmp_path / "cut", horizon=2, options=options, resume=True)
    resumed = train(trace, "mlp", tmp_path / "cut", options=options, resume=True)
    expected, found = weights(whole.path), weights(resumed.path)
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)
    assert not (resumed.path / "checkpoints").exists()
    lines = (resumed.path / "training.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch", "1", "2", "3", "4"]
    before = (resumed.path / "config.json").stat().st_mtime_ns
    again = train(trace, "mlp", tmp_path / "cut", options=options, resume=True)
    assert (again.path / "config.json").stat().st_mtime_ns == before
    assert all((expected[name] == array).all() for name, array in weights(again.path).items())


@pytest.mark.parametrize("source", ["train", "validation"])
@pytest.mark.parametrize("changed", ["expert_ids_TLK", "weights_TLK", "token_ids_T", "token_keys_T", "first_T", "router"])
def test_a_checkpoint_of_other_data_is_not_resumed(source: str, changed: str, tmp_path: Path) -> None:
    sources = {"train": routes_of([(0, 9)]), "validation": routes_of([(0, 7)], seed=1)}
    hidden_TLD, weight_LED = np.zeros((9, 2, 4), dtype=np.float16), np.zeros((2, 8, 4), dtype=np.float32)
    for name, routes in sources.items():
        router = RouterInputs(hidden_TLD[: len(routes)], weight_LED, weight_LED[..., 0], None)
        sources[name] = replace(routes, router=router)
    options = replace(OPTIONS, checkpoint_seconds=0.0, width=4)

    def fit(progress: Progress = lambda *_: None) -> None:
        predictor = find_predictor("mlp")(Shape(layers=2, experts=8, top_k=2, horizon=1))
        predictor.fit(sources["train"], sources["validation"], options, progress, tmp_path)

    with pytest.raises(KilledError):
        fit(cut_off_at(2))
    same, routes = dict(sources), sources[source]
    if changed == "router":
        value: Any = RouterInputs(hidden_TLD[: len(routes)] + np.float16(1), weight_LED, weight_LED[..., 0], None)
    else:
        value = getattr(routes, changed).copy()
        value[-1] = value[-1] ^ 1 if value.dtype.kind in "iu" else value[-1] / 2
    sources[source] = replace(routes, **{changed: value})
    with pytest.raises(SpecmoeError, match="from a training with other options or data"):
        fit()
    sources.update(same)
    fit()


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"predictor": "mlp"}, "predictor"),
        ({"horizon": 2}, "task, horizon or model"),
        ({"task": Task.WHOLE_PATH}, "task, horizon or model"),
        ({"trace": "again"}, "trace"),
        ({"seed": 1}, "training options"),
        ({"max_seconds": 9.0}, None),
        ({"without": slice(0, 2)}, "training problems"),
        ({"validation": "one"}, "training problems"),
        ({}, None),
    ],
)
def test_a_finished_run_of_something_else_is_not_taken_for_this_one(
    changed: dict[str, Any],
    what: str | None,
    trace: Trace,
    make_trace: MakeTrace,
    random_problems: MakeProblems,
    tmp_path: Path,
) -> None:
    def traces(name: str) -> Trace:
        return make_trace(random_problems(count=40, tokens=20, layers=3, num_experts=8, top_k=2, seed=1), 8, name=name)

    def run(changed: dict[str, Any]) -> None:
        options = {name: value for name, value in changed.items() if name in {"seed", "max_seconds"}}
        train(
            traces(changed["trace"]) if "trace" in changed else trace,
            changed.get("predictor", "popularity"),
            tmp_path / "run",
            task=changed.get("task", Task.NEXT_LAYER),
            horizon=changed.get("horizon", 1),
            validation=_another(make_trace, random_problems, 1) if "validation" in changed else None,
            without=route_digests(trace, load_routes(trace, "train"))[changed["without"]] if "without" in changed else None,
            options=replace(OPTIONS, **options),
            resume=True,
        )

    run({})
    if what is None:
        run(changed)
        return
    with pytest.raises(SpecmoeError, match=f"is a finished run, and its {what} differ from the requested"):
        run(changed)


def _another(make_trace: MakeTrace, random_problems: MakeProblems, seed: int, prompts: str = "another") -> Trace:
    """A trace of 9 other prompts."""
    problems = random_problems(count=9, tokens=20, layers=3, num_experts=8, top_k=2, seed=seed)
    return make_trace(problems, 8, name=f"{prompts} {seed}", prompts=[f"{prompts} {number}" for number in range(9)])


def test_a_network_that_was_stopped_by_another_trace_is_not_taken_for_this_one(
    trace: Trace, make_trace: MakeTrace, random_problems: MakeProblems, tmp_path: Path
) -> None:
    options = replace(OPTIONS, epochs=1, width=4)
    first, other_routes = (_another(make_trace, random_problems, seed) for seed in (1, 2))
    run = train(trace, "mlp", tmp_path / "run", validation=first, options=options)
    assert train(trace, "mlp", run.path, validation=first, options=options, resume=True).facts == run.facts
    with pytest.raises(SpecmoeError, match="its validation trace differ"):
        train(trace, "mlp", run.path, validation=other_routes, options=options, resume=True)
    others = _another(make_trace, random_problems, 3, "a third")
    with pytest.raises(SpecmoeError, match="its validation problems differ"):
        train(trace, "mlp", run.path, validation=others, options=options, resume=True)


def test_more_steps_per_update_than_there_are(trace: Trace, tmp_path: Path) -> None:
    steps = EPOCHS * -(-len(load_routes(trace, "train")) // OPTIONS.batch_tokens)
    with pytest.raises(SpecmoeError, match=f"accumulate 1000: the training has only {steps} steps"):
        train(trace, "mlp", tmp_path / "run", options=replace(OPTIONS, accumulate=1000))
    assert not (tmp_path / "run").exists()


def test_a_broken_checkpoint_is_named(trace: Trace, tmp_path: Path) -> None:
    options = replace(OPTIONS, checkpoint_seconds=0.0)
    with pytest.raises(KilledError):
        train(trace, "mlp", tmp_path / "cut", options=options, on_progress=cut_off_at(1))
    next((tmp_path / "cut" / "checkpoints").glob("step-*/average.safetensors")).write_bytes(b"nothing")
    with pytest.raises(SpecmoeError, match=r"checkpoints cannot be resumed: .*; remove it to start again"):
        train(trace, "mlp", tmp_path / "cut", options=options, resume=True)


class Hostile:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.write_text, (self.marker, "unpickled")


def test_nothing_in_a_checkpoint_is_unpickled(trace: Trace, tmp_path: Path) -> None:
    """Every file is replaced by a pickle that would act; more are added under names that Accelerate and PyTorch know."""
    options = replace(OPTIONS, checkpoint_seconds=0.0)
    with pytest.raises(KilledError):
        train(trace, "mlp", tmp_path / "cut", options=options, on_progress=cut_off_at(1))
    checkpoints, marker = tmp_path / "cut" / "checkpoints", tmp_path / "marker"
    (folder,) = checkpoints.glob("step-*")
    files = sorted(path.name for path in folder.iterdir())
    assert {Path(name).suffix for name in files} == {".safetensors"}
    hostile = pickle.dumps(Hostile(marker))
    for known in ("random_states_0.pkl", "optimizer.bin", "scheduler.bin", "scaler.pt", "pytorch_model.bin"):
        (folder / known).write_bytes(hostile)
    for name in files:
        original = (folder / name).read_bytes()
        (folder / name).write_bytes(hostile)
        with pytest.raises(SpecmoeError, match="cannot be resumed"):
            train(trace, "mlp", tmp_path / "cut", options=options, resume=True)
        (folder / name).write_bytes(original)
    assert not marker.exists()
    assert pickle.loads(hostile)
    assert marker.read_text() == "unpickled"


def test_training_writes_one_tensorboard_file(trace: Trace, tmp_path: Path) -> None:
    run = train(trace, "mlp", tmp_path / "run", options=OPTIONS)
    assert len(list((run.path / "tensorboard").iterdir())) == 1


def test_all_of_a_trace_is_trained_on_with_another_to_stop_early_on(
    trace: Trace, make_trace: MakeTrace, random_problems: MakeProblems, tmp_path: Path
) -> None:
    problems = random_problems(count=9, tokens=20, layers=3, num_experts=8, top_k=2, seed=1)
    other = make_trace(problems, 8, name="other", prompts=[f"another {number}" for number in range(9)])
    run = train(trace, "popularity", tmp_path / "run", validation=other)
    assert len(run.trained_on) == 40
    assert evaluate(run, other, part="all").trained_on == 0
    assert evaluate(run, trace, part="test").trained_on == evaluate(run, trace, part="test").problems
    shared = make_trace(problems, 8, name="shared", prompts=[f"prompt {number}" for number in range(4, 13)])
    with pytest.raises(SpecmoeError, match=r"shared has no problem that is not in .*trace, too: choose another"):
        train(trace, "popularity", tmp_path / "leaky", validation=shared)
    assert not (tmp_path / "leaky").exists()


@pytest.mark.parametrize("shards_per_group", [None, 1])
def test_problems_that_both_traces_have_are_left_out_of_the_validation(
    trace: Trace, make_trace: MakeTrace, random_problems: MakeProblems, tmp_path: Path, shards_per_group: int | None
) -> None:
    problems = random_problems(count=9, tokens=20, layers=3, num_experts=8, top_k=2, seed=1)
    prompts = [f"prompt {number}" for number in range(7)] + ["new", "newer"]
    other = make_trace(problems, 8, name="other", prompts=prompts)
    options = replace(OPTIONS, shards_per_group=shards_per_group)
    run = train(trace, "popularity", tmp_path / "run", validation=other, options=options)
    facts = json.loads((run.path / "metrics.json").read_text())
    assert (facts["shared_problems"], facts["validation_problems"]) == (7, 2)
    assert evaluate(run, other, part="all").trained_on == 7


@pytest.mark.parametrize(("task", "works"), [(Task.NEXT_LAYER, False), (Task.NEXT_TOKEN, True), (Task.WHOLE_PATH, True)])
def test_a_single_layer_has_no_next_one(
    make_trace: MakeTrace, random_problems: MakeProblems, tmp_path: Path, task: Task, works: bool
) -> None:
    problems = random_problems(count=9, tokens=20, layers=1, num_experts=8, top_k=2)
    one, other = (make_trace(problems, 8, name=name, prompts=[f"{name} {n}" for n in range(9)]) for name in ("one", "other"))
    if works:
        run = train(one, "popularity", tmp_path / "run", task=task, validation=other)
        assert evaluate(run, other, part="all").tokens == 180
        return
    with pytest.raises(SpecmoeError, match="there is one MoE layer, so none comes next; predict next-token or whole-path"):
        train(one, "popularity", tmp_path / "run", task=task)


def test_by_itself_a_trace_is_split(trace: Trace, tmp_path: Path) -> None:
    run = train(trace, "popularity", tmp_path / "run")
    document = evaluate(run, trace)
    assert document.trained_on == 0
    assert evaluate(run, trace, part="all").trained_on == len(run.trained_on) == evaluate(run, trace, part="train").problems


def test_scores_are_computed_in_float32() -> None:
    """Also after a training in mixed precision, and within a caller's autocast: few of them are equal."""
    predictor = find_predictor("mlp")(Shape(layers=2, experts=32, top_k=2, horizon=1))
    options = replace(OPTIONS, epochs=1, width=8)
    predictor.fit(routes_of([(0, 200)], experts=32), None, options, lambda *_: None)
    routes = routes_of([(0, 50)], experts=32, seed=1)
    found_TLHE = predictor.probabilities(routes, slice(0, 50))
    assert found_TLHE.dtype == np.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(predictor.probabilities(routes, slice(0, 50)), found_TLHE)
    scores_NE = found_TLHE[:, 0, 0]
    assert np.mean([len(np.unique(scores_E)) for scores_E in scores_NE]) > 31.5


@pytest.mark.parametrize(("seen", "expected"), [(1_000, 2), (50_000, 25), (10**9, 30)])
def test_without_a_number_of_epochs_little_data_gets_more(seen: int, expected: int) -> None:
    predictor = find_predictor("mlp")(Shape(layers=2, experts=8, top_k=2, horizon=1))
    epochs: list[tuple[int, int]] = []
    options = replace(OPTIONS, epochs=None, seen_tokens=seen, batch_tokens=2_000, width=8)
    predictor.fit(routes_of([(0, 2_000)]), None, options, lambda epoch, count, _: epochs.append((epoch, count)))
    assert epochs[-1] == (expected, expected)


def test_problems_that_training_was_stopped_by_are_not_called_held_out(trace: Trace, tmp_path: Path) -> None:
    run = train(trace, "mlp", tmp_path / "run", options=OPTIONS)
    found = {part: evaluate(run, trace, part=part, with_baselines=False) for part in ("validation", "test", "train")}
    assert {part: each.early_stopping for part, each in found.items()} == {"validation": True, "test": False, "train": False}
    assert found["validation"].held_out == "not trained on, but the last epoch of training was chosen by these problems"
    assert found["test"].held_out == "held out"
    assert found["train"].held_out.startswith("not held out (the run was trained on ")
    # Counting predictors have no epochs.
    counting = train(trace, "popularity", tmp_path / "counting", options=OPTIONS)
    assert not evaluate(counting, trace, part="validation", with_baselines=False).early_stopping
