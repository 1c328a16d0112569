"""Rollouts of reinforcement learning: read as tensors and plain values, and refused where a pickle would have to be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from profiler.errors import TraceError
from profiler.importers import find_format, import_trace
from profiler.trace.reader import Trace

ROUTES = np.array([[[0, 0], [3, 1], [5, 2]], [[0, 0], [2, 0], [1, 4]], [[0, 0], [7, 6], [0, 1]]], np.int32)


def sample(**changes: object) -> dict[str, object]:
    row = {
        "prompt": "Why?",
        "tokens": [11, 12, 13, 14],
        "response": "So.",
        "response_length": 2,
        "rollout_routed_experts": ROUTES,
    }
    return row | changes


def save(tmp_path: Path, samples: list[Any]) -> Path:
    torch.save({"rollout_id": 3, "metadata": {}, "samples": samples}, tmp_path / "rollout_3.pt")
    return tmp_path / "rollout_3.pt"


def convert(tmp_path: Path, samples: list[Any]) -> Trace:
    source = save(tmp_path, samples)
    assert find_format(source).name == "slime"
    return import_trace(source, tmp_path / "t")


@pytest.mark.parametrize(
    "routes",
    [ROUTES, torch.from_numpy(ROUTES), ROUTES.astype(np.uint8), ROUTES - (np.arange(3) == 0)[:, None].astype(np.int32)],
    ids=["numpy", "tensor", "uint8", "dense layers of -1"],
)
def test_rollouts_have_routes_tokens_phases_and_text(tmp_path: Path, routes: object) -> None:
    without = sample(rollout_routed_experts=None)
    trace = convert(tmp_path, [without, sample(rollout_routed_experts=routes), without])
    assert trace.metadata.model.moe_layers == [1, 2]
    assert trace.load().expert_ids_TLK.tolist() == ROUTES[:, 1:].tolist()
    assert trace.tokens.column("vocab_id").to_pylist() == [11, 12, 13, 14]
    assert trace.tokens.column("phase").to_pylist() == ["prefill", "prefill", "decode", "decode"]
    (problem,) = trace.problems.to_pylist()
    assert (problem["source_key"], problem["prompt"], problem["output"]) == ("rollout_3/1", "Why?", "So.")
    assert "layers that are 0 or -1 throughout were taken as dense: 0" in trace.metadata.gaps
    assert "2 samples have no routed experts and were left out" in trace.metadata.gaps


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("executed",))


def huge() -> np.ndarray:
    """An array of a terabyte that a pickle could create without its content."""
    return np.broadcast_to(np.int32(1), (1 << 20, 512, 512))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"metadata": Evil()}, "tensors and plain values only"),
        ({"rollout_routed_experts": np.array([[[Evil()]]], object)}, "tensors and plain values only"),
        ({"rollout_routed_experts": ROUTES[0]}, r"int32 of shape \(3, 2\), expected whole numbers"),
        ({"rollout_routed_experts": ROUTES.astype(np.float32)}, "tensors and plain values only|expected whole numbers"),
        ({"rollout_routed_experts": torch.ones(1, dtype=torch.int32).expand(4, 9, 9)}, "more elements than its storage"),
        ({"tokens": [1, 2]}, "routes of 3 tokens, but there are 2"),
        ({"tokens": None}, "tokens: expected a list of whole numbers"),
        ({"response_length": 9}, "response_length 9, expected 0..4"),
        ({"rollout_routed_experts": ROUTES * 0}, "every layer is 0 or -1 throughout"),
    ],
)
def test_broken_rollouts_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(TraceError, match=reason):
        convert(tmp_path, [sample(**changes)])
    assert "executed" not in capsys.readouterr().out


def test_an_array_without_its_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "profiler.importers.slime.load_plain", lambda *_, **__: {"samples": [sample(rollout_routed_experts=huge())]}
    )
    with pytest.raises(TraceError, match="the rollout_routed_experts of its samples are larger than the file"):
        convert(tmp_path, [sample()])


@pytest.mark.parametrize("kind", ["numpy", "tensor"])
def test_an_array_that_many_samples_share_is_refused(tmp_path: Path, kind: str) -> None:
    ids_TLK = np.random.default_rng(0).random((3, 50, 128)).argsort(-1)[..., :64].astype(np.int32)
    shared = sample(rollout_routed_experts=ids_TLK if kind == "numpy" else torch.from_numpy(ids_TLK))
    convert(tmp_path, [shared])
    with pytest.raises(TraceError, match="the rollout_routed_experts of its samples are larger than the file"):
        import_trace(save(tmp_path, [shared] * 5), tmp_path / "u")
