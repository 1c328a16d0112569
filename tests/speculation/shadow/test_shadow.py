"""Live scores of a predictor: the same numbers as evaluating and simulating a trace of the same requests."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from support.traces import MakeTrace

from profiler.errors import SpecmoeError, TraceError
from profiler.live.metrics import (
    DRIFT,
    GAP,
    HIT_RATE,
    LAYER_RECALL,
    RECALL,
    REFERENCE,
    SCORED,
    SCORED_REQUESTS,
    SHARE,
    TOTAL,
    WINDOW,
    Samples,
)
from profiler.live.options import ShadowOptions
from profiler.live.publication import Publication
from profiler.live.shadow_stream import ShadowModel, ShadowRequest, write_model, write_request
from profiler.trace.reader import Trace
from speculation.data.routes import load_routes
from speculation.data.tasks import Task
from speculation.evaluation.evaluate import evaluate
from speculation.offload.studies.simulation_options import SimulationStudy
from speculation.offload.studies.simulation_study import run_study
from speculation.predictors.options import TrainingOptions
from speculation.shadow import __main__ as program
from speculation.shadow import process
from speculation.shadow.process import Shadow, reference_recall, run
from speculation.shadow.scoring import Scores, count_hits, joined, routes_of_request
from speculation.training.fit import train
from speculation.training.runs import load_run

MODEL = ShadowModel(moe_layers=[0, 1, 2, 3], num_experts=8, top_k=2, model="synthetic", engine="0")


def requests_of_trace(trace: Trace) -> list[ShadowRequest]:
    """Every problem as the engine would pass it on: pairs in any order, ids of vocabulary if the trace has them."""
    found, tokens = [], 0
    random = np.random.default_rng(0)
    for number in range(trace.problems.num_rows):
        problem = trace.arrays(number)
        assert problem.weights_TLK is not None
        order = random.permutation(2)
        tokens += len(problem.token_ids_T)
        found.append(
            ShadowRequest(
                expert_ids_TLK=problem.expert_ids_TLK[..., order].astype(np.uint16),
                weights_TLK=problem.weights_TLK[..., order],
                positions_T=problem.token_ids_T,
                vocab_ids_T=np.zeros(len(problem.token_ids_T), dtype=np.int32),
                prompt_tokens=1,
                engine_tokens=2 * tokens,
            )
        )
    return found


def domain(make_trace: MakeTrace, name: str, shift: int) -> Trace:
    """A domain whose experts follow each other in a way of its own: mostly, expert e is followed by e + shift (mod 8)."""
    random = np.random.default_rng(shift)
    problems = []
    for _ in range(12):
        strongest = np.zeros((20, 4), dtype=int)
        strongest[:, 0] = random.integers(0, 8, 20)
        for layer in range(1, 4):
            follows = random.random(20) < 0.9
            strongest[:, layer] = np.where(follows, (strongest[:, layer - 1] + shift) % 8, random.integers(0, 8, 20))
        problems.append((np.stack([strongest, (strongest + 4) % 8], axis=-1), np.tile([0.7, 0.3], (20, 4, 1))))
    return make_trace(problems, 8, name=name)


def scored(path: Path, trace: Trace, **options: object) -> Samples:
    shadow = Shadow(load_run(path), MODEL, ShadowOptions(run=str(path), **options))  # type: ignore[arg-type] # of each kind
    for request in requests_of_trace(trace):
        shadow.score(request)
    shadow.play()
    return shadow.samples()


@pytest.mark.parametrize(
    ("task", "predictor", "horizon"),
    [
        (Task.NEXT_LAYER, "conditional-counts", 2),
        (Task.NEXT_TOKEN, "previous-token", 2),
        (Task.WHOLE_PATH, "token-identity", 1),
        (Task.NEXT_LAYER, "mlp", 1),
    ],
)
def test_recall_is_that_of_evaluate(markov_trace: Trace, tmp_path: Path, task: Task, predictor: str, horizon: int) -> None:
    options = TrainingOptions(epochs=2) if predictor == "mlp" else None
    trained = train(markov_trace, predictor, tmp_path / "run", task=task, horizon=horizon, options=options)
    expected = evaluate(trained, markov_trace, part="all")
    samples = scored(tmp_path / "run", markov_trace)
    for name in {"popularity", "previous-token", predictor}:
        result = expected.results[name]
        for hop in range(1, horizon + 1):
            recall = result.metrics[f"h={hop}"]["recall@2"]
            assert samples.get(RECALL, name, hop, TOTAL) == pytest.approx(recall, abs=1e-9)
            assert samples.get(RECALL, name, hop, WINDOW) == pytest.approx(recall, abs=1e-9)
        for layer, metrics in enumerate(result.by_target_layer["h=1"]):
            if metrics is not None:
                assert samples.get(LAYER_RECALL, name, layer) == pytest.approx(metrics["recall@2"], abs=1e-9)
    assert (samples.get(SCORED), samples.get(SCORED_REQUESTS), samples.get(SHARE)) == (40 * 30, 40, 0.5)


def test_hit_rates_are_those_of_simulate(markov_trace: Trace, tmp_path: Path) -> None:
    run_path = tmp_path / "run"
    train(markov_trace, "conditional-counts", run_path)
    samples = scored(run_path, markov_trace, policies=("lfu", "ewma"), slots=(2, 4))
    study = SimulationStudy(
        trace=markov_trace,
        part="all",
        predictors=("none", str(run_path)),
        policies=("lru", "lfu", "ewma", "belady"),
        fractions=(0.25, 0.5),
    )
    rows = [row for row in run_study(study).rows if row.prefetch == "none" and row.policy in {"lru", "lfu", "ewma", "belady"}]
    assert len(rows) == 8
    for row in rows:
        assert samples.get(HIT_RATE, row.policy, row.capacity) == pytest.approx(row.hit_rate, abs=1e-9)
        if row.gap_captured is not None:
            assert samples.get(GAP, row.policy, row.capacity) == pytest.approx(row.gap_captured, abs=1e-9)
    assert len(samples.values[HIT_RATE.name]) == 8
    assert samples.get(GAP, "lru", 4) == 0
    assert samples.get(GAP, "belady", 4) == 1


def test_a_run_of_reuse_plays_its_own_policy_and_scores_the_baselines(markov_trace: Trace, tmp_path: Path) -> None:
    run_path = tmp_path / "run"
    train(markov_trace, "ewma-repeats", run_path, task=Task.REUSE)
    samples = scored(run_path, markov_trace, slots=(4,))
    study = SimulationStudy(trace=markov_trace, part="all", predictors=("none",), policies=(str(run_path),), fractions=(0.5,))
    (row,) = (row for row in run_study(study).rows if row.policy == "run")
    assert samples.get(HIT_RATE, "ewma-repeats", 4) == pytest.approx(row.hit_rate, abs=1e-9)
    assert {predictor for predictor, _, _ in samples.values[RECALL.name]} == {"popularity", "previous-token"}


def test_a_run_of_another_domain_drops_below_its_reference(make_trace: MakeTrace, tmp_path: Path) -> None:
    own, other = domain(make_trace, "own", 1), domain(make_trace, "other", 3)
    run_path = tmp_path / "run"
    trained = train(own, "conditional-counts", run_path)
    (run_path / "evaluation.json").write_text(evaluate(trained, own).to_json())
    here, there = scored(run_path, own), scored(run_path, other)
    reference = here.get(REFERENCE, "conditional-counts", 1)
    assert reference == evaluate(trained, own).results["conditional-counts"].metrics["h=1"]["recall@2"]
    assert abs(here.get(DRIFT, "conditional-counts", 1)) < 0.1
    assert there.get(DRIFT, "conditional-counts", 1) < -0.3
    assert there.get(DRIFT, "conditional-counts", 1) == pytest.approx(
        there.get(RECALL, "conditional-counts", 1, WINDOW) - reference
    )


def test_an_evaluation_of_training_problems_is_not_a_reference(
    markov_trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = train(markov_trace, "conditional-counts", tmp_path / "run")
    assert reference_recall(trained) == {}
    (tmp_path / "run" / "evaluation.json").write_text(evaluate(trained, markov_trace, part="all").to_json())
    assert reference_recall(trained) == {}
    first, second = capsys.readouterr().err.splitlines()
    assert "specmoe evaluate" in first
    assert "of problems that it was trained on" in second


def test_the_window_holds_the_last_requests(markov_trace: Trace, tmp_path: Path) -> None:
    train(markov_trace, "conditional-counts", tmp_path / "run")
    shadow = Shadow(load_run(tmp_path / "run"), MODEL, ShadowOptions(run="", window_tokens=75))
    requests = requests_of_trace(markov_trace)
    for request in requests:
        shadow.score(request)
    # Each has 30 tokens.
    assert (shadow.scores.window_tokens, len(shadow.scores.window), shadow.scores.tokens) == (60, 2, 40 * 30)
    last = joined([routes_of_request(request, 8) for request in requests[-2:]])
    for name in ("popularity", "conditional-counts"):
        predictor = load_run(tmp_path / "run").predictor if name == "conditional-counts" else shadow._predictors[name]
        assert shadow.scores.recent[name].recall_H == count_hits(predictor, last).recall_H
    small = Scores(10)
    small.add(shadow.scores.window[-1])
    assert small.window_tokens == 30


def test_joined_requests_are_problems_of_their_own(markov_trace: Trace) -> None:
    routes = joined([routes_of_request(request, 8) for request in requests_of_trace(markov_trace)])
    expected = load_routes(markov_trace, "all")
    for name in ("expert_ids_TLK", "weights_TLK", "problem_ids_T", "token_ids_T", "token_keys_T", "is_decode_T", "first_T"):
        assert (getattr(routes, name) == getattr(expected, name)).all(), name


@pytest.mark.parametrize(("ids", "weight"), [([9, 1], 0.5), ([0, 1], -0.5), ([0, 1], np.nan)])
def test_rows_that_are_not_routing_are_refused(ids: list[int], weight: float) -> None:
    request = ShadowRequest(
        expert_ids_TLK=np.array([[ids]], dtype=np.uint16),
        weights_TLK=np.full((1, 1, 2), weight, dtype=np.float16),
        positions_T=np.zeros(1, dtype=np.int32),
        vocab_ids_T=np.zeros(1, dtype=np.int32),
        prompt_tokens=1,
        engine_tokens=1,
    )
    with pytest.raises(TraceError, match="live request"):
        routes_of_request(request, 8)


def test_the_program_scores_a_stream_and_publishes(
    markov_trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(markov_trace, "conditional-counts", tmp_path / "run")
    stream = io.BytesIO()
    write_model(stream, MODEL)
    for request in requests_of_trace(markov_trace)[:5]:
        write_request(stream, request)
    stream.seek(0)
    run(stream, ShadowOptions(run=str(tmp_path / "run"), cpu=1.0), tmp_path / "shadow-0.json")
    found = Publication.from_json((tmp_path / "shadow-0.json").read_text())
    assert (found.model, found.engine, found.samples.get(SCORED)) == ("synthetic", "0", 150)
    assert found.samples.get(SHARE) == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 16}, "the engine's model has 4 MoE layers and top-2 of 16 experts, but that of"),
        ({"moe_layers": [0, 1]}, "2 MoE layers and top-2 of 8"),
    ],
)
def test_a_run_of_another_model_is_refused(
    markov_trace: Trace, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    trained = train(markov_trace, "conditional-counts", tmp_path / "run")
    with pytest.raises(SpecmoeError, match=message):
        Shadow(trained, ShadowModel(**{**vars(MODEL), **change}), ShadowOptions(run=""))


def test_unknown_policies_are_refused(markov_trace: Trace, tmp_path: Path) -> None:
    trained = train(markov_trace, "conditional-counts", tmp_path / "run")
    with pytest.raises(SpecmoeError, match="unknown eviction policy 'learned': expected one of lru, fifo"):
        Shadow(trained, MODEL, ShadowOptions(run="", policies=("learned",)))


def test_an_error_of_the_program_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.BytesIO()
    write_model(stream, MODEL)
    stream.seek(0)
    arguments = {"options": {"run": str(tmp_path / "absent")}, "published": str(tmp_path / "p.json"), "cores": []}
    monkeypatch.setattr(sys, "argv", ["shadow", json.dumps(arguments)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream))
    monkeypatch.setattr(process, "yield_to_the_engine", lambda _: None)
    with pytest.raises(SystemExit, match="1"):
        program.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("specmoe: the predictor is not scored: ")
    assert "is not a run directory" in line
