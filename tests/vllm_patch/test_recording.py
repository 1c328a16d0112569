"""`Recording` without an engine: what it asks the workers, and what it believes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from profiler.capture.protocol import START, STOP
from profiler.errors import EngineError, TraceError
from profiler.live.metrics import TOKENS, Samples
from profiler.live.publication import Publication
from vllm_patch.recording import Recording, live_metrics

FACTS = {
    "moe_layers": [1, 3],
    "num_experts": 8,
    "top_k": 2,
    "hook": "a hook",
    "moe_kernels": {"Triton": None},
    "deviations": [],
}


class Engine:
    """Answers like a `vllm.LLM` with the plugin, for a model whose folder is `model`."""

    def __init__(self, model: Path) -> None:
        self.calls: list[str] = []
        config = SimpleNamespace(
            model_config=SimpleNamespace(model=str(model), revision=None, dtype="torch.float32"),
            cache_config=SimpleNamespace(enable_prefix_caching=False),
            speculative_config=None,
        )
        self.llm_engine = SimpleNamespace(vllm_config=config)

    def collective_rpc(self, name: str, args: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
        self.calls.append(name)
        if name == START:
            Path(args[0]).mkdir(parents=True)
            return [FACTS]
        return [{"waits": 0, "wait_seconds": 0.0}]


def test_an_error_after_the_start_stops_the_engine_from_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tmp_path)

    def fail(*_: Any) -> None:
        raise TraceError("the disk is full")

    monkeypatch.setattr("vllm_patch.recording.write_metadata", fail)
    monkeypatch.setattr(Recording, "_metadata", lambda self: None)
    with pytest.raises(TraceError, match="the disk is full"):
        Recording(engine, tmp_path / "trace").__enter__()
    assert engine.calls == [START, STOP]
    # The same engine can record into another folder.
    monkeypatch.undo()
    monkeypatch.setattr(Recording, "_metadata", lambda self: None)
    monkeypatch.setattr("vllm_patch.recording.write_metadata", lambda *_: None)
    Recording(engine, tmp_path / "other").__enter__()
    assert engine.calls == [START, STOP, START]


@pytest.mark.parametrize("outputs", [None, 3, SimpleNamespace(request_id="0", outputs=[], finished=True), [None], "text", [[]]])
def test_what_is_not_a_list_of_outputs_is_refused_by_add(outputs: Any, tmp_path: Path) -> None:
    recording = Recording(Engine(tmp_path), tmp_path / "trace")
    with pytest.raises(TraceError, match="cannot be added to a recording: expected"):
        recording.add(outputs)


def test_engines_of_other_classes_are_refused_before_they_record(tmp_path: Path) -> None:
    class AsyncLLM:
        async def collective_rpc(self, name: str) -> None:
            pytest.fail("was asked")

    with pytest.raises(EngineError, match=r"AsyncLLM cannot be recorded by Recording: expected a vllm\.LLM"):
        Recording(AsyncLLM(), tmp_path / "trace").__enter__()


@pytest.mark.parametrize("config", ['{"model_type": "llama"}', '{"moe_num_experts": 8}', "no JSON"])
def test_the_worker_is_believed_whatever_the_config_says(config: str, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    (tmp_path / "config.json").write_text(config)
    recording = Recording(Engine(tmp_path), tmp_path / "trace").__enter__()
    model = recording._metadata().model
    assert (model.moe_layers, model.num_experts, model.top_k, model.dtype) == ([1, 3], 8, 2, "float32")


def test_the_live_metrics_of_an_engine_are_those_that_it_publishes() -> None:
    samples = Samples()
    samples.add(TOKENS, 12.0)
    answer = {"publication": Publication("demo", "0", samples).to_json()}
    found = live_metrics(SimpleNamespace(collective_rpc=lambda name, args=(): [answer]))
    assert found == {TOKENS.name: {(): 12.0}}
    refusal = SimpleNamespace(collective_rpc=lambda name, args=(): [{"error": "no live metrics"}])
    with pytest.raises(EngineError, match="no live metrics"):
        live_metrics(refusal)
