"""The report in a real browser: from disk, offline, without a word on the console, and what moves does move."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from support.traces import write_synthetic_trace

from analysis.analyze import analyze_trace, compare_traces
from profiler.trace.reader import Trace
from speculation.offload.curves.curve_page import write_curves
from speculation.offload.curves.curve_study import CurveStudy, run_curves

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
    """Routing with a dependency between layers, and a token that one expert prefers."""
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
    analyze_trace(trace, folder / "out", hops=3)
    return folder / "out"


def test_opens_offline_in_silence_and_runs_nothing_of_a_stranger(browser: Browser, report: Path) -> None:
    opened = Opened(browser, report / "report.html")
    opened.page.wait_for_timeout(500)
    assert opened.complaints == []
    assert opened.page.evaluate("window.hacked") is None
    sections = opened.page.locator("section")
    assert sections.count() == 10
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


def test_the_expert_under_the_pointer_shows_its_tokens(browser: Browser, report: Path) -> None:
    opened = Opened(browser, report / "report.html")
    first = opened.page.locator("#cloud").inner_text()
    assert first.startswith("Layer ")
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
