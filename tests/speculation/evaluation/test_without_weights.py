"""Evaluations on traces without weights: nothing that depends on the order of a token's experts, or on their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.traces import MakeTrace
from typer.testing import CliRunner

from analysis.documents.evaluation import OF_STRONGEST, Evaluation, budget_table, read_evaluation, table
from analysis.report.sections.predictability import predictions_section
from profiler.errors import TraceError
from profiler.importers import import_trace
from profiler.importers.rows import ImportOptions
from profiler.trace.jsonl import write_jsonl
from profiler.trace.reader import Trace
from specmoe import app
from speculation.evaluation.evaluate import evaluate
from speculation.evaluation.leaderboard import write_leaderboard
from speculation.training.fit import train


def stripped(trace: Trace, folder: Path, *, order: str) -> Trace:
    """The trace without its weights; order: of each row's experts, "as is", "reversed" or "random"."""
    folder.mkdir()
    write_jsonl(trace, folder / "rows.jsonl")
    random = np.random.default_rng(0)
    lines = []
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        del row["weights"]
        ids = row["expert_ids"]
        row["expert_ids"] = {"as is": ids, "reversed": ids[::-1], "random": random.permutation(ids).tolist()}[order]
        lines.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return import_trace(folder / "rows.jsonl", folder / "trace", options=ImportOptions(num_experts=8))


def names_in(value: Any) -> set[str]:
    """The names of all entries of a JSON document, at any depth."""
    if isinstance(value, dict):
        return set(value) | {name for each in value.values() for name in names_in(each)}
    return {name for each in value for name in names_in(each)} if isinstance(value, list) else set()


def of_weights_or_order(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith((*OF_STRONGEST, "mass@"))}


def comparable(document: Evaluation) -> dict[str, Any]:
    """What of an evaluation of popularity may not depend on the order: all but times, and the digest of the trace."""
    content: dict[str, Any] = json.loads(document.to_json()) | {"train_seconds": None}
    content["recipe"]["trace_sha256"] = None
    for result in content["results"].values():
        result["microseconds_per_prediction"] = None
    return content


def test_an_evaluation_does_not_depend_on_the_order(markov_trace: Trace, tmp_path: Path) -> None:
    documents = []
    for order in ("as is", "reversed", "random"):
        trace = stripped(markov_trace, tmp_path / order, order=order)
        run = train(trace, "popularity", tmp_path / order / "run")
        documents.append(evaluate(run, trace, with_baselines=False))
    assert comparable(documents[0]) == comparable(documents[1]) == comparable(documents[2])
    # The test can tell: with weights, the popular experts are the strongest more or less often.
    with_weights = evaluate(train(markov_trace, "popularity", tmp_path / "run"), markov_trace)
    assert of_weights_or_order(set(with_weights.results["popularity"].metrics["h=1"])) >= {"top-1", "hit@3", "mass@2"}


