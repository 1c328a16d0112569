"""`TraceCollector`: one engine for several traces, budgets of tokens, and what a collection took."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from profiler import TraceCollector
from profiler.collect.collection import CollectProgress
from profiler.engines import EngineOptions, Sampling
from profiler.errors import ModelError, TraceError
from profiler.trace.reader import Trace


@pytest.fixture(scope="module")
def collector() -> Iterator[TraceCollector]:
    with TraceCollector("demo", engine="transformers", engine_options=EngineOptions(dtype="float32")) as started:
        yield started


def test_a_budget_over_datasets_is_collected_and_saved(collector: TraceCollector, tmp_path: Path) -> None:
    seen: list[CollectProgress] = []
    collector.on_progress = seen.append
    collected = collector.collect_from_datasets(
        ["demo-math", "demo-code"], target_tokens=600, max_tokens_per_problem=40, sampling=Sampling(max_new_tokens=4)
    )
    trace = collected.save(tmp_path / "deep" / "trace")
    assert trace.faults(verify=True) == []
    lengths = [p["prompt_tokens"] + p["output_tokens"] for p in trace.problems.to_pylist()]
    assert max(lengths) <= 40
    by_dataset = collected.summary.by_dataset
    assert set(by_dataset) == {"demo-math", "demo-code"}
    # Each has its share, less what ended early, and less than a problem more.
    assert all(250 < tokens < 340 for _, tokens in by_dataset.values())
    assert sum(tokens for _, tokens in by_dataset.values()) == sum(lengths)
    assert trace.metadata.sampling["target_tokens"] == 600
    assert seen[-1].problems == seen[-1].total == len(lengths)
    assert seen[-1].tokens == sum(lengths)
    assert collected.summary.usage.host_bytes > 50_000_000
    with pytest.raises(TraceError, match="the trace was saved before"):
        collected.save(tmp_path / "again")


def test_the_engine_stays_for_the_next_trace(collector: TraceCollector, tmp_path: Path) -> None:
    engine = collector.start()
    first = collector.collect_from_datasets(["demo-math"], num_problems=2, sampling=Sampling(max_new_tokens=3))
    second = collector.collect_from_datasets(["demo-math"], num_problems=2, sampling=Sampling(max_new_tokens=3))
    assert collector.start() is engine
    a, b = first.save(tmp_path / "a"), second.save(str(tmp_path / "b"))
    assert a.to_arrow().equals(b.to_arrow())
    with pytest.raises(TraceError, match="already holds a trace"):
        collector.collect_from_datasets(["demo-math"], num_problems=1, sampling=Sampling(max_new_tokens=1)).save(a.path)
    assert Trace.open(a.path).num_rows == a.num_rows


def test_unknown_models_are_refused_before_anything_starts() -> None:
    with pytest.raises(ModelError, match="unknown model 'mixtrall'"):
        TraceCollector("mixtrall")
    with pytest.raises(ModelError, match=r"modal run modal_jobs/quantize.py --model qwen1\.5-moe"):
        TraceCollector("qwen1.5-moe", precision="awq")


def test_on_a_gpu_the_preset_decides_checkpoint_batch_and_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A GPU that is not there, and a config as if Mixtral's AWQ files were.
    from profiler.models import resolve as models
    from profiler.models.gpus import GPUS

    config = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_hidden_layers": 32, "hidden_size": 4096}
    config |= {"num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32768}
    monkeypatch.setattr(models, "_read_config", lambda location, revision: config)
    found = {}
    for name in ("A100-40GB", "A100-80GB", "H200"):
        monkeypatch.setattr("profiler.collect.collector.local_gpu", lambda name=name: GPUS[name])
        collector = TraceCollector("mixtral-8x7b")
        found[name] = (collector.model.location, collector.options.batch, collector.options.max_length)
    assert found["A100-80GB"] == ("TheBloke/Mixtral-8x7B-v0.1-AWQ", 256, 32768)
    assert found["H200"] == ("mistralai/Mixtral-8x7B-v0.1", 234, 32768)
    # (0.9 x 40 - 24.75 - 2) GB of 131,072 bytes: 70,000 tokens.
    assert found["A100-40GB"] == ("TheBloke/Mixtral-8x7B-v0.1-AWQ", 68, 32768)
    given = TraceCollector("mixtral-8x7b", engine_options=EngineOptions(batch=7, max_length=512))
    assert (given.options.batch, given.options.max_length) == (7, 512)
