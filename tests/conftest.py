"""Fixtures that all tests share: small synthetic traces, written by the project's own writers, and a hub on this machine."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from support.offline_hub import Hub
from support.scheduling import FolderScheduling, folder_together
from support.traces import MakeProblems, MakeTrace, Problems, write_synthetic_trace

from profiler.trace.reader import Trace

# Imports create no garbage worth looking for: see `pytest_collection_finish`.
gc.disable()

if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # A core for each worker and all that it starts: engines whose threads wait for a shared core take several times as long.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(cores)]})

# No test is timed: the first example compiles, or loads compiled code, and machines differ.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Tests must not reach for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# PyTorch's compiler believes the kernel about this CPU's instructions, and compiles no program for each to try it.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules with long tests first, then undivided folders: whichever process ends last should end with something short."""
    long = {
        item.path
        for item in items
        if any(item.get_closest_marker(name) for name in ("engine", "modal", "awq", "fuzz", "release"))
    }
    items.sort(key=lambda item: (item.path not in long, folder_together(item.nodeid) is None))


def pytest_collection_finish() -> None:
    """Keep what has been imported out of the garbage collector's walks: millions of objects, again and again."""
    gc.freeze()
    gc.enable()
    gc.set_threshold(50_000, 20, 20)


def pytest_sessionfinish() -> None:
    """Libraries in C++ say at exit what was never freed."""
    gc.unfreeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """How tests are divided among processes (`-n 2`)."""
    return FolderScheduling(config, log) if config.getoption("dist") == "loadscope" else None


@pytest.fixture
def make_trace(tmp_path: Path) -> MakeTrace:
    """Make a complete trace: see `write_synthetic_trace`."""

    def make(problems: Problems, num_experts: int, *, name: str = "trace", **options: Any) -> Trace:
        return write_synthetic_trace(tmp_path / name, problems, num_experts, **options)

    return make


@pytest.fixture
def random_problems() -> MakeProblems:
    """Problems routed uniformly and independently."""

    def make(count: int, tokens: int, layers: int, num_experts: int, top_k: int, seed: int = 0) -> Problems:
        random = np.random.default_rng(seed)
        problems = []
        for _ in range(count):
            ids = random.random((tokens, layers, num_experts)).argsort(-1)[:, :, :top_k]
            problems.append((ids, random.dirichlet(np.ones(top_k), size=(tokens, layers))))
        return problems

    return make


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Address of a hub on this machine, and its repositories."""
    repositories: dict[str, dict[str, Any]] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Hub,), {"repositories": repositories}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", repositories
    server.shutdown()
    server.server_close()
