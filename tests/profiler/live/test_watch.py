"""`specmoe watch`: the view of a page that a real vLLM served (`scrape.txt`), and of pages that are not one."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from rich.console import Console
from typer.testing import CliRunner

from profiler.errors import SpecmoeError
from profiler.live.metrics import COUNTING, DROPPED, ENTROPY, EXPERT_TOKENS, MAX_OVER_MEAN, TOKENS, WINDOW, Samples
from profiler.live.publication import Publication
from profiler.live.scrape import fetch_page, parse
from profiler.live.watch_view import WatchView
from specmoe import app

SCRAPE = (Path(__file__).parent / "scrape.txt").read_text(encoding="utf-8")


def shown(*scrapes: list[Publication]) -> str:
    view = WatchView()
    for scrape in scrapes:
        view.update(scrape)
    console = Console(record=True, width=140, file=io.StringIO())
    console.print(view.render())
    return console.export_text()


class Page(BaseHTTPRequestHandler):
    """Serves `pages` by path."""

    pages: ClassVar[dict[str, str]] = {"/metrics": SCRAPE, "/other": "vllm:requests 1\n", "/html": "<html>"}

    def do_GET(self) -> None:
        found = self.pages.get(self.path)
        self.send_response(404 if found is None else 200)
        self.end_headers()
        self.wfile.write((found or "").encode())

    def log_message(self, *_: object) -> None:
        """Not into the test's output."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def test_the_view_has_every_layer_every_predictor_and_every_cache() -> None:
    (publication,) = parse(SCRAPE)
    text = shown([publication])
    lines = text.splitlines()
    assert lines[0] == f"{publication.model}, engine 0"
    assert f"{publication.samples.get(TOKENS):,.0f} tokens" in lines[1]
    for layer in range(8):
        entropy = publication.samples.get(ENTROPY, layer, WINDOW)
        assert any(line.split()[:2] == [str(layer), f"{entropy:.3f}"] for line in lines)
    for predictor in ("popularity", "previous-token", "conditional-counts"):
        assert any(line.split()[:2] == [predictor, "1"] for line in lines)
    for policy in ("lru", "ewma", "belady"):
        assert any(line.split()[:1] == [policy] for line in lines)
    assert "2 slots" in text
    assert "4 slots" in text


def test_the_heat_map_is_of_experts_if_they_are_published_else_of_time() -> None:
    (publication,) = parse(SCRAPE)
    assert "load by layer and expert, relative to the layer's mean (experts: 8" in shown([publication])
    values = {name: found for name, found in publication.samples.values.items() if name != EXPERT_TOKENS.name}
    without = replace(publication, samples=Samples(values))
    assert "busiest expert relative to the mean, by layer (scrapes, the last one right: 3" in shown(*[[without]] * 3)


def test_the_brightest_cell_is_the_busiest_expert_since_the_first_scrape() -> None:
    def scrape(tokens: list[int]) -> list[Publication]:
        samples = Samples()
        samples.add(ENTROPY, 0.5, 3, WINDOW)
        samples.add(MAX_OVER_MEAN, 2.0, 3, WINDOW)
        for expert, count in enumerate(tokens):
            samples.add(EXPERT_TOKENS, count, 3, expert)
        return [Publication("m", "0", samples)]

    def cells(*scrapes: list[Publication]) -> list[str]:
        line = shown(*scrapes).splitlines()[-1]
        assert line.startswith("    3 ")
        # Each expert is four characters wide.
        return [line.ljust(22)[6 + 4 * n] for n in range(4)]

    assert cells(scrape([100, 0, 0, 0])) == ["█", " ", " ", " "]
    assert cells(scrape([100, 0, 0, 0]), scrape([100, 0, 8, 4])) == [" ", " ", "█", "▒"]


def test_troubles_are_named() -> None:
    (publication,) = parse(SCRAPE)
    samples = Samples({name: dict(found) for name, found in publication.samples.values.items()})
    samples.add(DROPPED, 12)
    samples.add(COUNTING, 0)
    text = shown([replace(publication, samples=samples)])
    assert "12 were not counted, because counting fell behind" in text
    assert "counting has ended: see the engine's log" in text
    assert "start vLLM with SPECMOE_LIVE=1" in shown([])


def test_names_from_the_page_do_not_control_the_terminal() -> None:
    page = 'specmoe_tokens_total{model_name="\x1b[31mred [bold]",engine="0"} 5\n# EOF\n'
    text = shown(parse(page))
    assert "\x1b" not in text
    assert "[31mred [bold]" in text


def test_the_command_prints_a_view_or_json(server: str) -> None:
    printed = CliRunner().invoke(app, ["watch", server, "--once"], catch_exceptions=False)
    assert printed.exit_code == 0
    assert "load by layer (window); experts that a step needs" in printed.stdout
    as_json = CliRunner().invoke(app, ["watch", server.removeprefix("http://"), "--json"], catch_exceptions=False)
    (publication,) = parse(SCRAPE)
    assert Publication.from_json(as_json.stdout) == publication
    assert json.loads(as_json.stdout)["model"] == publication.model


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/other", "has no live metrics of experts: start vLLM with SPECMOE_LIVE=1"),
        ("/html", "not a metrics page in Prometheus' text format"),
        ("/absent", "cannot be read: Not Found"),
    ],
)
def test_other_pages_are_refused(server: str, path: str, message: str) -> None:
    result = CliRunner().invoke(app, ["watch", server + path])
    assert isinstance(result.exception, SpecmoeError)
    assert message in str(result.exception)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://", ""])
def test_only_addresses_of_servers_are_read(url: str) -> None:
    with pytest.raises(SpecmoeError, match="is not an address of a server"):
        fetch_page(url)


def test_a_server_that_is_down_is_one_line() -> None:
    with pytest.raises(SpecmoeError, match=r"http://127\.0\.0\.1:9/metrics cannot be read: .*refused"):
        fetch_page("127.0.0.1:9")
