"""What a page costs in bytes, and that its parts are what they are said to be."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.frames import counted, make_axes, make_frame

from analysis.counts.answers import Answer
from analysis.counts.counting import TraceCounts
from analysis.report import write_report
from analysis.report.figures import COLORS, DASHES, Curve, lines
from analysis.report.sections.answers import ShownAnswer, window_for
from analysis.statistics.compute import Source, Statistics, make_statistics
from profiler.trace.schema import Metadata, ModelMetadata


def statistics_of(layers: int, experts: int, top_k: int, tokens: int, hops: int) -> Statistics:
    """Routing in which everything is used: no table is sparse."""
    random = np.random.default_rng(0)
    axes = make_axes(layers, experts, top_k, hops=hops, datasets=("a", "b"), vocabulary=tuple(range(400)))
    counts = TraceCounts(axes)
    # The same for every layer but turned, which is as hard to compress and quicker to draw.
    one = np.argpartition(random.random((tokens, experts)), top_k, axis=1)[:, :top_k]
    ids = np.stack([(one * (2 * n + 1) + n) % experts for n in range(layers)], axis=1)
    problems = np.split(ids, 20)
    vocab = [random.integers(0, 401, len(problem)) for problem in problems]
    frame = make_frame(problems, experts, datasets=[0, 1] * 10, vocab=vocab)
    for part in counts.parts.values():
        counted(part, [frame])
    model = ModelMetadata(id="synthetic", moe_layers=list(range(layers)), num_experts=experts, top_k=top_k)
    return make_statistics(counts, Source("synthetic", Metadata(model=model, engine="none", hook="none"), ()))


def embedded(page: str, kind: str) -> dict[str, Any]:
    found = re.search(rf'<script type="application/json" id="data-{kind}">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    document: dict[str, Any] = json.loads(found.group(1))
    return document


def answers_of(layers: int, experts: int, top_k: int) -> list[ShownAnswer]:
    """More answers than fit into a page, with weights and margins."""
    random = np.random.default_rng(0)
    tokens = window_for(layers, experts, top_k)
    shape = (tokens, layers, top_k)
    return [
        ShownAnswer(
            Answer(
                problem_id=number,
                digest=number,
                domain="ab"[number % 2],
                prompt="a prompt " * 30,
                recorded=1000,
                token_ids_T=np.arange(tokens),
                keys=[None] * tokens,
                is_decode_T=np.arange(tokens) > 9,
                expert_ids_TLK=random.integers(0, experts, shape),
                weights_TLK=random.random(shape),
                margins_TL=random.random(shape[:2]),
            ),
            [f" token{each}" for each in range(tokens)],
        )
        for number in range(48)
    ]


def test_48_layers_of_128_experts_are_below_10_mb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Clusters take half a minute and a few lines of the page.
    monkeypatch.setattr("analysis.statistics.compute.cluster_experts", lambda *arguments: [])
    statistics = statistics_of(48, 128, 8, 3000, 4)
    labels = [f"token {number}" for number in range(400)]
    write_report(statistics, tmp_path / "report.html", labels, answers=answers_of(48, 128, 8))
    assert (tmp_path / "report.html").stat().st_size < 10_000_000
    page = (tmp_path / "report.html").read_text()
    data = embedded(page, "transitions")
    assert 1 <= data["hops"] < 4
    assert f"Hops beyond {data['hops']} would make this page too large" in page
    matrices = np.frombuffer(gzip.decompress(base64.b64decode(data["matrices"])), dtype=np.uint8)
    expected = np.concatenate([statistics.probabilities[k - 1, : 48 - k].ravel() for k in range(1, data["hops"] + 1)])
    # `pytest.approx` would compare two million numbers one by one.
    assert np.abs((matrices / 255) ** 2 - expected).max() < 0.005
    assert len(embedded(page, "load")["tokens"]) == 48
    # Not all of the answers fit; those that do show most of what there is room for.
    assert 16 <= len(embedded(page, "answers")["problems"]) < 48


def test_hops_that_do_not_fit_are_left_out_but_never_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.report.sections.transitions.MAX_MATRIX_TEXT", 10)
    write_report(statistics_of(4, 8, 2, 400, 3), tmp_path / "report.html", [""] * 400)
    assert embedded((tmp_path / "report.html").read_text(), "transitions")["hops"] == 1


def test_lines_differ_in_color_and_in_dash() -> None:
    """Eight lines: no two look alike, in color or printed in gray with its neighbor."""
    figure = lines([Curve(str(number), [0.0]) for number in range(8)], [0], "x", "y")
    styles = [(trace.line.color, trace.line.dash) for trace in figure.data]
    assert len(set(styles)) == 8
    assert all(first[1] != second[1] for first, second in itertools.pairwise(styles))
    assert len(set(COLORS)) == 7
    assert len(set(DASHES)) == 4
