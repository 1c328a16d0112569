"""Predictors over router inputs, on a trace whose experts follow from them as in a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.traces import MakeProblems, MakeTrace

from profiler.errors import SpecmoeError, TraceError
from profiler.trace.reader import Trace
from profiler.trace.schema import values_schema
from profiler.trace.writer import BlockWriter, write_manifest
from speculation.data.groups import RouteGroups
from speculation.data.history import History
from speculation.data.routes import each_group, load_routes, router_input_scale
from speculation.data.tasks import Shape, Task
from speculation.evaluation.evaluate import evaluate
from speculation.predictors.neural.next_gate import NextGate
from speculation.predictors.options import TrainingOptions
from speculation.predictors.registry import predictor_classes
from speculation.training.fit import train
from speculation.training.runs import load_run

NAMES = [name for name, cls in predictor_classes().items() if cls.needs_router_inputs or cls.can_take_router_inputs]
PROBLEMS, TOKENS, LAYERS, EXPERTS, WIDTH = 40, 30, 4, 8, 16
OPTIONS = TrainingOptions(epochs=12, batch_tokens=64, dropout=0.0, learning_rate=2e-2, average=50)


def options_of(name: str, **others: Any) -> TrainingOptions:
    """Options for a predictor that takes router inputs; predictors for which they are optional are set to use them."""
    cls = predictor_classes()[name]
    options = OPTIONS if cls.needs_router_inputs else replace(OPTIONS, router_inputs=True, width=32)
    return replace(options, **others)


def make_routed(make_trace: MakeTrace, drift: float, *, layers: list[int] | None = None, recorded: int = PROBLEMS) -> Trace:
    """A residual stream that drifts from layer to layer, and the top two of each layer's own router."""
    random = np.random.default_rng(0)
    gate_LED = random.normal(size=(LAYERS, EXPERTS, WIDTH)).astype(np.float16)
    steps = random.normal(size=(PROBLEMS * TOKENS, LAYERS, WIDTH)) * np.array([1, *[drift] * (LAYERS - 1)])[:, None]
    hidden_TLD = steps.cumsum(1).astype(np.float16)
    logits_TLE = np.einsum("tld,led->tle", hidden_TLD.astype(np.float32), gate_LED.astype(np.float32))
    ids_TLK = np.argsort(-logits_TLE, -1)[:, :, :2]
    chosen = np.take_along_axis(logits_TLE, ids_TLK, -1)
    share = np.exp(chosen - chosen.max(-1, keepdims=True))
    weights = share / share.sum(-1, keepdims=True)
    problems = [(ids_TLK[at : at + TOKENS], weights[at : at + TOKENS]) for at in range(0, PROBLEMS * TOKENS, TOKENS)]
    trace = make_trace(problems, EXPERTS)
    places = list(range(LAYERS)) if layers is None else layers
    moe_layers = [trace.metadata.model.moe_layers[place] for place in places]
    writer = BlockWriter(trace.path / "hidden", moe_layers, values_schema("hidden", WIDTH))
    ids_T, positions_T = np.repeat(np.arange(PROBLEMS), TOKENS), np.tile(np.arange(TOKENS), PROBLEMS)
    count = recorded * TOKENS
    writer.write(ids_T[:count].astype(np.int32), positions_T[:count].astype(np.int32), {"hidden": hidden_TLD[:count, places]})
    writer.close()
    save_file(
        {f"layers.{layer}.weight": gate_LED[place] for place, layer in enumerate(trace.metadata.model.moe_layers)},
        trace.path / "gates.safetensors",
    )
    write_manifest(trace.path)
    return Trace.open(trace.path)


def test_a_stream_that_does_not_drift_is_predicted_without_training(make_trace: MakeTrace, tmp_path: Path) -> None:
    trace = make_routed(make_trace, drift=0.0)
    document = evaluate(train(trace, "next-gate", tmp_path / "run", horizon=3), trace)
    for horizon in (1, 2, 3):
        assert document.results["next-gate"].metrics[f"h={horizon}"]["exact"] > 0.99
    assert document.results["next-gate, shuffled control"].metrics["h=1"]["recall@2"] == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize("name", NAMES)
