"""`specmoe curve`: from a trace to the printed tables and sentences, the document, the table and the page."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from support.traces import MakeProblems, MakeTrace
from typer.testing import CliRunner

from analysis.documents.curves import CacheCurves, HitRateCurve, SlotHitRates, SlotsRow, WorkingSetRow, read_curves
from profiler.errors import SpecmoeError, TraceError
from profiler.trace.reader import Trace
from profiler.trace.splits import part_of
from specmoe import app
from speculation.offload.curves.curve_study import CurveStudy, run_curves, summary_of
from speculation.offload.state import Rule
from speculation.offload.studies.simulation_options import SimulationStudy
from speculation.offload.studies.simulation_study import run_study


@pytest.fixture(scope="module")
def runner() -> CliRunner:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture
def trace(make_trace: MakeTrace, random_problems: MakeProblems) -> Trace:
    """Random routing, 20 experts in each of 3 layers."""
    return make_trace(random_problems(count=30, tokens=12, layers=3, num_experts=20, top_k=2), 20, first_layer=1)


def test_what_is_printed_and_written(trace: Trace, runner: CliRunner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = runner.invoke(app, ["curve", str(trace.path), "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    text = (out / "curve.json").read_text()
    curves = read_curves(out)
    assert curves.to_json() == text
    assert (curves.part, curves.moe_layers, curves.num_experts, curves.top_k) == ("test", [1, 2, 3], 20, 2)
    assert [(curve.policy, curve.is_global, curve.is_exact) for curve in curves.curves] == [
        ("lru", False, True),
        ("lru", True, True),
        ("belady", False, False),
    ]
    # 10, 25 and 50 % of 20 experts in each of 3 layers.
    assert [row.slots for row in curves.slots] == [6, 15, 30]
    assert all(sum(row.by_layer) == row.slots for row in curves.slots)
    assert all(row.training.by_curves >= row.training.even for row in curves.slots)
    for sentence in (*curves.summary, *curves.notes):
        assert sentence in done.output
    assert f"lru: 5 of 20 experts per layer hit {curves.curves[0].hit_rate(5):.3f}; the knee is at " in done.output
    assert "No problem has 512 consecutive generated tokens" in done.output
    assert "NOT held out" not in done.output
    with (out / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    # All layers together and each one; one cache for all layers has no layers.
    assert len(rows) == 4 * 21 + 61 + 4 * len(curves.curves[2].sizes)
    (row,) = [row for row in rows if (row["policy"], row["layer"], row["slots"]) == ("belady", "3", "5")]
    assert int(row["hits"]) == curves.curves[2].hits_by_layer[2][curves.curves[2].sizes.index(5)]
    page = (out / "curve.html").read_text()
    assert "https://" not in page.split("<script")[0]
    assert curves.summary[0] in page


def test_curves_have_the_hit_rates_of_the_simulation(trace: Trace) -> None:
    policies = (Rule.LFU, Rule.LRU, Rule.BELADY)
    curves = run_curves(CurveStudy(trace=trace, part="test", policies=policies, batch=3))
    assert [curve.policy for curve in curves.curves] == ["lru", "lru", "lfu", "belady"]
    for is_global in (False, True):
        simulation = run_study(
            SimulationStudy(
                trace=trace,
                part="test",
                predictors=("none",),
                policies=tuple(rule.label for rule in policies),
                fractions=(0.1, 0.25, 0.75),
                is_global=is_global,
                batch=3,
            )
        )
        compared = [curve for curve in curves.curves if curve.is_global == is_global]
        for curve in compared:
            rows = [row for row in simulation.rows if row.policy == curve.policy]
            assert [curve.hit_rate(row.capacity) for row in rows] == pytest.approx([row.hit_rate for row in rows])


def test_another_trace_for_training(make_trace: MakeTrace, random_problems: MakeProblems, trace: Trace) -> None:
    """Slots come from all of it but the evaluated problems, and go where its uses are spread widest."""
    problems = random_problems(count=20, tokens=12, layers=3, num_experts=20, top_k=2, seed=1)
    for ids, _ in problems:
        # Layer 1 uses two experts only.
        ids[:, 1] = [0, 1]
    prompts = [f"prompt {number}" for number in range(5)] + [f"other {number}" for number in range(15)]
    other = make_trace(problems, 20, name="other", first_layer=1, prompts=prompts)
    curves = run_curves(CurveStudy(trace=trace, part="all", training=other, fractions=(0.3,)))
    assert curves.training_problems == 15
    assert "Caches start with the experts most popular in 15 training problems." in curves.notes[-1]
    assert "NOT held out" not in " ".join(curves.notes)
    (row,) = curves.slots
    assert row.by_layer[1] == 2
    assert row.training.by_curves > row.training.even + 0.05
    # These problems use all experts of each layer alike: whichever have slots, as many requests hit.
    assert row.evaluated.by_curves == pytest.approx(row.evaluated.even, abs=0.03)


@pytest.mark.parametrize("part", ["train", "all"])
def test_what_is_not_held_out_is_said(trace: Trace, part: str) -> None:
    curves = run_curves(CurveStudy(trace=trace, part=part))
    assert "NOT held out: popularity and slots come from problems that are also evaluated." in curves.notes


def test_without_a_training_part(make_trace: MakeTrace, random_problems: MakeProblems) -> None:
    prompts = [prompt for prompt in (f"prompt {number}" for number in range(60)) if part_of(prompt) == "test"][:3]
    problems = random_problems(count=3, tokens=12, layers=2, num_experts=8, top_k=2)
    curves = run_curves(CurveStudy(trace=make_trace(problems, 8, prompts=prompts), part="test", fractions=(0.5,)))
    assert curves.training_problems is None
    assert curves.slots == []
    assert any(note.startswith("NOT held out: popularity is that of these problems themselves") for note in curves.notes)
    # Three problems never decode four at a time.
    assert [(row.is_batch, row.tokens) for row in curves.working_sets] == [(False, 1), (False, 8)]
    assert "No step decodes 4 sequences: there is no working set of such steps." in curves.notes


def test_without_generated_tokens_all_count_as_such(make_trace: MakeTrace, random_problems: MakeProblems) -> None:
    problems = random_problems(count=30, tokens=12, layers=1, num_experts=8, top_k=1)
    curves = run_curves(CurveStudy(trace=make_trace(problems, 8, prompt_tokens=13), part="test"))
    assert curves.decode_tokens == curves.tokens > 0
    assert "The trace does not say which tokens were generated: all count as if they were." in curves.notes


def test_the_summary() -> None:
    lru = HitRateCurve(
        policy="lru", is_global=False, is_exact=True, sizes=[0, 1, 2, 3, 4], hits=[0, 5, 8, 9, 10], requested=10, knee=2
    )
    belady = lru.model_copy(update={"policy": "belady", "is_exact": False, "sizes": [0, 1, 4], "hits": [0, 7, 10]})
    rows = [
        WorkingSetRow(
            is_batch=batch, tokens=n, count=9, mean=2.25, percentile_90=3, mean_by_layer=[2.25], percentile_90_by_layer=[3]
        )
        for batch, n in ((False, 8), (False, 64), (True, 4), (True, 16))
    ]
    rates = SlotHitRates(even=0.5, by_curves=0.75, shared=0.25)
    slots = SlotsRow(share=0.5, slots=2, by_layer=[2], training=rates.model_copy(update={"even": 0.0}), evaluated=rates)
    assert summary_of([lru, belady], rows, [slots], 4) == [
        "lru: 1 of 4 experts per layer hit 0.500; the knee is at 2 (0.800); 64 tokens use 2.2 experts of a layer on average "
        "(90 %: 3).",
        "belady, which knows the future: 1 per layer hit 0.700, for which lru needs 2.",
        "A step that decodes 4, 16 sequences requests 2.2, 2.2 experts of a layer on average (90 %: 3, 3).",
        "2 slots (50%): 0.500 if every layer has the same, 0.750 if divided by the curves of training, 0.250 in one cache for "
        "all layers.",
    ]


def test_what_is_not_a_document_of_curves_is_refused(trace: Trace, tmp_path: Path) -> None:
    path = tmp_path / "curve.json"
    curves = run_curves(CurveStudy(trace=trace, part="test"))
    short = curves.curves[0].model_copy(update={"hits": [1]})
    knee = curves.curves[0].model_copy(update={"knee": 99})
    wrong = [curves.model_copy(update={"curves": each}).to_json() for each in ([], [short], [knee])]
    for text in ("[]", *wrong):
        path.write_text(text)
        with pytest.raises(TraceError, match="expected what 'specmoe curve TRACE --out DIR' writes"):
            read_curves(tmp_path)
    path.write_text(curves.to_json())
    assert isinstance(read_curves(path), CacheCurves)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--cache-fraction", "1.5"], "cache fraction 1.5: expected 0 to 1"),
        (["--training", "OTHER"], "MoE layers"),
        (["--out", "FILE"], "is not a folder"),
        (["--policy", "learned"], "policy 'learned': expected one of lru, fifo"),
    ],
)
def test_wrong_usage_is_one_clear_line(
    arguments: list[str],
    text: str,
    trace: Trace,
    make_trace: MakeTrace,
    random_problems: MakeProblems,
    runner: CliRunner,
    tmp_path: Path,
) -> None:
    other = make_trace(random_problems(count=2, tokens=3, layers=2, num_experts=20, top_k=2), 20, name="other")
    (tmp_path / "file").touch()
    places = {"OTHER": str(other.path), "FILE": str(tmp_path / "file")}
    done = runner.invoke(app, ["curve", str(trace.path), *(places.get(each, each) for each in arguments)])
    assert isinstance(done.exception, SpecmoeError)
    assert text in str(done.exception)


def test_numbers_of_tokens_are_positive(trace: Trace) -> None:
    with pytest.raises(SpecmoeError, match="window of 0 tokens: expected at least 1"):
        run_curves(CurveStudy(trace=trace, part="test", windows=(8, 0)))
    with pytest.raises(SpecmoeError, match="batch of -1 tokens: expected at least 1"):
        run_curves(CurveStudy(trace=trace, part="test", batch=-1))
