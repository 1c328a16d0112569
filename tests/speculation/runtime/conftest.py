"""Small checkpoints that several tests use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vllm_patch.check.families import make


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small GEMMs are slower with several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights in float32: 3 layers of 4 experts, top-2."""
    return make("mixtral", tmp_path_factory.mktemp("mixtral"))
