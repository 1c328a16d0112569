"""The report in a real browser: from disk, offline, without a word on the console, and what moves does move."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser
from support.browser import Opened

from analysis.analyze import compare_traces
from profiler.trace.reader import Trace
from speculation.offload.curves.curve_page import write_curves
from speculation.offload.curves.curve_study import CurveStudy, run_curves

pytestmark = pytest.mark.browser


def test_opens_offline_in_silence_and_runs_nothing_untrusted(browser: Browser, report: Path) -> None:
    opened = Opened(browser, report / "report.html")
    opened.page.wait_for_timeout(500)
    assert opened.complaints == []
    assert opened.page.evaluate("window.hacked") is None
    sections = opened.page.locator("section")
    assert sections.count() == 16
    for number in range(sections.count()):
        assert len(sections.nth(number).locator(".headline").inner_text()) > 20
    # Every figure has drawn something, and has words for those who do not see it.
    drawn = opened.page.evaluate(
        "[...document.querySelectorAll('.figure')].map((f) => [f.querySelectorAll('.trace, .hm').length, f.ariaLabel.length])"
    )
    assert len(drawn) >= 14
    assert all(traces > 0 and words > 10 for traces, words in drawn)
    opened.page.close()


def test_sliders_show_every_layer_and_hop(browser: Browser, report: Path) -> None:
    with np.load(report / "transitions.npz", allow_pickle=False) as stored:
        probabilities = stored["probabilities"]
    opened = Opened(browser, report / "report.html")
    opened.page.wait_for_function("document.getElementById('hop').max === '3'")
    before = opened.picture("transition-matrix")
    # Decoder layers 1 to 5; 255 steps of the square root are at most 1/255 apart near 1.
    assert opened.matrix() == pytest.approx(probabilities[0, 0], abs=0.005)
    assert opened.move("layer", 2) == "layer 3 → layer 4 (hop 1)"
    assert opened.matrix() == pytest.approx(probabilities[0, 2], abs=0.005)
    after = opened.picture("transition-matrix")
    assert after != before
    assert opened.move("hop", 2) == "layer 3 → layer 5 (hop 2)"
    assert opened.matrix() == pytest.approx(probabilities[1, 2], abs=0.005)
    assert opened.picture("transition-matrix") != after
    # Three hops ahead there are two starting layers: the slider stays within them.
    assert opened.move("hop", 3) == "layer 2 → layer 5 (hop 3)"
    assert opened.matrix() == pytest.approx(probabilities[2, 1], abs=0.005)
    # With the keyboard alone.
    opened.page.locator("#hop").press("ArrowLeft")
    assert opened.page.locator("#transition-label").inner_text().endswith("(hop 2)")
    assert opened.complaints == []
    opened.page.close()


def test_a_span_of_layers_is_chosen(browser: Browser, report: Path) -> None:
    """Of five layers, four are shown at a time once the reader chooses so; the slider then has two places."""
    opened = Opened(browser, report / "report.html")
    figure = opened.page.locator("#flow")
    figure.scroll_into_view_if_needed()
    opened.page.wait_for_function("document.getElementById('flow').layout?.xaxis?.range?.length === 2")

    def shown() -> list[float]:
        return [float(end) for end in opened.page.evaluate("document.getElementById('flow').layout.xaxis.range")]

    assert shown() == pytest.approx([-0.3, 4.3])
    assert figure.locator(".slider-rail-touch-rect").count() == 0
    figure.locator(".updatemenu-header").click()
    figure.locator(".updatemenu-dropdown-button").first.click()
    rail = figure.locator(".slider-rail-touch-rect")
    rail.wait_for()
    assert shown() == pytest.approx([-0.3, 3.3])
    box = rail.bounding_box()
    assert box is not None
    opened.page.mouse.click(box["x"] + box["width"] - 2, box["y"] + box["height"] / 2)
    opened.page.wait_for_function("document.getElementById('flow').layout.xaxis.range[0] > 0")
    assert shown() == pytest.approx([0.7, 4.3])
    assert figure.locator(".slider-label").first.text_content() == "layers 2 to 5"
    # In the page's other colors it is the same span.
    button = opened.page.locator("#theme")
    for _ in range(2):
        button.click()
        assert shown() == pytest.approx([0.7, 4.3])
        assert figure.locator(".slider-label").first.text_content() == "layers 2 to 5"
        assert figure.locator(".updatemenu-header").text_content() == "4 layers"
    assert opened.complaints == []
    opened.page.close()


def test_the_expert_under_the_pointer_shows_its_tokens(browser: Browser, report: Path) -> None:
    opened = Opened(browser, report / "report.html")
    first = opened.page.locator("#cloud").inner_text()
    assert first.startswith("Layer ")
    opened.page.locator("#load-map").scroll_into_view_if_needed()
    box = opened.page.locator("#load-map .nsewdrag").first.bounding_box()
    assert box is not None
    # Expert 7 of decoder layer 3, third of five.
    opened.page.mouse.move(box["x"] + box["width"] * 7.5 / 8, box["y"] + box["height"] * 2.5 / 5)
    opened.page.wait_for_function("document.getElementById('cloud').innerText.startsWith('Layer 3, expert 7 ')")
    assert "#4" in opened.page.locator("#cloud").inner_text()
    assert opened.complaints == []
    opened.page.close()


@pytest.mark.parametrize("page", ["report.html", "comparison"])
def test_fits_on_a_phone_and_on_paper(browser: Browser, report: Path, page: str, tmp_path: Path) -> None:
    path = report / "report.html"
    if page == "comparison":
        trace = Trace.open(report.parent / "trace")
        compare_traces([trace, trace], tmp_path / "compared", hops=2)
        path = tmp_path / "compared" / "report.html"
    opened = Opened(browser, path, width=390)
    opened.page.wait_for_timeout(300)
    width = "[...document.querySelectorAll('.main-svg')].map((svg) => svg.getBoundingClientRect().right)"
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert max(opened.page.evaluate(width)) <= 390
    opened.page.set_viewport_size({"width": 1300, "height": 800})
    opened.page.wait_for_function("document.querySelector('.main-svg').getBoundingClientRect().width > 800")
    opened.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert {round(number) for number in opened.page.evaluate(width.replace("right", "width"))} == {680}
    opened.page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    opened.page.wait_for_function("document.querySelector('.main-svg').getBoundingClientRect().width > 800")
    assert opened.page.pdf(format="A4").startswith(b"%PDF")
    assert opened.complaints == []
    opened.page.close()


def test_the_page_of_curves_fits(browser: Browser, report: Path, tmp_path: Path) -> None:
    write_curves(run_curves(CurveStudy(trace=Trace.open(report.parent / "trace"), part="all")), tmp_path)
    opened = Opened(browser, tmp_path / "curve.html", width=420)
    right = (
        "[...document.querySelectorAll('.main-svg, .gtitle, .legendtext')].map((each) => each.getBoundingClientRect().right)"
    )
    opened.page.wait_for_timeout(300)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 420
    assert max(opened.page.evaluate(right)) <= 420
    opened.page.set_viewport_size({"width": 1000, "height": 800})
    opened.page.wait_for_function("document.querySelector('.main-svg').getBoundingClientRect().width > 900")
    # Curves of both caches with their knees and of Belady's policy; a heat map without slots; working sets.
    drawn = opened.page.evaluate("[...document.querySelectorAll('.js-plotly-plot')].map((plot) => plot.data.length)")
    assert drawn[:2] == [5, 1]
    assert opened.complaints == []
    opened.page.close()


def test_the_page_and_its_figures_change_to_dark_and_back(view: Opened) -> None:
    view.page.evaluate("document.documentElement.dataset.theme = 'light'")
    ink = "document.getElementById('load-evenness').layout.font.color"
    paper = "getComputedStyle(document.body).backgroundColor"
    before = view.page.evaluate(f"[{paper}, {ink}]")
    button = view.page.locator("#theme")
    button.click()
    dark = view.page.evaluate(f"[{paper}, {ink}]")
    assert before[0] != dark[0]
    assert before[1] != dark[1]
    button.click()
    assert view.page.evaluate(f"[{paper}, {ink}]") == before


def test_cards_lead_to_their_sections(view: Opened) -> None:
    cards = view.page.locator("a.card")
    titles = {}
    for number in range(cards.count()):
        section = view.page.locator(str(cards.nth(number).get_attribute("href")))
        titles[cards.nth(number).locator(".name").inner_text()] = section.locator("h2").inner_text()
    assert titles == {
        "Load balance": "Expert load",
        "Information across layers": "Cross-layer transitions",
        "Repetition": "Repetition over tokens",
        "Domain specialization": "Domains",
        "Predictability": "Predictability",
        "Trained predictor": "Predictors",
        "Offloaded experts": "Experts that do not fit in memory",
    }
    # Tables open with a click.
    table = view.page.locator("#section-2 table").first
    assert not table.is_visible()
    view.page.locator("#section-2 summary", has_text="Table").first.click()
    assert table.is_visible()


def test_the_bars_of_a_card_have_one_scale(view: Opened) -> None:
    """Whatever their labels are: a bar's length is its value's share of the longest one's."""
    cards = view.page.evaluate(
        """() => [...document.querySelectorAll(".card")].map(card =>
            [...card.querySelectorAll(".bar > div")].map(bar => bar.clientWidth))"""
    )
    assert len(cards) >= 5
    assert all(widths and len(set(widths)) == 1 and widths[0] > 50 for widths in cards)
