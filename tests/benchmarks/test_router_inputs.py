"""The study of router inputs: the split, near duplicates, reduced inputs and their bytes, scores, and a small run of all."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from support.routes import routes_of

from benchmarks.router_inputs.reduced_inputs import (
    Kind,
    Reducer,
    Reduction,
    bytes_for,
    frontier,
    marginal_prices,
    without_routes,
)
from benchmarks.router_inputs.sampled_texts import WINDOW, Texts, split_prompts, together, without_near_duplicates
from benchmarks.router_inputs.study import OPTIONS, Experiment, experiments, keep_settings, run_all, score
from benchmarks.router_inputs.tables import by_key, interval, recall, rows
from profiler.errors import SpecmoeError
from profiler.trace.splits import PARTS
from speculation.data.router_inputs import RouterInputs
from speculation.data.routes import Routes
from speculation.data.tasks import Shape
from speculation.predictors.neural.mlp import MlpPredictor
from speculation.predictors.neural.next_gate import NextGate
from speculation.predictors.options import TrainingOptions

LAYERS, EXPERTS, WIDTH = 5, 8, 16


def with_inputs(routes: Routes, width: int = WIDTH, seed: int = 0) -> Routes:
    """The same tokens with random router inputs, and the experts that random gates choose for them."""
    random = np.random.default_rng(seed)
    layers = routes.expert_ids_TLK.shape[1]
    gate_LED = np.random.default_rng(7).normal(size=(layers, EXPERTS, width)).astype(np.float32)
    # A residual stream: each layer adds to what the layers before it left.
    hidden_TLD = (random.normal(size=(len(routes), layers, width)).cumsum(1) * np.geomspace(1, 3, width)).astype(np.float16)
    logits_TLE = np.einsum("tld,led->tle", hidden_TLD.astype(np.float32), gate_LED)
    ids_TLK = np.argsort(-logits_TLE, -1)[..., :2].astype(np.uint8)
    router = RouterInputs(hidden_TLD, gate_LED, np.zeros((layers, EXPERTS), np.float32), None)
    return replace(routes, expert_ids_TLK=ids_TLK, router=router)


def inputs_of(routes: Routes) -> npt.NDArray[np.float16]:
    assert routes.router is not None
    return routes.router.hidden_TLD


# ---------------------------------------------------------------- texts


def test_each_domain_is_split_70_10_20_by_prompt() -> None:
    domains = ["math"] * 20 + ["code"] * 10
    prompts = [f"prompt {number}" for number in range(30)]
    part_P = split_prompts(prompts, domains)
    for domain, sizes in (("math", [14, 2, 4]), ("code", [7, 1, 2])):
        own = [part for part, of in zip(part_P.tolist(), domains, strict=True) if of == domain]
        assert [own.count(part) for part in PARTS] == sizes
    # What comes first in a dataset does not matter.
    assert split_prompts(prompts[::-1], domains[::-1]).tolist() == part_P.tolist()[::-1]


def test_copies_of_a_prompt_are_in_one_part_also_in_another_domain() -> None:
    prompts = [f"prompt {number}" for number in range(20)] * 2
    part_P = split_prompts([*prompts, *prompts[:5]], ["math"] * 20 + ["code"] * 20 + ["code"] * 5)
    assert part_P[:20].tolist() == part_P[20:40].tolist()
    assert part_P[40:].tolist() == part_P[:5].tolist()


def tokens(start: int, count: int) -> npt.NDArray[np.int64]:
    """So many tokens that occur once, in order."""
    return np.arange(start, start + count, dtype=np.int64)


def test_texts_that_share_windows_with_another_part_are_left_out() -> None:
    # 20 tokens have 13 windows of 8. Sharing 9 tokens is sharing 2 windows (.15), sharing 10 tokens 3 (.23).
    assert WINDOW == 8
    few = np.concatenate([tokens(0, 9), tokens(500, 11)])
    many = np.concatenate([tokens(0, 10), tokens(600, 10)])
    part_X = np.array(["test", "test", "train", "validation", "test"])
    keeps_X = without_near_duplicates([tokens(0, 20), few, tokens(0, 20), many, tokens(700, 20)], part_X)
    # The copy in the test part goes, not the one in the training part, whichever comes first.
    assert keeps_X.tolist() == [False, True, True, False, True]


def test_texts_that_repeat_half_of_their_own_part_are_left_out() -> None:
    # 7 of 13 windows are more than half, 6 are not.
    half = np.concatenate([tokens(0, 14), tokens(500, 6)])
    less = np.concatenate([tokens(0, 13), tokens(600, 7)])
    part_X = np.array(["train"] * 4)
    texts = [tokens(0, 20), half, less, tokens(900, 3)]
    assert without_near_duplicates(texts, part_X).tolist() == [True, False, True, True]
    # What is left out for another reason is not a text that others repeat.
    among = np.array([False, True, True, True])
    assert without_near_duplicates(texts, part_X, among=among).tolist() == [False, True, True, True]
    assert without_near_duplicates([tokens(0, 3)], np.array(["test"])).tolist() == [True]


def test_the_texts_of_a_prompt_follow_each_other() -> None:
    sources = [with_inputs(routes_of([(2, 3), (1, 4)], layers=LAYERS, seed=seed), seed=seed) for seed in (0, 1)]
    both = together(sources)
    assert both.problem_ids_T.tolist() == [0] * 10 + [1] * 10
    assert both.first_T.tolist() == [0] * 5 + [5] * 5 + [10] * 5 + [15] * 5
    assert both.token_ids_T.tolist() == [*range(5)] * 4
    for source, begin in ((0, 0), (1, 5)):
        assert (inputs_of(both)[begin : begin + 5] == inputs_of(sources[source])[:5]).all()
        assert (both.expert_ids_TLK[begin + 10 : begin + 15] == sources[source].expert_ids_TLK[5:]).all()
    with pytest.raises(SpecmoeError, match="router inputs are missing"):
        together([sources[0], replace(sources[1], router=None)])


# ---------------------------------------------------------------- reduced inputs


@pytest.mark.parametrize(
    ("reduction", "size", "label"),
    [
        (Reduction(numbers=128), 256, "whole-128"),
        (Reduction(numbers=128, every=4), 64, "whole-128-every4"),
        (Reduction(kind="pca", numbers=16), 32, "pca-16"),
        (Reduction(kind="pca", numbers=16, bits=8, every=2), 8, "pca-16-8bit-every2"),
        (Reduction(kind="gates", numbers=8, bits=4), 4, "gates-8-4bit"),
    ],
)
def test_bytes(reduction: Reduction, size: float, label: str) -> None:
    assert (reduction.bytes_per_layer, reduction.label) == (size, label)


def test_a_component_is_the_direction_that_dimensions_share() -> None:
    routes = with_inputs(routes_of([(0, 200)], layers=LAYERS), width=2)
    assert routes.router is not None
    shared_TL = np.random.default_rng(1).normal(size=(200, LAYERS)).astype(np.float16)
    # The second dimension is the first one, ten times as large: after scaling, both weigh the same.
    routes = replace(routes, router=replace(routes.router, hidden_TLD=np.stack([shared_TL, 10 * shared_TL], axis=-1)))
    reduced_TLd = Reducer.fit(Reduction(kind="pca", numbers=1), routes).apply(routes)
    for layer in range(LAYERS):
        expected_T = np.sqrt(2) * shared_TL[:, layer] / shared_TL[:, layer].std(dtype=np.float64)
        assert np.abs(reduced_TLd[:, layer, 0]) == pytest.approx(np.abs(expected_T), abs=0.02)


@pytest.mark.parametrize("kind", ["pca", "random"])
def test_all_directions_together_keep_every_distance(kind: Kind) -> None:
    routes = with_inputs(routes_of([(0, 60)], layers=LAYERS))
    reduced_TLd = Reducer.fit(Reduction(kind=kind, numbers=WIDTH), routes).apply(routes).astype(np.float64)
    hidden_TLD = inputs_of(routes).astype(np.float64)
    scaled_TLD = hidden_TLD / hidden_TLD.std(0)
    lengths = [np.linalg.norm(np.diff(each, axis=0), axis=-1) for each in (reduced_TLd, scaled_TLD)]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.02, abs=0.02)


def test_gates_are_the_logits_that_next_gate_ranks_by() -> None:
    routes = with_inputs(routes_of([(0, 50)], layers=LAYERS))
    logits_TLd = Reducer.fit(Reduction(kind="gates", numbers=2 * EXPERTS), routes).apply(routes)
    predictor = NextGate(Shape(layers=LAYERS, experts=EXPERTS, top_k=2, horizon=2))
    predictor.fit(routes, None, TrainingOptions(), lambda *_: None)
    probabilities_TLHE = predictor.probabilities(routes, slice(0, 50))
    for hop in (1, 2):
        best_TL = logits_TLd[:, : LAYERS - hop, (hop - 1) * EXPERTS : hop * EXPERTS].argmax(-1)
        assert (best_TL == probabilities_TLHE[:, : LAYERS - hop, hop - 1].argmax(-1)).mean() > 0.98
    # Nothing comes after the last layer.
    assert not logits_TLd[:, -1].any()
    assert not logits_TLd[:, -2, EXPERTS:].any()


def test_learned_logits_rank_the_next_experts_first() -> None:
    routes = with_inputs(routes_of([(0, 6000)], layers=LAYERS))
    reducer = Reducer.fit(Reduction(kind="learned", numbers=EXPERTS), routes)
    unseen = with_inputs(routes_of([(0, 300)], layers=LAYERS), seed=1)
    first_TL = reducer.apply(unseen)[:, : LAYERS - 1].argmax(-1)
    is_chosen = (unseen.expert_ids_TLK[:, 1:] == first_TL[..., None]).any(-1)
    assert is_chosen.mean() > 0.5  # chance: .25


def test_a_layer_that_is_not_kept_sees_the_last_one_that_is() -> None:
    routes = with_inputs(routes_of([(0, 9)], layers=LAYERS))
    hidden_TLD = inputs_of(routes)
    for every, seen in ((1, [0, 1, 2, 3, 4]), (2, [0, 0, 2, 2, 4]), (4, [0, 0, 0, 0, 4])):
        reduced_TLD = Reducer.fit(Reduction(numbers=WIDTH, every=every), routes).apply(routes)
        assert (reduced_TLD == hidden_TLD[:, seen]).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_of_few_bits(bits: int) -> None:
    train, other = (with_inputs(routes_of([(0, 400)], layers=LAYERS), seed=seed) for seed in (0, 1))
    reducer = Reducer.fit(Reduction(numbers=WIDTH, bits=bits), train)
    largest = 2 ** (bits - 1) - 1
    limit_LD = np.abs(inputs_of(train)).max(0).astype(np.float64)
    assert reducer.step_Ld is not None
    assert reducer.step_Ld == pytest.approx(limit_LD / largest, rel=1e-3)
    for routes in (train, other):
        rounded_TLD = reducer.apply(routes).astype(np.float64)
        clipped_TLD = np.clip(inputs_of(routes), -limit_LD, limit_LD)
        assert (np.abs(rounded_TLD - clipped_TLD) <= 0.51 * reducer.step_Ld + 0.002 * limit_LD).all()
        assert max(len(np.unique(rounded_TLD[:, 0, number])) for number in range(WIDTH)) <= 2 * largest + 1


@pytest.mark.parametrize(
    ("reduction", "message"),
    [
        (Reduction(numbers=8), "the router inputs have 16 numbers"),
        (Reduction(kind="shuffled", numbers=8), "the router inputs have 16 numbers"),
        (Reduction(kind="pca", numbers=17), "the router inputs have 16 numbers only"),
        (Reduction(kind="gates", numbers=12), "expected a multiple of 8"),
        (Reduction(kind="learned", numbers=12), "expected a multiple of 8"),
    ],
)
def test_sizes_that_do_not_fit_are_named(reduction: Reduction, message: str) -> None:
    with pytest.raises(SpecmoeError, match=message):
        Reducer.fit(reduction, with_inputs(routes_of([(0, 9)], layers=LAYERS)))


def test_without_routes_only_router_inputs_count() -> None:
    routes = replace(with_inputs(routes_of([(0, 80)], layers=LAYERS)), token_keys_T=np.arange(80) % 7)
    predictor = MlpPredictor(Shape(layers=LAYERS, experts=EXPERTS, top_k=2, horizon=1))
    options = TrainingOptions(epochs=1, batch_tokens=40, width=8, router_inputs=True)
    predictor.fit(without_routes(routes), None, options, lambda *_: None)
    everything = slice(0, 80)
    before = predictor.probabilities(without_routes(routes), everything)
    others = replace(routes, expert_ids_TLK=(routes.expert_ids_TLK + 1) % EXPERTS, token_keys_T=np.arange(80) % 5)
    assert (predictor.probabilities(without_routes(others), everything) == before).all()
    assert (predictor.probabilities(without_routes(with_inputs(routes, seed=5)), everything) != before).any()


def test_prices() -> None:
    points = [(0.0, 0.70), (8.0, 0.74), (16.0, 0.73), (24.0, 0.75), (256.0, 0.75)]
    assert frontier(points) == [(0, 0.70), (8, 0.74), (24, 0.75)]
    assert bytes_for(0.01, points) == pytest.approx(2)
    assert bytes_for(0.045, points) == pytest.approx(16)
    assert bytes_for(0.06, points) is None
    assert marginal_prices(points) == [(0, 8, 2.0), (8, 24, 16.0)]


# ---------------------------------------------------------------- scores and tables


def test_only_generated_tokens_are_scored() -> None:
    routes = with_inputs(routes_of([(2, 3), (1, 1)], layers=LAYERS))
    assert routes.router is not None
    # Every layer has the inputs and the gate of the first one, so next-gate is right everywhere, and any other expert is wrong.
    router = replace(
        routes.router,
        hidden_TLD=np.repeat(inputs_of(routes)[:, :1], LAYERS, axis=1),
        weight_LED=np.repeat(routes.router.weight_LED[:1], LAYERS, axis=0),
    )
    routes = replace(routes, router=router, expert_ids_TLK=np.repeat(routes.expert_ids_TLK[:, :1], LAYERS, axis=1))
    predictor = NextGate(Shape(layers=LAYERS, experts=EXPERTS, top_k=2, horizon=2))
    predictor.fit(routes, None, TrainingOptions(), lambda *_: None)
    found = score(predictor, routes, routes)
    # 3 generated tokens and 1, at 4 layers that have a next one and 3 that have one two ahead.
    assert found.examples_HP.tolist() == [[12, 4], [9, 3]]
    assert found.exact_HP.tolist() == found.examples_HP.tolist()
    assert found.found_HP.tolist() == (2 * found.examples_HP).tolist()
    assert found.control_HP.sum() < found.found_HP.sum()
    # A wrong prompt costs nothing, a wrong generated token all of its predictions.
    ids_TLK = routes.expert_ids_TLK.copy()
    ids_TLK[:3, 1:] = (ids_TLK[:3, 1:].sum(-1, keepdims=True) + np.array([1, 5])) % EXPERTS
    is_same = np.array([(ids_TLK[token, 1] == routes.expert_ids_TLK[token, 1, :, None]).sum() for token in range(3)])
    wrong = score(predictor, routes, replace(routes, expert_ids_TLK=ids_TLK))
    assert wrong.found_HP.tolist() == [[16 + 4 * is_same[2], 8], [12 + 3 * is_same[2], 6]]


def outcome(found: list[int], **others: Any) -> dict[str, Any]:
    """A run that was evaluated on 10 predictions of top-2 for each of these problems, alternately math and code."""
    facts = {"predictor": "mlp", "sees": "routes", "reduction": "", "bytes": 0.0, "trained_on": "all", "seed": 0}
    facts |= {"train_problems": 9, "train_tokens": 99, "epochs": 1, "train_seconds": 1.0, "parameters": 5}
    counts = {"examples": [[10] * len(found)], "found": [found], "exact": [[1] * len(found)], "control": [[5] * len(found)]}
    domains = [("math", "code")[number % 2] for number in range(len(found))]
    return facts | counts | {"top_k": 2, "chance": 0.25, "domains": domains} | others


def test_rows_and_recall_are_sums_over_problems() -> None:
    low, high = outcome([10, 16, 14, 20]), outcome([12, 18, 16, 20], seed=1)
    shown = [(row["evaluated_on"], row["recall@2"], row["exact"], row["control"], row["problems"]) for row in rows([low])]
    assert shown == [("all", 0.75, 0.1, 0.25, 4), ("code", 0.9, 0.1, 0.25, 2), ("math", 0.6, 0.1, 0.25, 2)]
    both = by_key([low, high])["mlp", "routes", "", "all"]
    assert recall(both, 1) == pytest.approx(126 / 160)
    assert recall(both, 1, "code") == pytest.approx(74 / 80)
    assert recall(both, 1, count="exact") == pytest.approx(0.1)
    first, last = interval(both, 1)
    assert 12 / 20 < first < 126 / 160 < last < 1
    # Paired: what is better by the same amount for every problem is so in every sample.
    better = [outcome([11, 17, 15, 21])]
    assert interval(better, 1, [low]) == pytest.approx((0.05, 0.05))
    assert interval([low], 1, [low]) == (0, 0)


def test_every_experiment_has_a_name_of_its_own() -> None:
    shape = Shape(layers=8, experts=8, top_k=2, horizon=4)
    planned = list(experiments(128, shape, ["code", "math"], 3))
    assert len({each.name for each in planned}) == len(planned)
    assert {each.seed for each in planned} == {0, 1, 2}
    assert all(each.options.router_inputs == (each.predictor == "mlp" and each.sees != "routes") for each in planned)


def test_a_small_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mlp", "pre-attention"):
        monkeypatch.setitem(OPTIONS, name, {"batch_tokens": 64, "learning_rate": 1e-2})
    monkeypatch.setitem(OPTIONS, "mlp", OPTIONS["mlp"] | {"width": 16})
    routes = with_inputs(routes_of([(4, 36)] * 40, layers=LAYERS))
    domain_P = np.array(["math", "code"] * 20)
    part_P = split_prompts([f"prompt {number}" for number in range(40)], domain_P.tolist())
    texts = Texts(routes, domain_P, part_P)
    assert len(texts.of("train")) == 28 * 40
    assert len(texts.of("test", "code")) == 4 * 40
    shape = Shape(layers=LAYERS, experts=EXPERTS, top_k=2, horizon=2)
    only = ("popularity", "next-gate", "pre-attention-inputs-all", "mlp-routes", "mlp-both-all", "mlp-both-pca-8-all")
    run_all(texts, shape, tmp_path, seeds=1, epochs=3, only=(*only, "mlp-both-shuffled", "mlp-inputs-math"))
    with (tmp_path / "router-inputs.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    # 10 runs (mlp from routes also on each domain), 2 layers ahead, all domains together and each.
    assert len(found) == 10 * 2 * 3
    value = {
        (row["predictor"], row["sees"], row["reduction"]): float(row["recall@2"])
        for row in found
        if (row["layers_ahead"], row["evaluated_on"], row["trained_on"]) == ("1", "all", "all")
    }
    routes_alone, whole = value["mlp", "routes", ""], value["mlp", "both", ""]
    assert value["popularity", "routes", ""] < whole - 0.1
    # The experts follow from the inputs, so inputs add something, but those of other tokens do not.
    assert routes_alone + 0.03 < value["mlp", "both", "pca-8"] < whole + 0.03
    assert value["mlp", "both", "shuffled-16"] < routes_alone + 0.03
    assert all(abs(float(row["control"]) - 0.25) < 0.08 for row in found)
    tables = (tmp_path / "tables.md").read_text()
    assert "`mlp`, routes and inputs" in tables
    assert "bytes for the first .01" in tables
    # Finished results are kept.
    file_of = tmp_path / "results" / "popularity-routes-all-0.json"
    changed = json.loads(file_of.read_text()) | {"seed": 5}
    file_of.write_text(json.dumps(changed))
    run_all(texts, shape, tmp_path, seeds=1, epochs=3, only=only)
    assert json.loads(file_of.read_text())["seed"] == 5


def test_a_part_without_texts_is_named() -> None:
    texts = Texts(with_inputs(routes_of([(1, 3)], layers=LAYERS)), np.array(["math"]), np.array(["train"]))
    with pytest.raises(SpecmoeError, match="no text of code is in the train part"):
        texts.of("train", "code")


def test_results_of_other_texts_are_not_mixed(tmp_path: Path) -> None:
    keep_settings(tmp_path, {"texts": 2})
    keep_settings(tmp_path, {"texts": 2})
    with pytest.raises(SpecmoeError, match="choose another folder"):
        keep_settings(tmp_path, {"texts": 3})


def test_names_of_files() -> None:
    assert Experiment(predictor="mlp", sees="both", reduction=Reduction(kind="pca", numbers=8), seed=2).name == (
        "mlp-both-pca-8-all-2"
    )
