"""Every predictor, small, on real routing: the embedded model's. And their leaderboard."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from analysis.documents.evaluation import Evaluation, read_evaluation, table
from profiler import TraceCollector
from profiler.engines import EngineOptions, Sampling
from profiler.errors import SpecmoeError
from profiler.trace.reader import Trace
from specmoe import app
from speculation.data.routes import Routes, load_routes
from speculation.data.tasks import Shape, Task
from speculation.evaluation.evaluate import evaluate
from speculation.evaluation.leaderboard_rows import leaderboard_rows
from speculation.predictors.counting.backoff_counts import BACK_OFF, BackoffCounts
from speculation.predictors.counting.product_of_experts import logistic_weights
from speculation.predictors.neural.base import NetworkConfig
from speculation.predictors.neural.ensemble import Ensemble, EnsembleNetwork
from speculation.predictors.neural.hierarchical import CLUSTERS, Hierarchical, HierarchicalNetwork, clusters_of
from speculation.predictors.options import TrainingOptions
from speculation.predictors.registry import predictor_classes
from speculation.training.fit import train
from speculation.training.runs import load_run

WITHOUT = {"uniform", "popularity"}
NAMES = [
    name
    for name, cls in predictor_classes().items()
    if name not in WITHOUT and not cls.needs_router_inputs and Task.NEXT_LAYER in cls.tasks
]
OPTIONS = TrainingOptions(epochs=3, batch_tokens=192, width=32, learning_rate=1e-2, average=20, dropout=0.0)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trace]:
    with TraceCollector("demo", engine="transformers", engine_options=EngineOptions(dtype="float32")) as collector:
        collected = collector.collect_from_datasets(
            ["demo-math", "demo-code"], num_problems=24, max_tokens_per_problem=60, sampling=Sampling(max_new_tokens=8)
        )
        yield collected.save(tmp_path_factory.mktemp("architectures") / "trace")


@pytest.fixture(scope="module")
def documents(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Evaluation]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: evaluate(train(trace, name, folder / name, options=OPTIONS), trace) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_on_real_routing_it_beats_popularity_and_its_control_does_not(name: str, documents: dict[str, Evaluation]) -> None:
    results = documents[name].results
    recall = {each: result.metrics["h=1"]["recall@2"] for each, result in results.items()}
    assert documents[name].trained_on == 0
    assert recall[name] > recall["popularity"] + 0.1
    assert recall[f"{name}, shuffled control"] < recall["popularity"] + 0.05
    microseconds = results[name].microseconds_per_prediction
    assert microseconds is not None
    assert 0 < microseconds < 1e6


def test_the_leaderboard_has_every_predictor_once(documents: dict[str, Evaluation]) -> None:
    rows = leaderboard_rows(list(documents.values()))
    assert sorted(row.run for row in rows) == sorted([*NAMES, "popularity"])
    assert [row.recall for row in rows] == sorted((row.recall for row in rows), reverse=True)
    popularity = next(row for row in rows if row.run == "popularity")
    assert popularity.control is None
    assert popularity.train_seconds is None
    assert all(row.control is not None and row.low <= row.recall <= row.high for row in rows if row is not popularity)


def test_a_leaderboard_of_two_runs_at_the_command_line(trace: Trace, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b|c", 1)):
        train(trace, "mlp", tmp_path / name, options=replace(OPTIONS, epochs=1, seed=seed))
    command = ["evaluate", str(tmp_path / "a"), str(tmp_path / "b|c"), "--trace", str(trace.path)]
    board = tmp_path / "boards" / "one"
    done = CliRunner().invoke(app, [*command, "--leaderboard", str(board)])
    assert done.exit_code == 0, done.output
    expected = {f"leaderboard.{end}" for end in ("md", "csv", "json", "html")}
    tables = {"metrics.csv", "budget.csv", "reliability.csv", "seeds.csv"}
    assert {path.name for path in board.iterdir()} == expected | tables
    table = (board / "leaderboard.md").read_text(encoding="utf-8")
    assert "held out. Chance: recall@2" in table
    assert "b\\|c" in table
    with (board / "leaderboard.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # The baselines once, of the first run.
    assert sorted(row["run"] for row in rows) == ["a", "b|c", "conditional-counts", "popularity", "previous-token"]
    page = (board / "leaderboard.html").read_text(encoding="utf-8")
    assert "src=" not in page.split("<body>")[1].split("<script")[0]
    assert len(json.loads((board / "leaderboard.json").read_text())) == 2
    done = CliRunner().invoke(app, [*command, "--json", str(tmp_path / "x.json")])
    assert isinstance(done.exception, SpecmoeError)
    assert "--json is for one run" in str(done.exception)


def test_horizons_are_in_the_order_of_numbers_and_empty_ones_left_out(trace: Trace, tmp_path: Path) -> None:
    run = train(trace, "popularity", tmp_path / "run", task=Task.NEXT_TOKEN, horizon=11)
    document = evaluate(run, trace)
    document.results["popularity"].metrics["h=3"] = {}
    horizons = [row.horizon for row in leaderboard_rows([document]) if row.run == "run"]
    assert horizons == [hop for hop in range(1, 12) if hop != 3]
    assert [row["predictor"] for row in table(document, 3)].count("popularity") == 0


def test_an_evaluation_is_read_as_it_was_written(documents: dict[str, Evaluation], tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(documents["mlp"].to_json())
    found = read_evaluation(path)
    assert found == documents["mlp"]
    assert set(found.results["mlp"].groupings) >= {"phase", "position", "dataset"}
    curve = json.loads(path.read_text())["results"]["mlp"]["precision_by_coverage"]
    assert curve[0].keys() == {"threshold", "coverage", "recall@K"}


def test_runs_of_one_name_are_not_mixed_up(documents: dict[str, Evaluation]) -> None:
    with pytest.raises(SpecmoeError, match="two rows of the leaderboard would be called 'mlp'"):
        leaderboard_rows([documents["mlp"], documents["mlp"]])
    with pytest.raises(SpecmoeError, match="two rows of the leaderboard would be called 'popularity'"):
        leaderboard_rows([documents["hybrid"], documents["mlp"].model_copy(update={"run": "popularity"})])


def test_other_data_does_not_stand_beside(documents: dict[str, Evaluation]) -> None:
    one, other = documents["mlp"], documents["hybrid"].model_copy(update={"problems": 7})
    with pytest.raises(SpecmoeError, match="was evaluated with problems 7"):
        leaderboard_rows([one, other])


def test_clusters_are_of_experts_selected_together() -> None:
    """Eight groups of four experts; every token selects two of one group."""
    random = np.random.default_rng(0)
    group_of = random.permutation(np.repeat(np.arange(8), 4))
    members = np.argsort(group_of, kind="stable").reshape(8, 4)
    chosen = members[random.integers(0, 8, 4000)]
    ids = np.take_along_axis(chosen, random.random((4000, 4)).argsort(1)[:, :2], 1)[:, None].repeat(2, 1).astype(np.uint8)
    shape = Shape(layers=2, experts=32, top_k=2, horizon=1)
    routes = Routes(
        ids,
        np.ones(ids.shape, np.float16),
        np.zeros(4000, np.int32),
        np.zeros(4000, np.int32),
        np.zeros(4000, np.int64),
        np.zeros(4000, np.bool_),
        np.zeros(4000, np.int64),
    )
    cluster = clusters_of(routes, shape)[1]
    assert len(set(zip(cluster.tolist(), group_of.tolist(), strict=True))) == len(set(cluster.tolist())) == CLUSTERS


def test_shares_of_the_hierarchy_are_a_distribution() -> None:
    shape = Shape(layers=3, experts=12, top_k=2, horizon=2)
    predictor = Hierarchical(shape, config=NetworkConfig(width=32, context=3))
    network = predictor.network
    assert isinstance(network, HierarchicalNetwork)
    network.cluster_LHE.copy_(torch.arange(12) % 5)
    ids, weights = torch.randint(0, 12, (7, 3, 3, 2)), torch.rand(7, 3, 3, 2)
    with torch.inference_mode():
        logits = network.eval()(ids, weights, torch.zeros(7, dtype=torch.int64))
    # With scale 1 and no bias, logits are the logarithms of shares of all experts, over an even share.
    shares = (logits - np.log(12)).exp()
    assert shares.sum(-1).numpy() == pytest.approx(np.ones((7, 3, 2)), abs=1e-5)


def test_the_surer_model_of_the_ensemble_counts_more() -> None:
    shape = Shape(layers=2, experts=8, top_k=2, horizon=1)
    predictor = Ensemble(shape, config=NetworkConfig(width=32, context=3))
    network = predictor.network
    assert isinstance(network, EnsembleNetwork)
    with torch.no_grad():
        for model, size in ((network.pattern, 0.0), (network.statistics, 0.0)):
            model.head.weight.fill_(size)
        network.pattern.bias_LHE[:] = torch.tensor([6.0, 6, -6, -6, -6, -6, -6, -6])
        network.statistics.bias_LHE[:] = torch.tensor([-1.0, -1, 0, 0, -1, -1, -1, -1])
    routes = Routes(
        np.zeros((3, 2, 2), np.uint8) + np.array([0, 1], np.uint8),
        np.full((3, 2, 2), 0.5, np.float16),
        np.zeros(3, np.int32),
        np.arange(3, dtype=np.int32),
        np.zeros(3, np.int64),
        np.zeros(3, np.bool_),
        np.zeros(3, np.int64),
    )
    found = predictor.probabilities(routes, slice(0, 3))[0, 0, 0]
    sure, unsure = 1 / (1 + np.exp(-6)), 0.5
    expected = (sure * np.array([6.0, -6, -6]) + unsure * np.array([-1, 0, -1])) / (sure + unsure)
    assert found[[0, 2, 4]] == pytest.approx(1 / (1 + np.exp(-expected)), abs=1e-5)


def test_an_adaptive_context_is_short_where_the_routing_is_certain() -> None:
    """Two stretches that differ in how sure the router was of the last known token."""
    random = np.random.default_rng(0)
    ids = random.random((40, 2, 8)).argsort(-1)[:, :, :2].astype(np.uint8)
    certain = np.arange(40) < 20
    weights = np.where(certain[:, None, None], [0.99, 0.01], [0.51, 0.49]).astype(np.float16).repeat(2, 1)
    first = np.where(certain, 0, 20)
    routes = Routes(
        ids,
        weights,
        (first > 0).astype(np.int32),
        np.arange(40, dtype=np.int32),
        np.zeros(40, np.int64),
        np.zeros(40, np.bool_),
        first,
    )
    predictor = predictor_classes()["interlayer-lstm"](Shape(layers=2, experts=8, top_k=2, horizon=1))
    options = TrainingOptions(epochs=1, width=16, context=5, adaptive_context=True)
    predictor.fit(routes, None, options, lambda *_: None)
    assert predictor.settings()["context"] == 5
    again = predictor_classes()["interlayer-lstm"].restore(predictor.shape, predictor.settings(), predictor.arrays())
    for token, back, is_seen in ((10, 1, True), (10, 2, False), (10, 4, False), (30, 1, True), (30, 4, True), (30, 5, False)):
        changed = replace(routes, expert_ids_TLK=ids.copy())
        changed.expert_ids_TLK[token - back] = (changed.expert_ids_TLK[token - back] + 1) % 8
        before, after = (again.probabilities(each, slice(token, token + 1))[0, 0] for each in (routes, changed))
        assert (before != after).any() == is_seen, (token, back)


def test_a_shared_head_is_smaller_and_stays(trace: Trace, tmp_path: Path) -> None:
    sizes = {}
    for is_shared in (False, True):
        options = replace(OPTIONS, epochs=1, shared_layers=is_shared)
        run = train(trace, "interlayer-lstm", tmp_path / str(is_shared), options=options)
        head = load_run(run.path).predictor.arrays()["network.head.weight"]
        sizes[is_shared] = head.shape
    layers = run.predictor.shape.layers
    assert sizes == {False: (layers, 32, 8), True: (1, 32, 8)}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("recommended", {"context": 4}, "recommended has no context to choose: leave out context"),
        ("mlp", {"adaptive_context": True}, "mlp has no context to choose"),
        ("hybrid", {"shared_layers": True}, "hybrid has no head that could be shared"),
    ],
)
def test_choices_that_a_predictor_does_not_have_are_named(
    name: str, options: dict[str, Any], message: str, trace: Trace, tmp_path: Path
) -> None:
    with pytest.raises(SpecmoeError, match=message):
        train(trace, name, tmp_path / "run", options=replace(OPTIONS, **options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "width"), [("transformer", 20), ("hierarchical", 12), ("attention-graph", 6)])
def test_widths_that_heads_cannot_share_are_named(name: str, width: int, trace: Trace, tmp_path: Path) -> None:
    with pytest.raises(SpecmoeError, match=f"width {width}: expected a multiple of [48] for {name}"):
        train(trace, name, tmp_path / "run", options=replace(OPTIONS, width=width))


def test_clusters_that_do_not_exist_and_times_that_are_none_are_refused(trace: Trace, tmp_path: Path) -> None:
    run = train(trace, "hierarchical", tmp_path / "run", options=replace(OPTIONS, epochs=1))
    arrays = load_file(run.path / "model.safetensors")
    save_file({**arrays, "network.cluster_LHE": arrays["network.cluster_LHE"] + 100}, run.path / "model.safetensors")
    with pytest.raises(SpecmoeError, match="'cluster_LHE' has values outside 0 to 7"):
        load_run(run.path)
    save_file(arrays, run.path / "model.safetensors")
    metrics = json.loads((run.path / "metrics.json").read_text())
    for wrong in (float("nan"), float("inf"), 10**400, "soon"):
        (run.path / "metrics.json").write_text(json.dumps(metrics | {"train_seconds": wrong}))
        with pytest.raises(SpecmoeError, match=r"metrics\.json is not valid"):
            load_run(run.path)


@pytest.mark.parametrize(
    "settings",
    [
        *({}, {"width": 0}, {"width": 10**9}, {"width": "8"}, {"width": 8, "context": True}, {"width": 8, "depth": 3}),
        *({"width": 8, "context": 3, "uncertain_above": 7}, {"width": 8, "context": 3, "shared_layers": 1}),
    ],
)
def test_settings_that_fit_no_network_are_refused(settings: dict[str, Any], trace: Trace, tmp_path: Path) -> None:
    run = train(trace, "hybrid", tmp_path / "run", options=replace(OPTIONS, epochs=1, width=8))
    config = json.loads((run.path / "config.json").read_text())
    (run.path / "config.json").write_text(json.dumps(config | {"settings": settings}))
    with pytest.raises(SpecmoeError, match="stored predictor: settings: "):
        load_run(run.path)
    (run.path / "config.json").write_text(json.dumps(config | {"settings": {"width": 4000, "context": 3}}))
    with pytest.raises(SpecmoeError, match=r"weights 'embedding\.ahead\.table' are \(64, 8\), expected \(64, 4000\)"):
        load_run(run.path)


def test_back_off_by_hand() -> None:
    """Contexts (0, 1) twice, followed by (2, 3) and (2, 0); (0, 2) once, followed by (1, 3)."""
    ids = np.array([[[0, 1], [2, 3]], [[0, 1], [2, 0]], [[0, 2], [1, 3]]], np.uint8)
    weights = np.tile(np.array([0.6, 0.4], np.float16), (3, 2, 1))
    routes = Routes(
        ids,
        weights,
        np.zeros(3, np.int32),
        np.arange(3, dtype=np.int32),
        np.zeros(3, np.int64),
        np.zeros(3, np.bool_),
        np.zeros(3, np.int64),
    )
    predictor = BackoffCounts(Shape(layers=2, experts=4, top_k=2, horizon=1))
    predictor.fit(routes, None, TrainingOptions(), lambda *_: None)
    popularity = np.array([1, 1, 2, 2]) / 3
    one = (np.array([1, 1, 2, 2]) + BACK_OFF * popularity) / (3 + BACK_OFF)
    two = (np.array([1, 0, 2, 1]) + BACK_OFF * one) / (2 + BACK_OFF)
    asked = replace(routes, expert_ids_TLK=np.array([[[0, 1], [0, 0]], [[0, 3], [0, 0]], [[3, 0], [0, 0]]], np.uint8))
    found = predictor.probabilities(asked, slice(0, 3))[:, 0, 0]
    # The pair is known; only its first is; nothing is.
    assert found[0] == pytest.approx(two, abs=1e-3)
    assert found[1] == pytest.approx(one, abs=1e-3)
    assert found[2] == pytest.approx(popularity, abs=1e-6)


def test_logistic_weights_are_found() -> None:
    random = np.random.default_rng(0)
    features, offset = random.normal(size=(40_000, 2)), random.normal(size=40_000)
    log_odds = features @ [1.5, -0.5] + 0.3 + offset
    is_true = (random.random(40_000) < 1 / (1 + np.exp(-log_odds))).astype(float)
    assert logistic_weights(features, offset, is_true) == pytest.approx([1.5, -0.5, 0.3], abs=0.06)


def test_trees_that_are_none_are_refused(trace: Trace, tmp_path: Path) -> None:
    run = train(trace, "boosted-trees", tmp_path / "run", options=OPTIONS)
    path = run.path / "model.safetensors"
    sound = load_file(path)
    routes = load_routes(trace, "test")
    again = load_run(run.path).predictor.probabilities(routes, slice(0, 20))
    assert (again == run.predictor.probabilities(routes, slice(0, 20))).all()
    for node, value in (((0, 0, 0, 0, 0), 0), ((0, 0, 0, 0, 1), 10_000), ((0, 0, 0, 0, 2), 4 * 8 + 1)):
        broken = {name: array.copy() for name, array in sound.items()}
        assert broken["nodes_LHRN3"][0, 0, 0, 0, 2] >= 0
        broken["nodes_LHRN3"][node] = value
        save_file(broken, path)
        with pytest.raises(SpecmoeError, match="are not trees"):
            load_run(run.path)
