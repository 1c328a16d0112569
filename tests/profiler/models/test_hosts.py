"""Hosts and storage: figures that follow from each other, and names."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from profiler.errors import ModelError
from profiler.models.hosts import HOSTS, STORAGE, find_host, find_storage
from specmoe import app


@pytest.mark.parametrize("name", [name for name, host in HOSTS.items() if "channels" in host.memory])
def test_bandwidth_is_that_of_all_channels(name: str) -> None:
    host = HOSTS[name]
    found = re.fullmatch(r"(\d+) channels of DDR\d-(\d+)", host.memory)
    assert found is not None
    channels, transfers = map(int, found.groups())
    # 8 bytes a transfer, in millions of transfers a second.
    assert host.bandwidth == pytest.approx(channels * 8 * transfers / 1e3)
    assert host.gpu is None


@pytest.mark.parametrize("name", [name for name, host in HOSTS.items() if "unified" in host.memory])
def test_unified_memory_is_that_of_its_gpu(name: str) -> None:
    host = HOSTS[name]
    assert host.gpu is not None
    assert host.gpu.name == name
    assert host.gpu.bandwidth == pytest.approx(host.bandwidth, abs=0.5)
    # Nothing is faster than memory that needs no transfer.
    assert host.gpu.interconnect == float("inf")


def test_unknown_names() -> None:
    assert find_host("M4 Max").cores == 16
    assert find_storage("NVMe Gen4").bandwidth == 7.45
    with pytest.raises(ModelError, match="unknown host 'PDP-11': expected one of DDR4-3200 desktop, DDR5-5600 desktop"):
        find_host("PDP-11")
    with pytest.raises(ModelError, match="unknown storage 'tape': expected one of SATA SSD, NVMe Gen3"):
        find_storage("tape")


def test_models_lists_them() -> None:
    runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
    text = runner.invoke(app, ["models", "olmoe"], catch_exceptions=False).output
    for name in [*HOSTS, *STORAGE]:
        assert name in text
    found = json.loads(runner.invoke(app, ["models", "olmoe", "--json"], catch_exceptions=False).output)
    assert [host["name"] for host in found["hosts"]] == list(HOSTS)
    assert [storage["bandwidth"] for storage in found["storage"]] == [storage.bandwidth for storage in STORAGE.values()]
