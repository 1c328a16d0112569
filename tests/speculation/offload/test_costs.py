"""Costs: the sizes of known models, and what is assumed is said."""

from __future__ import annotations

import math

import pytest

from profiler.errors import SpecmoeError
from profiler.models.gpus import GPUS
from profiler.models.hosts import HOSTS, STORAGE
from profiler.models.registry import MODELS, ModelEntry
from speculation.offload.costs import costs_of, find_entry, storage_seconds


@pytest.mark.parametrize("entry", MODELS.values(), ids=list(MODELS))
def test_experts_are_most_of_every_model(entry: ModelEntry) -> None:
    """The experts' parameters are part of the published total, and those of a token of the published active ones."""
    expert = 3 * entry.hidden * entry.expert_width
    of_all, of_token = (len(entry.moe_layers) * count * expert / 1e9 for count in (entry.experts, entry.top_k))
    assert 0.8 * entry.parameters < of_all < entry.parameters
    assert 0.25 * entry.active < of_token < entry.active
    # What is not routed is the same in both, but for rounding, and for a table of embeddings (gpt-oss's .58 billion) that the
    # published active parameters may leave out.
    assert -0.4 < entry.parameters - of_all - (entry.active - of_token) < 0.6 + 0.05


def test_mixtral_by_hand() -> None:
    costs = costs_of(MODELS["mixtral-8x7b"], GPUS["A100-80GB"], "bf16", interconnect=20.0)
    # 3 x 4096 x 14336 x 2 bytes.
    assert costs.expert_bytes == 352_321_536
    assert costs.copy_seconds == pytest.approx(10e-6 + 352_321_536 / 20e9)
    assert costs.expert_seconds == pytest.approx(352_321_536 / (2039e9 * 0.7))
    rest = 12.9e9 - 32 * 2 * 176_160_768
    assert costs.layer_seconds == pytest.approx(rest * 2 / 32 / (2039e9 * 0.7))
    assert any("20.0 GB/s, as given" in line for line in costs.describe())
    assert any("assumed" in line for line in costs_of(MODELS["olmoe"], GPUS["H100"]).describe())
    assert costs_of(MODELS["mixtral-8x7b"], GPUS["H100"], interconnect=0.0).copy_seconds == math.inf


def test_mxfp4_keeps_the_rest_in_16_bits() -> None:
    costs = costs_of(MODELS["gpt-oss-20b"], GPUS["RTX 4090"])
    assert costs.precision == "mxfp4"
    # 24 layers of 32 experts, and the rest: the published files have 12.8 GiB.
    rest = 20.9e9 - 24 * 32 * 3 * 2880 * 2880
    assert (24 * 32 * costs.expert_bytes + 2 * rest) / 2**30 == pytest.approx(12.8, abs=0.3)


def test_the_host_by_hand() -> None:
    # 3 x 4096 x 14336 x 2 bytes; 89.6 GB/s x 70 %; 4.4 TFLOP/s x 40 %; 7.45 GB/s x 80 %.
    size, gpu = 352_321_536, GPUS["RTX 4090"]
    costs = costs_of(MODELS["mixtral-8x7b"], gpu, "bf16", host=HOSTS["DDR5-5600 desktop"], storage=STORAGE["NVMe Gen4"])
    assert costs.host_expert_seconds == pytest.approx(size / 62.72e9)
    assert costs.host_token_seconds == pytest.approx(size / 1.76e12)
    assert costs.host_latency == 50e-6
    assert costs.storage_seconds == pytest.approx(100e-6 + size / 5.96e9)
    text = "\n".join(costs.describe())
    assert "5.617 ms to compute an expert on the host" in text
    assert "62.7 GB/s, 70% (assumed) of 89.6 GB/s" in text
    assert "5.96 GB/s, 80% (assumed) of 7.45 GB/s" in text
    given = costs_of(MODELS["mixtral-8x7b"], gpu, "bf16", host=HOSTS["DDR5-5600 desktop"], host_bandwidth=40.0)
    assert given.host_expert_seconds == pytest.approx(size / 40e9)
    assert "host: 2 channels of DDR5-5600, Ryzen 9 9950X; 40.0 GB/s, as given" in "\n".join(given.describe())
    closed = costs_of(MODELS["mixtral-8x7b"], gpu, "bf16", host=HOSTS["DDR5-5600 desktop"], host_bandwidth=0.0)
    assert closed.host_expert_seconds == math.inf
    assert closed.to_json()["host_expert_seconds"] is None


def test_without_a_host_nothing_is_said_of_it() -> None:
    costs = costs_of(MODELS["olmoe"], GPUS["H100"])
    assert (costs.host_expert_seconds, costs.storage_seconds, costs.host_latency) == (None, None, 0.0)
    assert not any("host:" in line or "storage" in line for line in costs.describe())


@pytest.mark.parametrize("name", [name for name, host in HOSTS.items() if host.gpu])
def test_unified_memory_needs_no_transfer(name: str) -> None:
    gpu = HOSTS[name].gpu
    assert gpu is not None
    costs = costs_of(MODELS["olmoe"], gpu)
    assert costs.copy_seconds == 0.0
    assert "interconnect: none" in "\n".join(costs.describe())
    assert "inf" not in "\n".join(costs.describe())
    # With storage, a transfer is a read into the one memory.
    tiered = costs_of(MODELS["olmoe"], gpu, storage=STORAGE["NVMe Gen4"])
    assert (tiered.copy_seconds, tiered.storage_seconds) == (storage_seconds(tiered.expert_bytes, STORAGE["NVMe Gen4"]), None)


def test_unknown_ones() -> None:
    with pytest.raises(SpecmoeError, match="unknown precision 'int3': expected one of bf16"):
        costs_of(MODELS["olmoe"], GPUS["H100"], "int3")
    found = find_entry("openai/gpt-oss-20b")
    assert found is not None
    assert found.name == "gpt-oss-20b"
    assert find_entry("demo") is None