def test_nothing_of_weights_is_written_or_shown(markov_trace: Trace, tmp_path: Path) -> None:
    trace = stripped(markov_trace, tmp_path / "stripped", order="as is")
    train(trace, "conditional-counts", tmp_path / "run")
    command = ["evaluate", str(tmp_path / "run"), "--trace", str(trace.path)]
    done = CliRunner().invoke(app, [*command, "--json", str(tmp_path / "run.json")], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    board = CliRunner().invoke(app, [*command, "--leaderboard", str(tmp_path / "board")], env={"COLUMNS": "200"})
    assert board.exit_code == 0, board.output
    assert of_weights_or_order(names_in(json.loads((tmp_path / "run.json").read_text()))) == set()
    document = read_evaluation(tmp_path / "run.json")
    section = predictions_section(document, 1)
    shown = [
        done.output,
        board.output,
        *(figure.content for figure in section.figures),
        str(section.tables),
        section.explanation,
    ]
    page = (tmp_path / "board" / "leaderboard.html").read_text(encoding="utf-8")
    shown.append(page[page.index("<body>") :])
    shown += [path.read_text(encoding="utf-8") for path in (tmp_path / "board").iterdir() if path.suffix in {".md", ".csv"}]
    for text in shown:
        assert not any(word in text for word in ("top-1", "top_1", "hit@", "mass@")), text[:300]
    assert "mass" not in (tmp_path / "board" / "budget.csv").read_text()
    assert "no weights were recorded" in done.output


def test_with_weights_all_of_it_is_shown(markov_trace: Trace, tmp_path: Path) -> None:
    document = evaluate(train(markov_trace, "conditional-counts", tmp_path / "run"), markov_trace)
    assert {"top-1"} <= table(document)[0].keys()
    # Of eight experts with K = 2: m = 2, 3, 4, 6.
    assert list(budget_table(document)[0]) == ["predictor", "@2", "@3", "@4", "@6", "mass@2", "mass@4", "ECE"]
    write_leaderboard([document], tmp_path / "board")
    assert "| mass@2 | top-1 |" in (tmp_path / "board" / "leaderboard.md").read_text(encoding="utf-8")
    own, control = (
        document.results[name].metrics["h=1"] for name in ("conditional-counts", "conditional-counts, shuffled control")
    )
    # Of a rule that gives both experts or none, and by accident, weights do not matter.
    assert own["mass@2"] == pytest.approx(own["recall@2"], abs=0.03)
    assert control["mass@2"] == pytest.approx(control["recall@2"], abs=0.03)


def as_version_1(document: Evaluation, *, of_order: bool) -> dict[str, Any]:
    """What earlier releases wrote: calibration of one horizon, no budget, and top-1 of whatever the source listed first."""
    content: dict[str, Any] = json.loads(document.to_json())
    for name in ("has_weights", "recipe"):
        del content[name]
    content["version"] = 1
    if of_order:
        content["caveats"] = ["no weights were recorded: 'strongest' means the expert that the source lists first"]
    for result in content["results"].values():
        del result["budget"]
        result["calibration_error"] = result.pop("calibration")["h=1"]["error"]
    return content


@pytest.mark.parametrize("of_order", [False, True])
def test_older_evaluations_are_read_and_hide_the_same(of_order: bool, markov_trace: Trace, tmp_path: Path) -> None:
    document = evaluate(train(markov_trace, "conditional-counts", tmp_path / "run", horizon=2), markov_trace)
    old = as_version_1(document, of_order=of_order)
    (tmp_path / "old.json").write_text(json.dumps(old))
    found = read_evaluation(tmp_path / "old.json")
    assert found.has_weights != of_order
    assert found.results["popularity"].calibration["h=1"].error == document.results["popularity"].calibration["h=1"].error
    assert "calibration_error" not in found.to_json()
    left = of_weights_or_order(names_in(json.loads(found.to_json())["results"]))
    assert not any(name.startswith(OF_STRONGEST) for name in left) if of_order else "top-1" in left
    assert ("top-1" in table(found)[0]) != of_order
    assert budget_table(found) == []
    write_leaderboard([found], tmp_path / "board")
    (tmp_path / "again.json").write_text(found.to_json())
    assert read_evaluation(tmp_path / "again.json") == found


@pytest.mark.parametrize(
    ("change", "message"),
    [({"version": 3}, "version 3: this release reads versions up to 2"), ({"version": 1, "results": []}, "results")],
)
def test_other_versions_are_refused(change: dict[str, Any], message: str, markov_trace: Trace, tmp_path: Path) -> None:
    document = evaluate(train(markov_trace, "popularity", tmp_path / "run"), markov_trace)
    (tmp_path / "new.json").write_text(json.dumps(json.loads(document.to_json()) | change))
    with pytest.raises(TraceError, match=message):
        read_evaluation(tmp_path / "new.json")


@pytest.mark.parametrize("calibrated", [True, False])
def test_calibration_tells_probabilities_from_others(calibrated: bool, make_trace: MakeTrace, tmp_path: Path) -> None:
    """Popularity of one layer pair is right on independent routing from one distribution; a trace of another is not."""
    random = np.random.default_rng(0)

    def synthetic_trace(name: str, favorite: float) -> Trace:
        shares = np.array([favorite, *[(1 - favorite) / 7] * 7])
        problems = []
        for _ in range(40):
            noise = random.gumbel(size=(40, 3, 8)) + np.log(shares)
            problems.append((noise.argsort(-1)[..., ::-1][..., :2].copy(), np.tile([0.5, 0.5], (40, 3, 1))))
        return make_trace(problems, 8, name=name, prompts=[f"{name} {number}" for number in range(40)])

    run = train(synthetic_trace("one", 0.6), "popularity", tmp_path / "run")
    document = evaluate(run, synthetic_trace("other", 0.6 if calibrated else 0.05), part="all")
    calibration = document.results["popularity"].calibration["h=1"]
    assert (calibration.error < 0.02) == calibrated
    assert sum(each.count for each in calibration.bins) == 40 * 40 * 2 * 8
    errors = [abs(each.predicted - each.observed) for each in calibration.bins if each.count > 500]
    assert (max(errors) < 0.05) == calibrated
