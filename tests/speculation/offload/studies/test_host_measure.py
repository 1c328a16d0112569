"""Measurements of the host: they read and compute what they say, and say how."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from profiler.errors import SpecmoeError
from speculation.offload.costs import HOST_LATENCY, Costs
from speculation.offload.studies import host_measure
from speculation.offload.studies.host_measure import host_seconds, measured_on_host, read_seconds

COSTS = Costs(
    model="synthetic",
    device="none",
    precision="bf16",
    expert_bytes=1e6,
    copy_seconds=1.0,
    expert_seconds=1.0,
    token_seconds=0.0,
    layer_seconds=1.0,
    layer_token_seconds=0.0,
    assumptions=("before",),
)


def test_experts_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU's caches hold would be computed faster than memory allows."""
    used: list[int] = []
    real = functional.linear

    def multiplied(state: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        used.append(weights.data_ptr())
        assert weights.nbytes == 1 << 16
        return real(state, weights)

    monkeypatch.setattr(host_measure, "DUMMY_BYTES", 8 << 16)
    monkeypatch.setattr(functional, "linear", multiplied)
    assert host_seconds(1 << 16, 1024) > 0
    assert len(used) == host_measure.REPEATS + host_measure.WARM_UP
    assert len(set(used)) == 8


@pytest.mark.parametrize("has_direct", [True, False])
def test_every_block_is_read_once(has_direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system refuses direct reads, buffered ones are used, and said to be."""
    real_open, real_read = os.open, os.preadv
    read: list[tuple[int, bytes]] = []

    def opened(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            if not has_direct:
                raise OSError(errno.EINVAL, "Invalid argument")
            # This machine's file system may have none.
            flags &= ~os.O_DIRECT
        return real_open(path, flags, *more, **named)

    def reads(descriptor: int, buffers: Any, offset: int) -> int:
        done = real_read(descriptor, buffers, offset)
        read.append((offset, bytes(buffers[0][:8])))
        return done

    monkeypatch.setattr(host_measure, "FILE_BYTES", 8 * 12288)
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "preadv", reads)
    found = read_seconds(10_000, tmp_path)
    assert found.is_direct is has_direct
    assert found.seconds > 0
    # 10,000 bytes are three pages; of random content, each block is another one.
    assert [offset for offset, _ in read] == [12288 * block for block in range(8)]
    assert len({content for _, content in read}) == 8
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(SpecmoeError, match="absent: cannot measure storage with a file of 0"):
        read_seconds(10_000, tmp_path / "absent")


def test_what_was_measured_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_measure, "DUMMY_BYTES", 1 << 22)
    monkeypatch.setattr(host_measure, "FILE_BYTES", 1 << 22)
    found = measured_on_host(COSTS, 512, tmp_path, storage=True)
    assert found.host_expert_seconds is not None
    assert found.storage_seconds is not None
    assert min(found.host_expert_seconds, found.storage_seconds) > 0
    assert (found.host_latency, found.copy_seconds) == (HOST_LATENCY, 1.0)
    assert found.assumptions[0] == "before"
    assert "measured on this machine: an expert on the CPU" in found.assumptions[1]
    assert f"an expert from {tmp_path}" in found.assumptions[2]
    without = measured_on_host(COSTS, 512, tmp_path, storage=False)
    assert without.storage_seconds is None
    assert len(without.assumptions) == 2
