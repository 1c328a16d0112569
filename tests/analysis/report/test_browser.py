"""The report in a real browser: from disk, offline, without a word on the console, and what moves does move."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from support.traces import write_synthetic_trace

from analysis.analyze import analyze_trace, compare_traces
from analysis.documents.simulation import SimulatedDevice, SimulatedRow, Simulation
from analysis.documents.token_results import CachedProblem, SimulatedSample
from profiler.trace.reader import Trace
from profiler.trace.splits import problem_digests
from speculation.data.tasks import Task
from speculation.evaluation.evaluate import evaluate
from speculation.offload.curves.curve_page import write_curves
from speculation.offload.curves.curve_study import CurveStudy, run_curves
from speculation.training.fit import train

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
# As root, and without a network that its own services could look for.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = pytest.mark.browser
EVIL = "<img src=x onerror='window.hacked=1'></script><script>window.hacked=1</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        if "SPECMOE_NEED_BROWSER" in os.environ:
            pytest.fail("no Chromium, and SPECMOE_NEED_BROWSER is set")
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield started
        started.close()


class Opened:
    """A page that was opened from disk, with its console messages and requests."""

    def __init__(self, browser: Browser, path: Path, width: int = 1100) -> None:
        self.complaints: list[str] = []
        self.page: Page = browser.new_page(viewport={"width": width, "height": 800})
        self.page.context.set_offline(True)
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("request", self._requested)
        self.page.goto(path.as_uri())
        self.page.wait_for_function("document.querySelectorAll('.main-svg').length > 0")
        # Curves have a page of their own, whose figures are drawn at once.
        self.page.wait_for_function("document.documentElement.dataset.drawn || !document.getElementById('theme')")

    def _requested(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.complaints.append(f"request: {request.url}")

    def matrix(self) -> np.ndarray:
        return np.array(self.page.evaluate("document.getElementById('transition-matrix').data[0].z"), dtype=float)

    def picture(self, name: str) -> bytes:
        return self.page.locator(f"#{name}").screenshot()

    def move(self, slider: str, to: int) -> str:
        """Move a slider; returns what the page then says it shows."""
        self.page.locator(f"#{slider}").fill(str(to))
        return self.page.locator("#transition-label").inner_text()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Routing with a dependency between layers, and a token that one expert prefers; with an evaluation and a simulation."""
    folder = tmp_path_factory.mktemp("report")
    random = np.random.default_rng(0)
    problems, vocab = [], []
    for _ in range(10):
        ids = random.random((60, 5, 8)).argsort(-1)[:, :, :2]
        for layer in range(1, 5):
            follows = random.random(60) < 0.6
            ids[follows, layer] = (ids[follows, layer - 1] + layer) % 8
        tokens = random.integers(0, 6, 61)
        ids[tokens[:60] == 4, 2] = [7, 1]
        problems.append((ids, np.tile([0.75, 0.25], (60, 5, 1))))
        vocab.append(tokens)
    trace = write_synthetic_trace(
        folder / "trace",
        problems,
        8,
        model_id=EVIL,
        # The first MoE layer is the second of the decoder.
        first_layer=1,
        datasets=[(EVIL, "math", "code")[number % 3] for number in range(10)],
        vocab_ids=vocab,
    )
    run = train(trace, "popularity", folder / "run", task=Task.NEXT_LAYER)
    evaluation = evaluate(run, trace, part="all", with_baselines=False, with_sample=True)
    row = SimulatedRow(
        device=None, capacity=4, share=0.5, gigabytes=None, policy="lru", prefetch="none", hit_rate=0.5, tokens_per_second=None,
        times_on_demand=None,
    )  # fmt: skip
    # All of the first token's experts are hits at the first layer, and the second one's late and demand-loaded.
    outcomes_TLK = np.ones((60, 5, 2), dtype=int)
    outcomes_TLK[1, 0] = [2, 3]
    cached = [CachedProblem.of(problem_digests(trace)[0], np.arange(60), outcomes_TLK)]
    sample = SimulatedSample(device=None, capacity=4, share=0.5, policy=EVIL, prefetch=EVIL, problems=cached)
    devices = [SimulatedDevice(name=None, assumptions=[])]
    simulation = Simulation(trace="t", model="m", devices=devices, notes=[EVIL], best=[], rows=[row], sample=sample)
    analyze_trace(trace, folder / "out", hops=3, evaluations=[evaluation], simulations=[simulation])
    return folder / "out"


def test_opens_offline_in_silence_and_runs_nothing_of_a_stranger(browser: Browser, report: Path) -> None:
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
    """Of five layers, four are shown at a time once they are asked for; the slider then has two places."""
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


# The answer view. Its tests share one loaded page, each beginning with another problem.


@pytest.fixture(scope="module")
def view(browser: Browser, report: Path) -> Iterator[Opened]:
    opened = Opened(browser, report / "report.html")
    opened.page.wait_for_function("window.answers && window.answers.problem")
    yield opened
    assert opened.complaints == []
    opened.page.close()


def problem_of(report: Path, number: int) -> Any:
    return Trace.open(report.parent / "trace").arrays(number)


def choose(view: Opened, number: int) -> None:
    """Choose the problem of the trace with this number, at the first layer."""
    order = view.page.evaluate("answers.data.problems.map((problem) => problem.prompt)")
    view.page.locator("#answer-show").select_option("-1")
    view.page.locator("#answer-search").fill("")
    view.page.locator("#answer-problem").select_option(str(order.index(f"prompt {number}")))
    view.page.wait_for_function(f"answers.problem.prompt === 'prompt {number}'")
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
    view.page.wait_for_function("answers.problem.domain === 'math'")
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
    geometry = view.page.evaluate("answers.geometry")
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
            "JSON.stringify([0, 1, 2, 3, 4].map((layer) => [...Array(60).keys()].map((token) => "
            "{answers.overlay = 0; const found = answers.marks(token, layer); answers.overlay = null; return found;})))"
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
    # Tables open on demand.
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
