"""Chromium, and a page of ours that was opened in it from disk, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Browser, Page

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
