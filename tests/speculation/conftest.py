"""Traces that the tests of several folders share."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from support.traces import MakeTrace

from profiler.trace.reader import Trace


@pytest.fixture
def markov_trace(make_trace: MakeTrace) -> Trace:
    """40 problems, 4 layers, 8 experts, top-2: mostly, expert e is followed by e+1 (strongest) and e+4 at the next layer."""
    random = np.random.default_rng(0)
    problems = []
    for _ in range(40):
        strongest = np.zeros((30, 4), dtype=int)
        strongest[:, 0] = random.integers(0, 8, 30)
        for layer in range(1, 4):
            follows = random.random(30) < 0.9
            strongest[:, layer] = np.where(follows, (strongest[:, layer - 1] + 1) % 8, random.integers(0, 8, 30))
        ids = np.stack([strongest, (strongest + 4) % 8], axis=-1)
        problems.append((ids, np.tile([0.7, 0.3], (30, 4, 1))))
    return make_trace(problems, 8)


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Compute small networks on one thread: two tests run at a time, and more threads than cores wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