def test_a_drifting_stream_is_predicted_in_part(name: str, make_trace: MakeTrace, tmp_path: Path) -> None:
    trace = make_routed(make_trace, drift=0.5)
    run = train(trace, name, tmp_path / "run", horizon=2, options=options_of(name))
    assert run.predictor.takes_router_inputs
    document = evaluate(run, trace)
    recall = {each: result.metrics["h=1"]["recall@2"] for each, result in document.results.items()}
    farther = document.results[name].metrics["h=2"]["recall@2"]
    assert recall["popularity"] + 0.25 < recall[name] < 0.95
    assert recall["popularity"] < farther < recall[name]
    assert recall[f"{name}, shuffled control"] < recall["popularity"] + 0.06
    routes = load_routes(trace, "test", router_inputs=True)
    first, second = (each.predictor.probabilities(routes, slice(0, 40)) for each in (run, load_run(run.path)))
    assert (first == second).all()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_later_is_seen(name: str, make_trace: MakeTrace) -> None:
    trace = make_routed(make_trace, drift=0.5)
    routes = load_routes(trace, "train", router_inputs=True)
    predictor = predictor_classes()[name](Shape(layers=LAYERS, experts=EXPERTS, top_k=2, horizon=1))
    predictor.fit(routes, None, options_of(name, epochs=1), lambda *_: None)
    before = predictor.probabilities(routes, slice(5, 6)).copy()
    assert routes.router is not None
    hidden = routes.router.hidden_TLD.copy()
    hidden[5, 2:] += 1
    hidden[6:] -= 1
    after = predictor.probabilities(replace(routes, router=replace(routes.router, hidden_TLD=hidden)), slice(5, 6))
    assert (after[:, :2] == before[:, :2]).all()
    assert (after[:, 2] != before[:, 2]).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_runtime_tells_router_inputs_too(name: str, make_trace: MakeTrace) -> None:
    trace = make_routed(make_trace, drift=0.5)
    routes = load_routes(trace, "train", router_inputs=True)
    assert routes.router is not None
    predictor = predictor_classes()[name](Shape(layers=LAYERS, experts=EXPERTS, top_k=2, horizon=1))
    predictor.fit(routes, None, options_of(name, epochs=1), lambda *_: None)
    history, silent = History(predictor.shape), History(predictor.shape)
    for token in range(4):
        expected = predictor.probabilities(routes, slice(token, token + 1))[0]
        history.begin(int(routes.token_keys_T[token]))
        for layer in range(LAYERS):
            known = (array[token, layer] for array in (routes.expert_ids_TLK, routes.weights_TLK, routes.router.hidden_TLD))
            history.add(*known)
            if layer < LAYERS - 1:
                prediction = predictor.predict(history)
                found = np.take_along_axis(expected[layer], prediction.expert_ids, -1)
                assert prediction.scores == pytest.approx(found, abs=1e-5)
    silent.begin(None)
    silent.add([0, 1])
    with pytest.raises(SpecmoeError, match=f"{name} needs router inputs"):
        predictor.predict(silent)
    history.begin(None)
    with pytest.raises(SpecmoeError, match=r"router input of shape \(3,\), expected \(16,\)"):
        history.add([0, 1], None, [1, 2, 3])


def test_biases_and_corrections_are_used(make_trace: MakeTrace) -> None:
    trace = make_routed(make_trace, drift=0.0)
    gates = load_file(trace.path / "gates.safetensors")
    layers = trace.metadata.model.moe_layers
    bias = {f"layers.{layer}.bias": np.eye(EXPERTS, dtype=np.float32)[place] * 1000 for place, layer in enumerate(layers)}
    correction = {
        f"layers.{layer}.e_score_correction_bias": np.eye(EXPERTS, dtype=np.float32)[place + 1] * 5
        for place, layer in enumerate(layers)
    }
    for more, first in ((bias, 0), (correction, 1)):
        save_file(gates | more, trace.path / "gates.safetensors")
        routes = load_routes(Trace.open(trace.path, allow_incomplete=True), "train", router_inputs=True)
        predictor = NextGate(Shape(layers=LAYERS, experts=EXPERTS, top_k=2, horizon=1))
        predictor.fit(routes, None, OPTIONS, lambda *_: None)
        found = predictor.probabilities(routes, slice(0, 20))[:, :, 0].argmax(-1)
        assert (found[:, : LAYERS - 1] == np.arange(1, LAYERS) + first).all()
        again = NextGate.restore(predictor.shape, {}, predictor.arrays())
        assert (again.probabilities(routes, slice(0, 20)) == predictor.probabilities(routes, slice(0, 20))).all()


