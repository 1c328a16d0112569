"""A trace without weights lists a token's experts in an order that means nothing: no number of an analysis depends on it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from analysis import cli
from analysis.analyze import analyze_trace, compare_traces
from profiler.importers import import_trace
from profiler.importers.rows import ImportOptions
from profiler.trace.reader import Trace
from profiler.trace.schema import Metadata, RecordMetadata

LAYERS, EXPERTS = 3, 8


def without_weights(tmp_path: Path, name: str, top_k: int, *, shuffled: bool = False) -> Trace:
    """16 problems whose first expert decides the next layer's; shuffled: the experts of each row in a random order."""
    random, order = np.random.default_rng(0), np.random.default_rng(1)
    lines = []
    for problem in range(16):
        for token in range(10):
            first = int(random.integers(EXPERTS))
            for layer in range(LAYERS):
                others = random.permutation(np.setdiff1d(np.arange(EXPERTS), first))[: top_k - 1]
                ids = np.array([first, *others])
                ids = order.permutation(ids) if shuffled else ids
                row = {"problem_id": problem, "layer": layer, "token_id": token, "expert_ids": ids.tolist()}
                lines.append(json.dumps(row))
                first = (first + 1) % EXPERTS
    source = tmp_path / f"{name}.jsonl"
    source.write_text("\n".join(lines))
    trace = import_trace(source, tmp_path / name, options=ImportOptions(num_experts=EXPERTS, command=("specmoe",)))
    assert not trace.metadata.record.weights
    return trace


@pytest.mark.parametrize("top_k", [2, 3])
def test_an_analysis_does_not_depend_on_the_order(top_k: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, printed = [], []
    for folder, shuffled in (("one", False), ("other", True)):
        (tmp_path / folder).mkdir()
        trace = without_weights(tmp_path / folder, "trace", top_k, shuffled=shuffled)
        out = tmp_path / folder / "report"
        statistics, findings = analyze_trace(trace, out, hops=2)
        cli.print_statistics(statistics)
        cli.print_findings(findings)
        printed.append(capsys.readouterr().out)
        written = sorted(path for path in out.rglob("*") if path.suffix in {".json", ".csv", ".html"})
        files.append({path.relative_to(out): path.read_text().replace(str(trace.path), "") for path in written})
    assert files[0].keys() == files[1].keys()
    assert len(files[0]) > 8
    for name, text in files[0].items():
        assert text == files[1][name], name
    assert printed[0] == printed[1]
    body = re.sub(r"<script(?! type=.application/json).*?</script>", "", files[0][Path("report.html")], flags=re.DOTALL)
    note = "no weights were recorded: which of a token&#39;s experts is the strongest is unknown, so nothing says it"
    assert note in body
    assert not any(word in body.replace(note, "") for word in ("first choice", "top-1", "Top-1", "strongest"))


def test_of_one_expert_per_token_the_strongest_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.statistics.compute.cluster_experts", lambda *arguments: [])
    trace = without_weights(tmp_path, "trace", 1)
    statistics, _ = analyze_trace(trace, tmp_path / "report", hops=1)
    # The next expert follows from this one.
    assert statistics.hops[0].held_out_top1 == pytest.approx(np.ones(LAYERS - 1))
    assert statistics.source.caveats == ()
    assert "first choice" in (tmp_path / "report" / "report.html").read_text()


def test_a_comparison_shows_the_strongest_expert_of_those_that_know_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.statistics.compute.cluster_experts", lambda *arguments: [])
    blind = without_weights(tmp_path, "blind", 2)
    lines = [json.loads(line) | {"weights": [0.75, 0.25]} for line in (tmp_path / "blind.jsonl").read_text().splitlines()]
    (tmp_path / "seeing.jsonl").write_text("\n".join(map(json.dumps, lines)))
    seeing = import_trace(tmp_path / "seeing.jsonl", tmp_path / "seeing", options=ImportOptions(num_experts=EXPERTS))
    both, _ = compare_traces([blind, seeing], tmp_path / "both", hops=1)
    guessed = both.figures["strongest expert guessed from the layer before, held out"]
    assert guessed["blind"] is None
    assert guessed["seeing"] == pytest.approx(1)
    none, _ = compare_traces([blind, without_weights(tmp_path, "other", 2)], tmp_path / "none", hops=1)
    assert [name for name in none.figures if "strongest" in name or "first choice" in name or "bits" in name] == []


def test_what_a_trace_knows() -> None:
    metadata = Metadata.model_validate(
        {"model": {"id": "m", "moe_layers": [0], "num_experts": 4, "top_k": 2}, "engine": "none", "hook": "none"}
    )
    assert metadata.knows_strongest
    assert not metadata.model_copy(update={"record": RecordMetadata(weights=False)}).knows_strongest
