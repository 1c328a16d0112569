"""A document that was damaged or tampered with is read and shown, or refused in one line that names the file."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from support.traces import write_synthetic_trace

from analysis.documents.curves import CacheCurves, HitRateCurve, SlotHitRates, SlotsRow, read_curves
from analysis.documents.evaluation import budget_table, read_evaluation, table
from analysis.documents.fit_report import Fit, FitWay, MemoryUse, read_fit
from analysis.documents.simulation import SimulatedDevice, SimulatedRow, Simulation, read_simulation
from analysis.documents.statistics import read_statistics
from analysis.documents.token_results import CachedProblem, SimulatedSample
from analysis.report.sections.offload import offload_section
from analysis.report.sections.predictability import predictions_section
from analysis.statistics.compute import compute_statistics
from profiler.errors import SpecmoeError, TraceError
from speculation.data.tasks import Task
from speculation.evaluation.evaluate import evaluate
from speculation.evaluation_tables import print_evaluation
from speculation.training.fit import train
from vllm_patch.check.results import CheckDocument, JobResult, Verdict, read_check
from vllm_patch.check.table import csv_table, markdown_table

# What is put in the place of a value. The texts are not values of JSON, or only of some readers.
ODD: list[Any] = [None, True, -1, 0, 10**30, 0.5, "", "x", "1", "h=2", "\ud800", "a\nb", [], {}, [[]], {"x": None}, [None]]
TEXTS = {"NaN": '"<NaN>"', "1e999": '"<inf>"', "[" * 500: '"<deep>"', "9" * 5000: '"<digits>"'}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a document."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(each for key, inner in below for each in places(inner, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> bytes:
    """The document with one to three values replaced, removed, renamed or repeated; or cut off."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(places(document)[1:] or [("x",)]))
        holder = document
        for key in path:
            holder = holder[key]
        if last not in holder and not isinstance(holder, list):
            break
        how = draw(st.sampled_from(["replace", "remove", "rename", "repeat"]))
        if how == "remove":
            del holder[last]
        elif how == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["x", "by_x", "h=2", "a\nb"]))] = holder.pop(last)
        elif how == "repeat" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[last]))
        else:
            holder[last] = draw(st.sampled_from([*ODD, *(text.strip('"') for text in TEXTS.values())]))
    text = json.dumps(document)
    for written, stands_for in TEXTS.items():
        text = text.replace(stands_for, written)
    content = text.encode("ascii")
    return content[: draw(st.integers(0, len(content)))] if draw(st.integers(0, 9)) == 0 else content


def show_evaluation(path: Path) -> None:
    document = read_evaluation(path)
    print_evaluation(document)
    table(document)
    budget_table(document)
    predictions_section(document, 1)
    for problem in document.sample:
        problem.predicted(layers=2, top_k=2, num_experts=4)
    document.to_json()


def show_simulation(path: Path) -> None:
    document = read_simulation(path)
    for device in document.devices:
        offload_section(document, device.name, "1")
    for problem in document.sample.problems if document.sample else ():
        problem.outcomes(layers=2, top_k=2)
    document.to_json()


def show_curves(path: Path) -> None:
    document = read_curves(path)
    assert all(len(curve.hit_rates) == len(curve.sizes) for curve in document.curves)
    document.to_json()


def show_check(path: Path) -> None:
    document = read_check(path)
    markdown_table([document])
    csv_table([document])


