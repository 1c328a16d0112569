"""From a trace to files: what is in them, and that they claim nothing that is not in the trace."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.traces import MakeProblems, MakeTrace, write_synthetic_trace
from typer.testing import CliRunner

from analysis.analyze import analyze_trace, compare_traces
from analysis.documents.evaluation import Evaluation, read_evaluation
from analysis.documents.statistics import ComparisonDocument, read_statistics
from analysis.statistics.compute import DEFINITIONS, compute_statistics
from profiler.errors import TraceError
from profiler.trace.reader import Trace
from specmoe import app

EVALUATION: dict[str, Any] = {
    "run": "mine",
    "task": "next-layer",
    "trace": "t",
    "split": "by problem (hash of the prompt)",
    "part": "test",
    "problems": 3,
    "tokens": 100,
    "chance": {"recall@2": 0.25, "top-1": 0.125, "exact": 0.036, "any": 0.464},
    "results": {
        name: {
            "metrics": {"h=1": {"recall@2": recall, "top-1": 0.3, "exact": 0.2, "any": 0.7}},
            "recall_at_k_name": "recall@2",
            "intervals": {"h=1": {"recall@2": [recall - 0.1, recall + 0.1]}},
            "by_target_layer": {"h=1": [None, {"recall@2": recall}, {"recall@2": recall}]},
        }
        for name, recall in (("popularity", 0.3), ("mlp", 0.5), ("mlp, shuffled control", 0.26))
    },
}


@pytest.fixture
def trace(make_trace: MakeTrace, random_problems: MakeProblems) -> Trace:
    problems = random_problems(count=14, tokens=40, layers=3, num_experts=8, top_k=2)
    datasets = ["a</script><b>", "b"] * 7
    return make_trace(problems, 8, datasets=datasets, vocab_ids=[np.arange(41) % 5] * 14, prompt_tokens=5)


def test_files_of_a_trace(trace: Trace, tmp_path: Path) -> None:
    statistics, findings = analyze_trace(trace, tmp_path / "r", hops=2, evaluations=[Evaluation.model_validate(EVALUATION)])
    text = (tmp_path / "r" / "statistics.json").read_text()
    # What is written is what is read.
    assert read_statistics(tmp_path / "r") == statistics.to_document()
    assert read_statistics(tmp_path / "r").to_json() == text
    document = json.loads(text)
    assert (document["problems"], document["tokens"]) == (14, 560)
    assert [len(hop["information_bits"]) for hop in document["transitions"]] == [2, 1]
    assert document["chance"]["topk"] == 0.25
    assert document["definitions"] == DEFINITIONS
    with np.load(tmp_path / "r" / "transitions.npz", allow_pickle=False) as stored:
        assert stored["probabilities"].shape == (2, 3, 8, 8)
        assert stored["probabilities"][0, :2].sum(-1) == pytest.approx(1.0)
    page = (tmp_path / "r" / "report.html").read_text()
    assert "a&lt;/script&gt;" in page
    assert "a</script>" not in page
    assert 'src="http' not in page
    for title, headline in findings:
        assert f"<h2>{title}</h2>" in page
        assert headline
    titles = [title for title, _ in findings]
    assert titles == [
        "One answer, token by token",
        "Expert load",
        "Cross-layer transitions",
        "Flow between layers",
        "Prediction across layers",
        "Repetition over tokens",
        "Reuse of experts",
        "Cache size and misses",
        "Working set over time",
        "Pairs within a token",
        "Domains",
        "Clusters of experts",
        "Routing weights",
        "Predictability",
        "Predictors",
    ]
    assert statistics.problems == 14


def test_tables_have_what_the_statistics_have(trace: Trace, tmp_path: Path) -> None:
    statistics, _ = analyze_trace(trace, tmp_path / "r", hops=2)

    def rows(name: str) -> list[dict[str, str]]:
        with (tmp_path / "r" / "tables" / f"{name}.csv").open(encoding="utf-8") as file:
            return list(csv.DictReader(file))

    load = [row for row in rows("load") if (row["dataset"], row["phase"]) == ("all", "all")]
    assert len(load) == 24
    assert sum(int(row["selections"]) for row in load) == 560 * 3 * 2
    by_phase = {row["phase"] for row in rows("load")}
    assert by_phase == {"all", "prefill", "decode"}
    assert {(row["hop"], row["from_layer"], row["to_layer"]) for row in rows("transitions")} == {
        ("1", "0", "1"),
        ("1", "1", "2"),
        ("2", "0", "2"),
    }
    first = next(row for row in rows("repetition") if row["dataset"] == "all")
    assert float(first["first"]) == pytest.approx(statistics.repetitions[0].first[0, 0], rel=1e-4)
    assert {row["context"] for row in rows("predictability")} >= {"the token itself", "strongest at the layer before"}
    assert len(rows("weights")) == 3 * 2


def test_cells_do_not_run_as_formulas(make_trace: MakeTrace, random_problems: MakeProblems, tmp_path: Path) -> None:
    trace = make_trace(random_problems(count=4, tokens=9, layers=2, num_experts=4, top_k=1), 4, datasets=["=1+1", "b"] * 2)
    analyze_trace(trace, tmp_path / "r")
    text = (tmp_path / "r" / "tables" / "domains.csv").read_text()
    assert "'=1+1," in text
    assert "\n=1+1," not in text
    load = (tmp_path / "r" / "tables" / "load.csv").read_text()
    assert ",'," not in load


def test_one_layer_one_expert_per_token_and_no_weights(
    make_trace: MakeTrace, random_problems: MakeProblems, tmp_path: Path
) -> None:
    """Statistics of what is not in a trace are left out, and nothing fails."""
    problems = random_problems(count=3, tokens=6, layers=1, num_experts=3, top_k=1)
    _, findings = analyze_trace(make_trace(problems, 3), tmp_path / "r")
    assert [title for title, _ in findings] == [
        "One answer, token by token",
        "Expert load",
        "Repetition over tokens",
        "Reuse of experts",
        "Cache size and misses",
        "Working set over time",
        "Routing weights",
        "Predictability",
    ]
    assert not (tmp_path / "r" / "tables" / "transitions.csv").exists()


def test_layers_keep_the_decoder_s_numbers(tmp_path: Path, random_problems: MakeProblems) -> None:
    problems = random_problems(count=4, tokens=8, layers=3, num_experts=4, top_k=2)
    trace = write_synthetic_trace(tmp_path / "trace", problems, 4, first_layer=5)
    analyze_trace(trace, tmp_path / "r")
    with (tmp_path / "r" / "tables" / "layers.csv").open(encoding="utf-8") as file:
        assert {row["layer"] for row in csv.DictReader(file)} == {"5", "6", "7"}


def test_a_domain_called_all_is_not_all(make_trace: MakeTrace, random_problems: MakeProblems) -> None:
    even = random_problems(count=6, tokens=40, layers=2, num_experts=8, top_k=2)
    one = [(np.tile([0, 1], (40, 2, 1)), weights) for _, weights in even]
    trace = make_trace(even + one, 8, datasets=["math"] * 6 + ["all"] * 6)
    statistics = compute_statistics(trace)
    assert statistics.datasets == ["all (dataset)", "math"]
    assert statistics.load.tokens == 480
    assert statistics.loads["all (dataset)", "all"].tokens == 240


@pytest.mark.parametrize("kind", ["one token", "one expert", "K = E", "one problem"])
def test_odd_traces_are_told_truly(kind: str, make_trace: MakeTrace, tmp_path: Path) -> None:
    """No headline has a number that is not one, and predictions evaluated on their own tokens are marked as such."""
    count, tokens, experts = {
        "one token": (8, 1, 4),
        "one expert": (8, 20, 4),
        "K = E": (8, 20, 2),
        "one problem": (1, 30, 16),
    }[kind]
    random = np.random.default_rng(0)
    problems = []
    for _ in range(count):
        ids = random.random((tokens, 3, experts)).argsort(-1)[:, :, :2]
        if kind == "one expert":
            ids[:] = [2, 1]
        problems.append((ids, np.tile([0.6, 0.4], (tokens, 3, 1))))
    _, findings = analyze_trace(make_trace(problems, experts), tmp_path / "r")
    page = (tmp_path / "r" / "report.html").read_text()
    cards = re.sub("<.*?>", " ", page[page.index('<div class="cards">') : page.index("<section")])
    text = " ".join([cards, *(headline for _, headline in findings)])
    assert "Load balance" in text
    assert "nan" not in text
    assert not re.search(r"\binf\b", text)
    if kind == "one problem":
        assert "too few problems" in dict(findings)["Prediction across layers"]
        assert "too few tokens to identify preferred pairs" in dict(findings)["Pairs within a token"]


def test_empty_traces_are_refused(make_trace: MakeTrace, random_problems: MakeProblems) -> None:
    trace = make_trace(random_problems(count=1, tokens=2, layers=2, num_experts=4, top_k=1), 4)
    for file in trace.routing_files:
        file.unlink()
    with pytest.raises(TraceError, match="incomplete"):
        Trace.open(trace.path)
    (trace.path / "manifest.json").unlink()
    with pytest.raises(TraceError, match="has no routing rows"):
        compute_statistics(Trace.open(trace.path, allow_incomplete=True))


def test_several_traces_are_compared(make_trace: MakeTrace, random_problems: MakeProblems, tmp_path: Path) -> None:
    random = random_problems(count=8, tokens=30, layers=3, num_experts=8, top_k=2)
    linked = [(ids.copy(), weights.copy()) for ids, weights in random]
    for ids, weights in linked:
        ids[:, 1], weights[:, 1] = ids[:, 0], weights[:, 0]
    traces = [make_trace(random, 8, name="plain"), make_trace(linked, 8, name="linked")]
    document, findings = compare_traces(traces, tmp_path / "r")
    rows = document.figures
    bits = rows["bits shared with the next layer"]
    assert bits["linked"] == pytest.approx(1.5, abs=0.3)
    assert bits["plain"] is not None
    assert bits["plain"] < 0.3
    assert rows["chance of an expert (K/E)"] == {"plain": 0.25, "linked": 0.25}
    assert "Jensen-Shannon" in dict(findings)["Expert load"]
    assert "Layers predict the next layer best in linked" in dict(findings)["Side by side"]
    (difference,) = document.differences
    assert (difference.first, difference.second, len(difference.share)) == ("plain", "linked", 3)
    # Only the second layer was changed.
    assert difference.moved[0] == difference.moved[2] == 0
    assert "experts have another share" in dict(findings)["Differences: plain and linked"]
    for name in ("plain", "linked"):
        assert (tmp_path / "r" / name / "report.html").is_file()
    assert document.traces.keys() == {"plain", "linked"}
    assert ComparisonDocument.model_validate_json((tmp_path / "r" / "statistics.json").read_text()) == document


def test_models_of_other_shapes_are_compared(make_trace: MakeTrace, random_problems: MakeProblems, tmp_path: Path) -> None:
    small = make_trace(random_problems(count=4, tokens=20, layers=2, num_experts=4, top_k=1), 4, name="small")
    large = make_trace(random_problems(count=4, tokens=20, layers=5, num_experts=16, top_k=4), 16, name="large")
    document, findings = compare_traces([small, large], tmp_path / "r")
    assert document.figures["chance of an expert (K/E)"] == {"small": 0.25, "large": 0.25}
    assert "Jensen-Shannon" not in dict(findings)["Expert load"]


def test_command(trace: Trace, tmp_path: Path) -> None:
    runner = CliRunner()
    evaluation = tmp_path / "evaluation.json"
    evaluation.write_text(json.dumps(EVALUATION))
    done = runner.invoke(app, ["analyze", str(trace.path), "--out", str(tmp_path / "r"), "--evaluation", str(evaluation)])
    assert done.exit_code == 0, done.output
    assert "Predictors: mlp predicts best: recall@2 0.500, chance 0.250." in done.output
    assert f"report: {tmp_path / 'r' / 'report.html'}" in done.output
    # A run's folder will do.
    again = runner.invoke(app, ["analyze", str(trace.path), "--out", str(tmp_path / "r"), "--evaluation", str(tmp_path)])
    assert "Predictors: mlp predicts best" in again.output
    as_json = runner.invoke(app, ["analyze", str(trace.path), "--out", str(tmp_path / "s"), "--json"])
    assert json.loads(as_json.stdout)["tokens"] == 560


def test_command_refuses_what_is_not_an_evaluation(trace: Trace, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("[]")
    done = CliRunner().invoke(app, ["analyze", str(trace.path), "--out", str(tmp_path / "r"), "--evaluation", str(other)])
    assert isinstance(done.exception, TraceError)
    assert "expected what 'specmoe evaluate RUN --trace T --json FILE' writes" in str(done.exception)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"results": {}}, "writes: results: expected those of at least one predictor"),
        ({"chance": {"top-1": 0.1}}, "chance lacks"),
        ({"results": {"mlp": EVALUATION["results"]["mlp"] | {"metrics": {"h=2": {}}}}}, "metrics of h=2, expected of h=1"),
        ({"results": {"mlp": EVALUATION["results"]["mlp"] | {"metrics": {"h=1": {}}}}}, "mlp lacks"),
    ],
)
def test_evaluations_that_cannot_be_shown_are_refused(change: dict[str, object], text: str, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(EVALUATION | change))
    with pytest.raises(TraceError, match=text):
        read_evaluation(path)


def test_compared_traces_have_names_of_their_own(make_trace: MakeTrace, random_problems: MakeProblems, tmp_path: Path) -> None:
    problems = random_problems(count=2, tokens=6, layers=2, num_experts=4, top_k=1)
    (tmp_path / "x").mkdir()
    traces = [write_synthetic_trace(tmp_path / name, problems, 4) for name in ("a", "x/a", "a-2")]
    document, _ = compare_traces(traces, tmp_path / "r")
    assert document.traces == {"a": str(traces[0].path), "a-2": str(traces[1].path), "a-2-2": str(traces[2].path)}
