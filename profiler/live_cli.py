"""The command `watch`."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from profiler.errors import SpecmoeError
from profiler.live.publication import Publication
from profiler.live.scrape import fetch_page, parse
from profiler.live.watch_view import WatchView
from profiler.terminal import TABLE_WIDTH, console

app = typer.Typer()


@app.command()
def watch(
    url: Annotated[str, typer.Argument(help="Address of vLLM's server, or of its metrics page.")] = "http://localhost:8000",
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two scrapes.")] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one view and exit, as when the output is not a terminal.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one scrape as JSON, a line for each engine, and exit.")
    ] = False,
) -> None:
    """Show the live metrics of a vLLM that runs with SPECMOE_LIVE=1: expert load, recall of a predictor, hits of caches.

    Example: specmoe watch http://localhost:8000
    """
    if as_json:
        for publication in _scrape(url):
            typer.echo(publication.to_json())
        return
    view = WatchView()
    view.update(_scrape(url))
    if once or not console.is_terminal:
        (console if console.is_terminal else Console(width=TABLE_WIDTH)).print(view.render())
        return
    with Live(view.render(), console=console, auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(interval)
            try:
                view.update(_scrape(url))
            except SpecmoeError as error:
                # The server may be restarting: the view returns with it.
                live.update(Text(str(error)), refresh=True)
            else:
                live.update(view.render(), refresh=True)


def _scrape(url: str) -> list[Publication]:
    found = parse(fetch_page(url))
    if not found:
        raise SpecmoeError(f"{url} has no live metrics of experts: start vLLM with SPECMOE_LIVE=1 (docs/guide/live.md)")
    return found
