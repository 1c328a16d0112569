"""Figures for papers: files of every figure, text as text, and the numbers of the statistics."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from support.traces import MakeProblems, MakeTrace, write_synthetic_trace
from typer.testing import CliRunner

from analysis.documents.statistics import ComparisonDocument, StatisticsDocument
from analysis.report.figure_data import figure_rows
from analysis.report.figures import CHANCE, Curve, drawing, heat_map, lines
from analysis.report.sections.cache_sizes import cache_sizes_section
from analysis.report.sections.flow import flow_section
from analysis.report.sections.groups import domains_section
from analysis.report.sections.load import load_section
from analysis.report.sections.locality import reuse_section
from analysis.report.sections.working_set import working_set_section
from analysis.statistics.compute import compute_statistics
from profiler.errors import missing_extra
from profiler.trace.reader import Trace
from specmoe import app

EVIL = "a</script> $x_1$ & b"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StatisticsDocument]:
    """The figures of sections with every kind of figure, and the statistics."""
    pytest.importorskip("matplotlib")
    from analysis.report import paper_figures

    folder = tmp_path_factory.mktemp("figures")
    random = np.random.default_rng(0)
    problems = []
    for _ in range(12):
        ids = np.argsort(random.random((20, 9, 8)), axis=2)[:, :, :2]
        ids[:, 1::2, 0] = ids[:, ::2, 0][:, :4]
        ids[:, :, 1] = (ids[:, :, 0] + random.integers(1, 8, (20, 9))) % 8
        problems.append((ids, np.tile([0.75, 0.25], (20, 9, 1))))
    trace = write_synthetic_trace(folder / "trace", problems, 8, datasets=[EVIL, "math"] * 6)
    found = compute_statistics(trace, hops=1)
    assert found.working_set is not None
    sections = [
        load_section(found, []),
        flow_section(found),
        reuse_section(found),
        cache_sizes_section(found),
        working_set_section(found.working_set, 8),
        domains_section(found),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper_figures, "DPI", 50)
        paths = paper_figures.write_figures(sections, folder / "figures")
    assert len(paths) == 3 * sum(len(section.figures) for section in sections)
    return folder / "figures", found.to_document()


@pytest.fixture
def trace(make_trace: MakeTrace, random_problems: MakeProblems) -> Trace:
    return make_trace(random_problems(count=2, tokens=5, layers=1, num_experts=3, top_k=1), 3)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_figure_has_its_files(written: tuple[Path, StatisticsDocument]) -> None:
    folder, _ = written
    names = {path.stem for path in folder.iterdir()}
    assert {"load-map", "flow", "reuse-gap", "cache-sizes", "working-set", "domain-layers"} <= names
    assert {path.name for path in folder.iterdir()} == {f"{name}.{kind}" for name in names for kind in ("csv", "png", "svg")}
    for name in names:
        root = ElementTree.parse(folder / f"{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        # One column wide, in points; letters are letters, not outlines.
        assert float(root.attrib["width"].removesuffix("pt")) == pytest.approx(3.4 * 72, rel=0.01)
        assert any(element.text and element.text.strip() for element in root.iter("{http://www.w3.org/2000/svg}text"))
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert len(table(folder / f"{name}.csv")) > 1


def test_the_tables_have_the_numbers_of_the_statistics(written: tuple[Path, StatisticsDocument]) -> None:
    folder, document = written
    load = {(int(row["layer"]), int(row["expert"])): float(row["x even"]) for row in table(folder / "load-map.csv")}
    assert len(load) == 9 * 8
    for (layer, expert), value in load.items():
        share = document.load[0].share_LE[layer][expert]
        assert share is not None
        assert value == pytest.approx(8 * share, abs=1e-4)
    evenness = [float(row["entropy / maximum"]) for row in table(folder / "load-evenness.csv")]
    assert evenness == pytest.approx(document.load[0].entropy_share, abs=1e-5)
    flow = table(folder / "flow.csv")
    links = [(each, n) for each in document.flow for n in range(len(each.earlier))]
    assert len(flow) == len(links)
    for row, (each, n) in zip(flow, links, strict=True):
        assert (int(row["from_layer"]), int(row["to_layer"])) == (each.layer, each.layer + 1)
        assert (int(row["expert"]), int(row["next_expert"])) == (each.earlier[n], each.later[n])
        assert float(row["share"]) == pytest.approx(each.share[n], abs=1e-6)
    assert document.cache_sizes is not None
    misses = table(folder / "cache-sizes.csv")
    assert [int(row["slots of each layer's cache"]) for row in misses] == document.cache_sizes.sizes
    for place, row in enumerate(misses):
        popular = [by_size[place] for by_size in document.cache_sizes.popular]
        mean = math.fsum(value for value in popular if value is not None) / len(popular)
        assert float(row["most used experts of the trace, always kept"]) == pytest.approx(mean, abs=1e-5)
    assert document.working_set is not None
    drawn = [row["last 8 tokens"] for row in table(folder / "working-set.csv")]
    for text, expected in zip(drawn, document.working_set.distinct[0], strict=True):
        assert (float(text) if text else None) == pytest.approx(expected, abs=1e-5)


def test_untrusted_names_are_text(written: tuple[Path, StatisticsDocument]) -> None:
    folder, _ = written
    root = ElementTree.parse(folder / "domain-layers.svg").getroot()
    said = " ".join("".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text"))
    assert EVIL in " ".join(said.split())


def test_figures_of_a_comparison(make_trace: MakeTrace, random_problems: MakeProblems, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    traces = [
        make_trace(random_problems(count=6, tokens=20, layers=1, num_experts=4, top_k=1, seed=seed), 4, name=name)
        for seed, name in enumerate(("one", "two"))
    ]
    command = [
        "analyze",
        *(str(trace.path) for trace in traces),
        "--out",
        str(tmp_path / "r"),
        "--figures",
        str(tmp_path / "f"),
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "f" / "differences-moved-1.svg").is_file()
    document = ComparisonDocument.model_validate_json((tmp_path / "r" / "statistics.json").read_text())
    (difference,) = document.differences
    for row in table(tmp_path / "f" / "differences-map-1.csv"):
        layer, expert = int(row["layer"]), int(row["expert"])
        for column, values in (("difference", difference.share), ("low", difference.low), ("high", difference.high)):
            assert float(row[column]) == pytest.approx(values[layer][expert], abs=1e-6)


def test_rows_of_each_kind_of_figure() -> None:
    drawn = lines([Curve("a & b", [0.5, float("nan")]), Curve("c", [1.0, 2.0], CHANCE)], [3, 4], "hop", "recall")
    assert figure_rows(drawn) == [("hop", "a & b", "c"), (3, 0.5, 1.0), (4, None, 2.0)]
    cells = heat_map(np.array([[0.0, 0.25]]), ["x<br>y", 7], ["&lt;"], "expert", "layer", "share", "")
    assert figure_rows(cells) == [("layer", "expert", "share"), ("<", "x y", 0.0), ("<", 7, 0.25)]
    intervals = drawing(cells, "name", "description", rows=[("own",), (1,)])
    assert intervals.rows == [("own",), (1,)]


def test_the_report_is_opened(trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address))
    done = CliRunner().invoke(app, ["analyze", str(trace.path), "--out", str(tmp_path / "a r"), "--open"])
    assert done.exit_code == 0, done.output
    assert opened == [(tmp_path / "a r" / "report.html").as_uri()]
    assert "no browser was found to open the report" in done.output


def test_without_matplotlib_nothing_is_computed(trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "analysis.report.paper_figures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command = ["analyze", str(trace.path), "--out", str(tmp_path / "r"), "--figures", str(tmp_path / "f")]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, ModuleNotFoundError)
    assert "pip install 'speculative-moe[figures]'" in missing_extra(done.exception)
    assert not (tmp_path / "r").exists()
