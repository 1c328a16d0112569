"""What several jobs are tried on."""

from __future__ import annotations

import pytest

from profiler.collect.job import collect
from profiler.collect.options import LocalOptions
from profiler.trace.reader import Trace


@pytest.fixture(scope="session")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """A trace that was collected on this machine."""
    out = tmp_path_factory.mktemp("local") / "trace"
    options = LocalOptions(
        model="demo",
        dataset="demo-math,demo-code",
        out=out,
        num_problems=40,
        engine="transformers",
        max_new_tokens=4,
        dtype="float32",
    )
    collect(options)
    return Trace.open(out)
