"""The section of single answers: what is embedded, and how much."""

from __future__ import annotations

import base64
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.traces import Problems, write_synthetic_trace
from tokenizers import Tokenizer

from analysis.analyze import analyze_trace, read_shown_answers
from analysis.documents.simulation import SimulatedDevice, SimulatedRow, Simulation
from analysis.documents.token_results import CachedProblem, SimulatedSample
from analysis.report.labels import sequence_texts
from analysis.report.sections.answers import answers_section, window_for
from analysis.statistics.compute import compute_statistics
from profiler.models.resolve import demo_model_folder
from profiler.trace.splits import problem_digests
from profiler.trace.writer import write_manifest

LAYERS, EXPERTS, TOP_K = 2, 300, 2
# Outcomes of five tokens, of which the trace has four.
OUTCOMES_TLK = np.array([[[1, 2], [3, 1]], [[1, 1], [1, 1]], [[3, 3], [2, 1]], [[0, 0], [1, 3]], [[1, 1], [1, 1]]])


def unpacked(data: dict[str, Any], problem: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a problem, as the page's script reads them."""
    content = gzip.decompress(base64.b64decode(problem["data"]))
    tokens, size = len(problem["tokens"]), len(problem["tokens"]) * LAYERS * TOP_K
    ids, weights, rest = content[: 2 * size], content[2 * size : 3 * size], content[3 * size :]
    shape = (tokens, LAYERS, TOP_K)
    arrays = {
        "ids": np.frombuffer(ids, "<u2").reshape(shape),
        "weights": np.frombuffer(weights, np.uint8).reshape(shape) / 255 * data["weightMax"],
    }
    return arrays | ({"results": np.frombuffer(rest, "<u2").reshape(shape)} if rest else {})


@pytest.fixture(autouse=True)
def no_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters take seconds, and are in another section."""
    monkeypatch.setattr("analysis.statistics.compute.cluster_experts", lambda *arguments: [])


def random_problems(count: int, tokens: int, experts: int) -> Problems:
    random = np.random.default_rng(0)
    return [
        (random.random((tokens, LAYERS, experts)).argsort(-1)[..., :TOP_K], random.random((tokens, LAYERS, TOP_K)))
        for _ in range(count)
    ]


def test_the_page_s_script_finds_what_the_trace_has(tmp_path: Path) -> None:
    problems = random_problems(3, 4, EXPERTS)
    trace = write_synthetic_trace(tmp_path / "trace", problems, EXPERTS, datasets=["a", "b", "b"], prompt_tokens=2)
    digest = problem_digests(trace)[2]
    sample = SimulatedSample(
        device=None, capacity=1, share=0.5, policy="lru", prefetch="none",
        problems=[CachedProblem.of(digest, np.arange(5), OUTCOMES_TLK)],
    )  # fmt: skip
    row = SimulatedRow(
        device=None, capacity=1, share=0.5, gigabytes=None, policy="lru", prefetch="none", hit_rate=0.5, tokens_per_second=None,
        times_on_demand=None,
    )  # fmt: skip
    devices = [SimulatedDevice(name=None, assumptions=[])]
    simulation = Simulation(trace="t", model="m", devices=devices, notes=[], best=[], rows=[row], sample=sample)
    shown = read_shown_answers(trace, simulations=[simulation])
    statistics = compute_statistics(trace, hops=1)
    data = answers_section(statistics, shown, [], [simulation]).data
    assert [problem["domain"] for problem in data["problems"]] == ["b", "a", "b"]
    assert [problem["marks"] for problem in data["problems"]] == [[True], [False], [False]]
    assert (data["first"], data["wide"], data["problems"][0]["generated"]) == (0, True, 2)
    for problem, number in zip(data["problems"], (2, 0, 1), strict=True):
        arrays, expected = unpacked(data, problem), trace.arrays(number)
        np.testing.assert_array_equal(arrays["ids"], expected.expert_ids_TLK)
        assert expected.weights_TLK is not None
        np.testing.assert_allclose(arrays["weights"], expected.weights_TLK, atol=0.002)
    np.testing.assert_array_equal(unpacked(data, data["problems"][0])["results"], OUTCOMES_TLK[:4])
    assert "results" not in unpacked(data, data["problems"][1])
    # Results of another model are not shown.
    other = sample.model_copy(update={"problems": [CachedProblem.of(digest, np.arange(4), np.ones((4, 3, 2), dtype=int))]})
    section = answers_section(statistics, shown, [], [simulation.model_copy(update={"sample": other})])
    assert not any(problem["marks"][0] for problem in section.data["problems"])


def test_margins_are_shown_where_logits_were_recorded(tmp_path: Path) -> None:
    import pyarrow as pa

    from profiler.trace.schema import values_schema
    from profiler.trace.writer import write_table

    ids = np.array([[[0, 1], [2, 3]], [[3, 1], [0, 1]]])
    trace = write_synthetic_trace(tmp_path / "trace", [(ids, np.full((2, 2, 2), 0.5))], 4)
    rows = [(0, layer, token, [4.0, 3.5, 0.5 * layer, token]) for token in range(2) for layer in range(2)]
    (trace.path / "logits").mkdir()
    columns = [pa.array(list(column)) for column in zip(*rows, strict=True)]
    schema = values_schema("logits", 4)
    table = pa.table([column.cast(field.type) for column, field in zip(columns, schema, strict=True)], schema=schema)
    write_table(trace.path / "logits" / "part-00000.parquet", table)
    write_manifest(trace.path)
    (answer,) = (each.answer for each in read_shown_answers(type(trace).open(trace.path)))
    assert answer.margins_TL is not None
    # The second largest logit, 3.5, minus the third: the larger one of half the layer and the token.
    assert answer.margins_TL.tolist() == [[3.5, 3.0], [2.5, 2.5]]


def test_texts_of_tokens_are_those_of_their_sequence() -> None:
    text = "naïve → 😀 end"
    ids = Tokenizer.from_file(str(demo_model_folder() / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    (texts,) = sequence_texts([ids], "demo")
    assert len(texts) == len(ids) > len(text)
    assert "".join(texts).strip() == text
    # What a trace should not have.
    assert sequence_texts([[10**9, -1, None, "x" * 500]], "demo") == [["#1000000000", "#-1", "?", "x" * 100]]
    assert sequence_texts([[5], []], "some/model") == [["#5"], []]


@pytest.mark.parametrize(
    ("layers", "experts", "top_k", "expected"),
    [(8, 8, 2, 256), (24, 32, 4, 256), (48, 128, 8, 68), (58, 256, 8, 37), (2000, 9, 8, 32)],
)
def test_large_models_have_room_for_fewer_tokens(layers: int, experts: int, top_k: int, expected: int) -> None:
    assert window_for(layers, experts, top_k) == expected


def test_answers_that_do_not_fit_are_left_out_but_one_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = write_synthetic_trace(tmp_path / "trace", random_problems(5, 9, 8), 8)
    statistics, shown = compute_statistics(trace), read_shown_answers(trace)
    assert len(answers_section(statistics, shown, [], []).data["problems"]) == 5
    monkeypatch.setattr("analysis.report.sections.answers.MAX_TEXT", 300)
    assert 1 < len(answers_section(statistics, shown, [], []).data["problems"]) < 5
    monkeypatch.setattr("analysis.report.sections.answers.MAX_TEXT", 1)
    section = answers_section(statistics, shown, [], [])
    assert section.headline.startswith("1 of 5 problems")


def test_a_trace_without_texts_or_problems_is_shown_too(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    trace = write_synthetic_trace(
        tmp_path / "trace", [(random.random((9, 2, 8)).argsort(-1)[..., :2], random.random((9, 2, 2)))], 8
    )
    for name in ("problems.parquet", "tokens.parquet"):
        (trace.path / name).unlink()
    write_manifest(trace.path)
    _, findings = analyze_trace(type(trace).open(trace.path), tmp_path / "out", hops=1)
    assert findings[0][1].startswith("1 of 1 problem, from 1 dataset")
