"""Run `specmoe replay` of a small trace on this device: real transfers and GEMMs, compared with the simulation."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from profiler.errors import EngineError

PROBLEMS, TOKENS = 24, 120
# (name, MB of an expert, MB of the rest of a layer). The first is gpt-oss-20b's, which is too large for most CPU caches.
GPU_CASES = (("experts of 13.2 MB, as gpt-oss-20b's", "13.2", "30"), ("experts of 1 MB", "1", "1"))
CPU_CASES = GPU_CASES[1:]


def measure_replay(folder: Path, *, on_gpu: bool, deadline: float | None = None) -> Iterator[dict[str, Any]]:
    """Yield the document of `specmoe replay` for each case, with the name of the `case` added.

    The replayed trace is the embedded model's routing of the kinds of text it was trained on, recorded with `transformers`.
    Raises `EngineError` if a command fails; the message gives the reason.
    """
    trace = folder / "replayed"
    if not (trace / "manifest.json").is_file():
        datasets = ["--dataset", "demo-math,demo-code,demo-reviews", "--num-problems", str(PROBLEMS)]
        run_specmoe(["collect", "--model", "demo", *datasets, "--engine", "transformers", "--out", str(trace)], deadline)
    for number, (case, expert, rest) in enumerate(GPU_CASES if on_gpu else CPU_CASES):
        if deadline is not None and time.monotonic() > deadline:
            return
        out = folder / f"replay-{number}.json"
        run_specmoe(
            ["replay", str(trace), "--expert-mb", expert, "--rest-mb", rest, "--part", "all", "--json", str(out)], deadline
        )
        yield {"case": case, **json.loads(out.read_text(encoding="utf-8"))}


def run_specmoe(arguments: list[str], deadline: float | None) -> None:
    """Run the command in a separate process, so that this one does not occupy the GPU."""
    limit = None if deadline is None else max(5.0, deadline - time.monotonic())
    try:
        done = subprocess.run([sys.executable, "-m", "specmoe", *arguments], capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"'specmoe {arguments[0]}' took longer than {limit:.0f} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise EngineError(f"'specmoe {arguments[0]}' failed: {lines[-1] if lines else 'no message'}")
