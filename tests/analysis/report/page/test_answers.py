"""The answer view in a real browser: its tests share one loaded page, each beginning with another problem."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.browser import Opened

from profiler.trace.reader import Trace

pytestmark = pytest.mark.browser


def problem_of(report: Path, number: int) -> Any:
    return Trace.open(report.parent / "trace").arrays(number)


def choose(view: Opened, number: int) -> None:
    """Choose the problem of the trace with this number, at the first layer."""
    order = view.page.evaluate("answers.data.problems.map((problem) => problem.prompt)")
    view.page.locator("#answer-show").select_option("-1")
    view.page.locator("#answer-search").fill("")
    view.page.locator("#answer-problem").select_option(str(order.index(f"prompt {number}")))
    view.page.wait_for_function(f"answers.cells.problem.prompt === 'prompt {number}'")
    view.page.locator("#answer-layer").fill("0")


def detail(view: Opened) -> str:
    return view.page.locator("#answer-detail").inner_text()


def test_problems_are_found_by_dataset_and_text(view: Opened) -> None:
    choose(view, 0)
    options = view.page.locator("#answer-problem option")
    assert options.count() == 10
    view.page.locator("#answer-search").fill("math prompt")
    assert sorted(options.all_inner_texts()) == ["math: prompt 1", "math: prompt 4", "math: prompt 7"]
    # The chosen one is not among them any more.
    view.page.wait_for_function("answers.cells.problem.domain === 'math'")
    view.page.locator("#answer-search").fill("no such text")
    assert options.count() == 0
    assert "No problem" in detail(view)
    view.page.locator("#answer-search").fill("")
    assert options.count() == 10


def test_the_text_has_the_colors_of_the_layer_s_experts(view: Opened, report: Path) -> None:
    choose(view, 3)
    ids_TLK = problem_of(report, 3).expert_ids_TLK
    spans = "[...document.querySelectorAll('#answer-text span')]"
    texts = view.page.evaluate(f"{spans}.map((span) => span.textContent)")
    assert len(texts) == 60
    assert all(text.startswith("#") for text in texts)
    for layer in (0, 4):
        view.page.locator("#answer-layer").fill(str(layer))
        # Decoder layers 1 to 5.
        assert view.page.locator("#answer-layer-name").inner_text() == str(layer + 1)
        colors = view.page.evaluate(f"{spans}.map((span) => span.style.background)")
        strongest = ids_TLK[:, layer, 0].tolist()
        # One color for each expert, and no two of the same.
        assert len(set(zip(strongest, colors, strict=True))) == len(set(strongest)) == len(set(colors))
        chips = view.page.locator("#answer-legend button").all_inner_texts()
        most = max(set(strongest), key=lambda expert: (strongest.count(expert), -expert))
        assert chips[0] == f"expert {most}: {100 * strongest.count(most) / 60:.0f}%"
    # An expert of the legend marks the tokens that use it.
    view.page.locator("#answer-legend button").first.click()
    shown = view.page.evaluate(f"{spans}.map((span) => !span.classList.contains('dim'))")
    assert shown == (ids_TLK[:, 4] == most).any(axis=1).tolist()


def test_pointing_shows_the_experts_of_a_cell(view: Opened, report: Path) -> None:
    choose(view, 2)
    ids_TLK = problem_of(report, 2).expert_ids_TLK
    view.page.locator("#answer-matrix").scroll_into_view_if_needed()
    box = view.page.locator("#answer-matrix canvas").bounding_box()
    assert box is not None
    geometry = view.page.evaluate("answers.matrix.geometry")
    view.page.mouse.move(box["x"] + geometry["label"] + 2.5 * geometry["cell"], box["y"] + 20 + 18 * 5.5)
    first, second = ids_TLK[5, 2]
    assert re.search(rf"token 5 \(generated\), layer 3: experts and weights\s+{first} 0\.75\s+{second} 0\.25", detail(view))
    # The text keeps the chosen layer, and marks the token.
    assert view.page.locator("#answer-layer-name").inner_text() == "1"
    assert view.page.locator("#answer-text span.current").get_attribute("data-token") == "5"
    view.page.mouse.click(box["x"] + geometry["label"] + 2.5 * geometry["cell"], box["y"] + 20 + 18 * 5.5)
    assert view.page.locator("#answer-layer-name").inner_text() == "3"
    view.page.locator("#answer-text span").nth(9).hover()
    assert f"{ids_TLK[9, 2, 0]} 0.75" in detail(view)
    # With the keyboard alone, to rows that are out of view.
    view.page.locator("#answer-matrix").focus()
    for key in ["ArrowRight", *["ArrowDown"] * 40]:
        view.page.keyboard.press(key)
    assert "token 49" in detail(view)
    assert f"{ids_TLK[49, 3, 0]} 0.75" in detail(view)
    assert view.page.locator("#answer-matrix").evaluate("element => element.scrollTop") > 400


def test_predictions_and_the_cache_are_shown_with_the_text(view: Opened, report: Path) -> None:
    choose(view, 0)
    results = json.loads(
        view.page.evaluate(
            "const cells = answers.cells; JSON.stringify([0, 1, 2, 3, 4].map((layer) => [...Array(60).keys()].map((token) => "
            "{cells.overlay = 0; const found = cells.marks(token, layer); cells.overlay = null; return found;})))"
        )
    )
    assert all(marks is None for marks in results[0])
    right = np.mean([mark == "right" for layer in results[1:] for marks in layer for mark in marks])
    view.page.locator("#answer-show").select_option("0")
    legend = view.page.locator("#answer-legend .chip").all_inner_texts()
    assert legend[0] == f"right {int(100 * right + 0.5)}% in this answer"
    assert "no result for this token and layer" in detail(view)
    view.page.locator("#answer-layer").fill("1")
    assert re.search(r"(right|missed)", detail(view))
    view.page.locator("#answer-show").select_option("1")
    view.page.locator("#answer-layer").fill("0")
    assert view.page.locator("#answer-legend .chip").all_inner_texts() == [
        "hit 98% at this layer, 100% in this answer",
        "late 1% at this layer, 0% in this answer",
        "demand-loaded 1% at this layer, 0% in this answer",
    ]
    view.page.locator("#answer-text span").nth(0).hover()
    view.page.locator("#answer-text span").nth(1).hover()
    assert re.search(r"0\.75 late\s+\d 0\.25 demand-loaded", detail(view))
    # Another problem has no results of the cache.
    choose(view, 5)
    view.page.locator("#answer-show").select_option("1")
    assert "no results for this problem" in view.page.locator("#answer-legend").inner_text()


def test_every_color_can_be_read_in_light_and_dark(view: Opened) -> None:
    contrast = """(isDark) => {
      document.documentElement.dataset.theme = isDark ? "dark" : "light";
      const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1});
      const paint = canvas.getContext("2d", {willReadFrequently: true});
      const luminance = (color) => {
        paint.fillStyle = color;
        paint.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3).map((byte) => byte / 255)
          .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const ink = luminance(pageColor("ink"));
      return [...Array(256).keys()].map((rank) => {
        const back = luminance(expertColor(rank, isDark));
        return (Math.max(ink, back) + 0.05) / (Math.min(ink, back) + 0.05);
      });
    }"""
    for is_dark in (False, True):
        # The ratio that WCAG requires of text.
        assert min(view.page.evaluate(contrast, is_dark)) >= 4.5
    assert view.page.evaluate("new Set([...Array(256).keys()].map((rank) => expertColor(rank, false))).size") == 256


def test_the_first_generated_token_is_in_view(view: Opened) -> None:
    """It is chosen at first, and a long prompt must not hide it."""
    # What is under the pointer would be chosen instead.
    view.page.mouse.move(0, 0)
    choose(view, 8)
    row = "(answers.token + 1) * AnswerMatrix.ROW - answers.matrixElement.scrollTop"
    assert view.page.evaluate("answers.matrixElement.scrollTop") == 0
    view.page.evaluate("answers.cells.problem.generated = 55")
    view.page.evaluate("answers.choose(answers.number)")
    assert view.page.evaluate("answers.token") == 55
    assert view.page.evaluate("answers.matrixElement.scrollTop") > 0
    assert 0 < view.page.evaluate(row) <= view.page.evaluate("answers.matrixElement.clientHeight - AnswerMatrix.HEADER")
    view.page.evaluate("answers.cells.problem.generated = 1")
    view.page.evaluate("answers.choose(answers.number)")
    assert view.page.evaluate("answers.matrixElement.scrollTop") == 0