Show = Callable[[Path], Any]
SHOW: dict[str, Show] = {
    "evaluation": show_evaluation,
    "simulation": show_simulation,
    "curves": show_curves,
    "fit": lambda path: read_fit(path).to_json(),
    "statistics": lambda path: read_statistics(path).to_json(),
    "check": show_check,
}


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A sound document of each kind, as JSON values."""
    folder = tmp_path_factory.mktemp("documents")
    random = np.random.default_rng(0)
    problems = [
        (random.random((6, 2, 4)).argsort(-1)[..., :2], np.tile([0.7, 0.3], (6, 2, 1))) for _ in range(14)
    ]  # fmt: skip
    trace = write_synthetic_trace(folder / "trace", problems, 4)
    run = train(trace, "conditional-counts", folder / "run", task=Task.NEXT_TOKEN, horizon=2)
    row = SimulatedRow(
        device="gpu", capacity=1, share=0.5, gigabytes=1.0, policy="lru", prefetch="none", hit_rate=0.5,
        tokens_per_second=2.0, times_on_demand=1.5,
    )  # fmt: skip
    larger = row.model_copy(update={"share": 1.0, "policy": "belady"})
    devices = [SimulatedDevice(name="gpu", assumptions=["a link"])]
    cached = CachedProblem.of(1, np.arange(2), np.array([[[1, 2], [3, 0]], [[1, 1], [2, 2]]]))
    sample = SimulatedSample(device="gpu", capacity=1, share=0.5, policy="lru", prefetch="none", problems=[cached])
    rates = SlotHitRates(even=0.1, by_curves=0.2, shared=0.3)
    slots = SlotsRow(share=0.5, slots=2, by_layer=[1, 1], training=rates, evaluated=rates)
    curve = HitRateCurve(policy="lru", is_global=False, is_exact=True, sizes=[0, 4], hits=[0, 9], requested=12, knee=4)
    memory = MemoryUse(
        device=8, usable=7, dense=1, kv_cache=1, reserve=1, left=4, experts=8, expert_bytes=1e6, slots=2, layers=2,
        experts_per_layer=4, share=0.5,
    )  # fmt: skip
    documents: dict[str, BaseModel] = {
        "evaluation": evaluate(run, trace, part="all", with_baselines=False, with_sample=True),
        "simulation": Simulation(
            trace="t", model="m", devices=devices, notes=["n"], best=[row], rows=[row, larger], sample=sample
        ),
        "curves": CacheCurves(
            trace="t", model="m", moe_layers=[0, 1], num_experts=4, top_k=2, part="test", problems=1, tokens=6, decode_tokens=5,
            batch=1, training_problems=None, summary=["s"], notes=[], curves=[curve], working_sets=[], slots=[slots],
        ),
        "fit": Fit(
            model="m", precision="bf16", device="gpu", host="cpu", context=9, batch=1, kv_bits=16, trace=None, memory=memory,
            union=2.0, union_source="computed", ways=[FitWay(name="cache", tokens_per_second=1.0)], warnings=[], assumptions=[],
        ),
        "statistics": compute_statistics(trace).to_document(),
        "check": CheckDocument(
            device="cpu", versions={"vllm": "0"}, command=["check"], began="2026-01-01",
            jobs=[JobResult(model="a/b", mode="eager", dtype="x", verdict=Verdict.exact, detail="", input_difference=0.1)],
        ),
    }  # fmt: skip
    return {kind: json.loads(document.model_dump_json(by_alias=True)) for kind, document in documents.items()}


@pytest.mark.parametrize("kind", SHOW)
def test_a_sound_document_is_shown(kind: str, documents: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "document.json").write_text(json.dumps(documents[kind]))
    SHOW[kind](tmp_path / "document.json")


@pytest.mark.parametrize("kind", SHOW)
def test_a_mutated_document_is_shown_or_refused_in_one_line(
    kind: str, documents: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp(kind) / "document.json"

    @settings(max_examples=60)
    @given(content=mutated(documents[kind]))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            SHOW[kind](path)
        except SpecmoeError as error:
            refused = str(error)
        else:
            return
        assert refused.startswith(f"{path}: ")
        assert refused.isprintable()

    check()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"by_phase": [1]}, "by_phase"),
        ({"by_phase": {"decode": {"recall@2": "high"}}}, "by_phase: decode.recall@2"),
        ({"by_looping": {"false": {"exact": 1.0}, "true": {}}}, "by_looping: false lacks recall@2"),
        ({"metrics": {"h=1": {}}}, "lacks"),
        ({"metrics": {"h=2": {}}}, "metrics of h=2, expected of h=1"),
        ({"budget": {"h=1": [{"m": 0, "recall": 0, "coverage": 0, "mass": 0}]}}, "budget.h=1.0.m"),
    ],
)
def test_the_field_of_an_evaluation_is_named(
    change: dict[str, Any], field: str, documents: dict[str, Any], tmp_path: Path
) -> None:
    document = copy.deepcopy(documents["evaluation"])
    for result in document["results"].values():
        result |= change
    (tmp_path / "evaluation.json").write_text(json.dumps(document))
    with pytest.raises(TraceError, match=re.escape(field)):
        read_evaluation(tmp_path)
