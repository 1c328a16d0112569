"""What fits, and how fast: by hand for three models, and next to the simulation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.traces import MakeProblems, MakeTrace

from analysis.documents.fit_report import Fit, FitWay, read_fit
from profiler.errors import SpecmoeError
from profiler.models.gpus import GPUS
from profiler.models.hosts import HOSTS
from profiler.models.registry import MODELS, ModelEntry
from profiler.trace.splits import part_of
from speculation.data.routes import load_routes
from speculation.data.tasks import Shape, Task
from speculation.offload.costs import costs_of
from speculation.offload.fitting import COMPUTE, COPY, FILL, LAYERS, ON_GPU, FitOptions, fit_model
from speculation.offload.requests import requests_of
from speculation.offload.simulation.records import Miss
from speculation.offload.simulation.simulate import Setting, Workload, simulate
from speculation.offload.state import Rule
from speculation.predictors.features import expert_frequency

DESKTOP = HOSTS["DDR5-5600 desktop"]


def fit(name: str, gpu: str = "RTX 4090", **options: Any) -> Fit:
    return fit_model(FitOptions(entry=MODELS[name], gpu=GPUS[gpu], host=DESKTOP, **options))


def way(fit: Fit, name: str) -> FitWay:
    return next(each for each in fit.ways if each.name == name)


def test_gpt_oss_by_hand() -> None:
    found = fit("gpt-oss-20b", memory=10.0, context=8192)
    # 3 x 2880 x 2880 parameters of 4.25 bits; the rest of 20.9 billion in 16 bits.
    assert found.memory.expert_bytes == 24_883_200 * 4.25 / 8
    assert found.memory.dense == pytest.approx((20.9 - 768 * 0.0248832) * 2)
    assert found.memory.kv_cache == pytest.approx(24_576 * (8192 + 128) / 1e9)
    left = 9.0 - 3.5786 - 0.20447 - 2.0
    assert found.memory.left == pytest.approx(left, abs=1e-3)
    # 3.217 GB hold 243 experts of 13.22 MB: 10 in each of 24 layers, or 7 layers of 32.
    assert found.memory.slots == 10
    assert found.memory.share == 243 / 768
    assert way(found, LAYERS).gpu_layers == 7
    # One token uses 4 experts of 0.01873 ms on the GPU, 0.2108 ms on the host, 0.5346 ms to copy; 10 of 32 are there.
    costs = costs_of(MODELS["gpt-oss-20b"], GPUS["RTX 4090"], host=DESKTOP)
    kv = 0.20447e9 / (1008e9 * 0.7)
    copies = 24 * (costs.layer_seconds + 4 * costs.expert_seconds + 4 * 22 / 32 * costs.copy_seconds) + kv
    assert way(found, COPY).tokens_per_second == pytest.approx(1 / copies, rel=1e-4)
    host = 24 * (costs.layer_seconds + 4 * 22 / 32 * (13_219_200 / (89.6e9 * 0.7)) + 50e-6) + kv
    assert way(found, COMPUTE).tokens_per_second == pytest.approx(1 / host, rel=1e-4)
    on_gpu = costs.layer_seconds + 4 * costs.expert_seconds
    on_host = costs.layer_seconds + 4 * 13_219_200 / (89.6e9 * 0.7) + 50e-6
    assert way(found, LAYERS).tokens_per_second == pytest.approx(1 / (7 * on_gpu + 17 * on_host + kv), rel=1e-4)
    assert [each.name for each in found.ways] == [COMPUTE, LAYERS, COPY]
    assert way(found, COPY).host_gigabytes == pytest.approx(768 * 0.0132192)
    assert way(found, COMPUTE).host_gigabytes == pytest.approx(24 * 22 * 0.0132192)


def test_mixtral_by_hand() -> None:
    found = fit("mixtral-8x7b", precision="awq", batch=4)
    assert found.memory.expert_bytes == pytest.approx(176_160_768 * 0.53)
    assert found.memory.experts == pytest.approx(256 * 0.176160768 * 0.53)
    assert found.memory.kv_cache == pytest.approx(4 * 4096 * 131_072 / 1e9)
    # 21.6 - 0.85 - 2.15 - 2.0 GB hold 177 experts of 93.4 MB.
    assert found.memory.slots == 5
    assert found.memory.share == pytest.approx(177 / 256)
    # 8 (1 - (3/4)^4)
    assert found.union == pytest.approx(5.46875)
    assert any("5 slots per layer are fewer than the 5.5 distinct experts" in line for line in found.warnings)
    # On an A100 everything fits, in bfloat16 it does not.
    assert [each.name for each in fit("mixtral-8x7b", "A100-80GB", precision="awq").ways] == [ON_GPU]
    assert ON_GPU not in [each.name for each in fit("mixtral-8x7b", "A100-80GB").ways]


def test_deepseek_by_hand() -> None:
    found = fit("deepseek-v2-lite", context=32_768)
    assert found.memory.kv_cache == pytest.approx(32_768 * 31_104 / 1e9)
    # 26 of 27 layers have 64 experts of 3 x 2048 x 1408 parameters.
    assert found.memory.experts == pytest.approx(26 * 64 * 3 * 2048 * 1408 * 2 / 1e9)
    assert found.memory.dense == pytest.approx((15.7 - 26 * 64 * 0.008650752) * 2)
    assert found.memory.slots == int((21.6 - 2.610297 - 1.019216 - 2.0) / (26 * 0.017301504))
    half = fit("deepseek-v2-lite", context=32_768, kv_bits=8)
    assert half.memory.kv_cache == found.memory.kv_cache / 2
    assert way(half, COPY).tokens_per_second > way(found, COPY).tokens_per_second


def test_all_resident_without_context_is_what_the_costs_say() -> None:
    costs = costs_of(MODELS["olmoe"], GPUS["H100"], host=DESKTOP)
    (found,) = fit("olmoe", "H100", context=1).ways
    assert found.tokens_per_second == pytest.approx(1 / (16 * (costs.layer_seconds + 8 * costs.expert_seconds)), rel=1e-3)


def test_speed_falls_with_memory_and_never_exceeds_all_resident() -> None:
    speeds = [
        [each.tokens_per_second for each in fit("gpt-oss-20b", memory=size).ways] for size in (7.0, 9.0, 12.0, 16.0, 24.0)
    ]
    best = [max(each) for each in speeds]
    assert best == sorted(best)
    assert len(speeds[-1]) == 1


def test_too_little_memory() -> None:
    found = fit("mixtral-8x7b", memory=4.0)
    assert found.ways == []
    assert "does not fit, even without experts" in found.warnings[0]
    none = fit("mixtral-8x7b", memory=7.0)
    # No slot per layer: only whole layers' experts, here none, on the GPU.
    assert none.memory.slots == 0
    assert [(each.name, each.gpu_layers) for each in none.ways] == [(LAYERS, 0)]


def test_host_memory_limits_the_ways() -> None:
    found = fit("gpt-oss-20b", memory=10.0, host_memory=8.0)
    assert COPY not in [each.name for each in found.ways]
    assert any(COPY in line and "10.2 GB of host memory" in line for line in found.warnings)


def test_unified_memory_has_no_second_place() -> None:
    host = HOSTS["M4 Max"]
    assert host.gpu is not None
    options = FitOptions(entry=MODELS["mixtral-8x7b"], gpu=host.gpu, host=host)
    assert [each.name for each in fit_model(options).ways] == [ON_GPU]
    small = fit_model(replace(options, memory=48.0))
    assert small.ways == []
    assert "no memory of its own" in small.warnings[0]


@pytest.fixture
def entry() -> ModelEntry:
    """A model of 4 layers of 16 experts, of which 8 fit next to the rest on an RTX 4090 with 3.9 GB."""
    return ModelEntry(
        name="small",
        checkpoints={"bf16": "synthetic"},
        layers=4,
        experts=16,
        top_k=2,
        renormalized=True,
        context=4096,
        hidden=2048,
        expert_width=4096,
        parameters=(64 * 3 * 2048 * 4096 + 1e8) / 1e9,
        active=(8 * 3 * 2048 * 4096 + 1e8) / 1e9,
        kv_bytes=1024,
    )


@pytest.mark.parametrize("batch", [1, 4])
def test_a_trace_gives_hit_rates_and_the_simulation_s_speed(
    batch: int, entry: ModelEntry, make_trace: MakeTrace, random_problems: MakeProblems
) -> None:
    trace = make_trace(random_problems(40, 20, 4, 16, 2), 16)
    options = FitOptions(entry=entry, gpu=GPUS["RTX 4090"], host=DESKTOP, memory=4.1, context=1, batch=batch, trace=trace)
    found = fit_model(options)
    slots = found.memory.slots
    assert 0 < slots < 16
    requests = requests_of(load_routes(trace, "test"), 16, batch=batch)
    # The last steps have fewer sequences: they are not steps of this batch.
    assert (requests.sequences_S[requests.is_decode_S][-1] < batch) == (batch > 1)
    full = int(np.flatnonzero(requests.is_decode_S & (requests.sequences_S == batch))[-1]) + 1
    requests = requests.first_steps(full)
    assert set(requests.sequences_S[requests.is_decode_S]) == {batch}
    popularity = expert_frequency(load_routes(trace, "train"), Shape.of(trace.metadata.model, 1, Task.NEXT_TOKEN))
    costs = costs_of(entry, GPUS["RTX 4090"], "bf16", host=DESKTOP)
    simulated = simulate(Workload(requests, popularity), Setting(Rule.LRU, slots), costs=costs)
    copied = way(found, COPY)
    assert copied.hit_rate == simulated.hit_rate
    assert simulated.tokens_per_second is not None
    assert copied.tokens_per_second == pytest.approx(simulated.tokens_per_second, rel=0.02)
    filled = simulate(Workload(requests, popularity), Setting(Rule.LRU, slots, miss=Miss.HOST), costs=costs)
    assert way(found, FILL).hit_rate == filled.hit_rate
    assert way(found, FILL).tokens_per_second == pytest.approx(filled.tokens_per_second, rel=1e-3)
    assert found.union_source.startswith(f"mean over decoding steps of {batch} sequence{'s' * (batch > 1)}, ")
    # Routing is uniform: the formulas without a trace hold.
    plain = fit_model(replace(options, trace=None))
    assert found.union == pytest.approx(plain.union, rel=0.1)
    assert way(found, COMPUTE).hit_rate == pytest.approx(slots / 16, abs=0.05)
    assert way(plain, COPY).hit_rate == slots / 16
    assert FILL not in [each.name for each in plain.ways]


@pytest.mark.parametrize("batch", [5, 6, 64])
def test_a_batch_is_no_larger_than_the_part(
    batch: int, entry: ModelEntry, make_trace: MakeTrace, random_problems: MakeProblems
) -> None:
    named = [f"p{number}" for number in range(200)]
    prompts = [next(p for p in named if part_of(p) == "train"), *[p for p in named if part_of(p) == "test"][:5]]
    trace = make_trace(random_problems(6, 5, 4, 16, 2), 16, prompts=prompts)
    options = FitOptions(entry=entry, gpu=GPUS["RTX 4090"], host=DESKTOP, memory=4.1, context=1, batch=batch, trace=trace)
    if batch <= 5:
        # Five tokens of two experts each.
        assert 2 < fit_model(options).union <= 10
        return
    with pytest.raises(SpecmoeError, match=f"batch {batch}: the test part of the trace never decodes more than 5 sequences"):
        fit_model(options)


def test_the_fixed_choice_is_made_in_training(entry: ModelEntry, make_trace: MakeTrace) -> None:
    # Every token of every problem uses experts 3 and 5.
    ids = np.tile(np.array([3, 5]), (6, 4, 1))
    trace = make_trace([(ids, np.full(ids.shape, 0.5))] * 30, 16)
    found = fit_model(FitOptions(entry=entry, gpu=GPUS["RTX 4090"], host=DESKTOP, memory=4.1, context=1, batch=4, trace=trace))
    assert found.union == 2
    assert [way(found, name).hit_rate for name in (COPY, COMPUTE)] == [1, 1]
    assert found.trace == "trace"


def test_wrong_options(make_trace: MakeTrace, random_problems: MakeProblems) -> None:
    trace = make_trace(random_problems(10, 2, 2, 8, 2), 8)
    for options, message in (
        ({"trace": trace, "memory": 10.0}, "24 MoE layers of 32 experts, top-4; the trace has 2 of 8, top-2"),
        ({"batch": 0}, "expected at least 1"),
        ({"precision": "int3"}, "unknown precision 'int3'"),
    ):
        with pytest.raises(SpecmoeError, match=message):
            fit("gpt-oss-20b", **options)


def test_the_document_is_read_again(tmp_path: Path) -> None:
    found = fit("gpt-oss-20b", memory=10.0)
    (tmp_path / "fit.json").write_text(found.to_json())
    assert read_fit(tmp_path) == found