def test_only_recorded_problems_are_used(make_trace: MakeTrace) -> None:
    trace = make_routed(make_trace, drift=0.5, recorded=7)
    routes = load_routes(trace, "all", router_inputs=True)
    assert sorted(set(routes.problem_ids_T.tolist())) == list(range(7))
    assert routes.router is not None
    assert routes.router.hidden_TLD.shape == (7 * TOKENS, LAYERS, WIDTH)
    chosen = routes.of_problems(routes.problem_ids_T == 3)
    assert chosen.router is not None
    assert (chosen.router.hidden_TLD == routes.router.hidden_TLD[3 * TOKENS : 4 * TOKENS]).all()


def test_traces_without_them_are_told_how(make_trace: MakeTrace, random_problems: MakeProblems, tmp_path: Path) -> None:
    plain = make_trace(random_problems(count=20, tokens=5, layers=3, num_experts=8, top_k=2), 8, name="plain")
    with pytest.raises(TraceError, match=r"no router inputs \(hidden/ and gates.safetensors\): collect it again with"):
        train(plain, "next-gate", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    partly = make_routed(make_trace, drift=0.5, layers=[0, 2])
    with pytest.raises(TraceError, match=r"router inputs of layers \[0, 2\], expected all"):
        train(partly, "next-gate", tmp_path / "run")
    gates = load_file(partly.path / "gates.safetensors")
    whole = make_routed(lambda *given, **more: make_trace(*given, **more, name="whole"), drift=0.5)
    save_file({**gates, "layers.1.weight": np.zeros((8, 5), np.float32)}, whole.path / "gates.safetensors")
    with pytest.raises(TraceError, match=r"'layers.1.weight', expected finite numbers of shape \(8, 16\)"):
        load_routes(Trace.open(whole.path, allow_incomplete=True), "all", router_inputs=True)
    (whole.path / "gates.safetensors").write_bytes(b"no tensors")
    with pytest.raises(TraceError, match="cannot be read"):
        load_routes(Trace.open(whole.path, allow_incomplete=True), "all", router_inputs=True)


def test_who_has_no_use_for_them_says_so(make_trace: MakeTrace, tmp_path: Path) -> None:
    trace = make_routed(make_trace, drift=0.5)
    with pytest.raises(SpecmoeError, match="popularity does not use router inputs: leave out router_inputs"):
        train(trace, "popularity", tmp_path / "run", options=TrainingOptions(router_inputs=True))
    with pytest.raises(SpecmoeError, match="whole-path sees nothing of the token's routers: leave out router_inputs"):
        train(trace, "hybrid", tmp_path / "run", task=Task.WHOLE_PATH, options=options_of("hybrid"))
    assert not (tmp_path / "run").exists()


def test_router_inputs_come_by_groups_too(make_trace: MakeTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profiler.trace.writer.ROWS_PER_GROUP", LAYERS * 45)
    monkeypatch.setattr("profiler.trace.writer.ROWS_PER_FILE", LAYERS * 45)
    trace = make_routed(make_trace, drift=0.5, recorded=20)
    groups, whole = RouteGroups(trace, "all", 5, router_inputs=True), load_routes(trace, "all", router_inputs=True)
    # Of six, the last ones have none.
    assert 1 < len(groups.group_tokens) < 6
    assert groups.group_tokens == [len(routes) for routes in each_group(groups)]
    assert (groups.problem_ids == whole.problem_ids).all()
    found, expected = (router_input_scale(source, "mlp") for source in (groups, whole))
    assert found == pytest.approx(expected)
    assert whole.router is not None
    assert expected[1] == pytest.approx(1 / whole.router.hidden_TLD[:, 1].astype(np.float64).std(0))
    run = train(trace, "pre-attention", tmp_path / "run", options=replace(OPTIONS, shards_per_group=5))
    assert len(run.trained_on) < 20
