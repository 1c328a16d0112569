"""Rollouts of reinforcement learning: read as tensors and plain values, and refused where a pickle would have to be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from profiler.errors import TraceError
from profiler.importers import find_format, import_trace, torch_files
from profiler.importers.torch_files import load_plain
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
    assert "2 samples left out: no routed experts" in trace.metadata.gaps


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("executed",))


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


class Called:
    """Pickled as a call of what the pickle of an array calls, followed by a state."""

    def __init__(self, function: Any, arguments: tuple[object, ...], state: object) -> None:
        self.reduced = (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


RECONSTRUCT = np.empty(0).__reduce__()[0]
EMPTY_ARRAY = (np.ndarray, (0,), b"b")


def array_of(shape: object = (3, 3, 2), kind: object = np.dtype("<i4"), raw: object = ROUTES.tobytes()) -> Called:
    return Called(RECONSTRUCT, EMPTY_ARRAY, (1, shape, kind, False, raw))


def dtype_of(*state: object, name: str = "i4") -> Called:
    return Called(np.dtype, (name, False, True), (3, *state))


@pytest.mark.parametrize(
    ("routes", "reason"),
    [
        (array_of(shape=(1 << 20, 512, 512)), "72 bytes whose shape is"),
        (array_of(shape=(-3, -3, 8)), "72 bytes whose shape is"),
        (array_of(shape=(3, 3, 2.0)), "72 bytes whose shape is"),
        (array_of(shape=(3, 3, 3)), "72 bytes whose shape is"),
        (array_of(raw=[Evil()] * 18), "tensors and plain values only"),
        (array_of(raw=[1] * 18), "not of whole numbers"),
        (array_of(shape=[3, 3, 2]), "not of whole numbers"),
        (array_of(kind=np.ndarray), "not of whole numbers"),
        (array_of(kind=dtype_of("!", None, None, None, -1, -1, 0)), "byte order '!'"),
        (array_of(kind=dtype_of()), "cannot be read|tensors and plain values only"),
        (np.zeros(3, "O"), "an array of 'O8', expected whole numbers"),
        (np.zeros(3, "V8"), "an array of 'V8', expected whole numbers"),
        (np.zeros(3, [("a", "i4")]), "an array of 'V4', expected whole numbers"),
        (np.zeros(3, "f4"), "an array of 'f4', expected whole numbers"),
        (np.zeros(3, "M8[s]"), "an array of 'M8', expected whole numbers"),
        (np.zeros((3, 3)), "expected whole numbers"),
        (Called(np.ndarray, ((1 << 40,),), None), "expected whole numbers"),
        (np.int32(3), "tensors and plain values only"),
    ],
)
def test_arrays_that_are_not_plain_numbers_are_refused(tmp_path: Path, routes: object, reason: str) -> None:
    with pytest.raises(TraceError, match=reason):
        convert(tmp_path, [sample(rollout_routed_experts=routes)])


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    "kind", [f"{order}{name}" for order in "<>" for name in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8")]
)
def test_arrays_of_whole_numbers_are_read_in_any_layout(tmp_path: Path, kind: str, order: Literal["C", "F"]) -> None:
    source = save(tmp_path, [sample(rollout_routed_experts=ROUTES.astype(kind, order=order))])
    (found,) = load_plain(source, arrays=True)["samples"]
    array = found["rollout_routed_experts"].array
    assert array.dtype == np.dtype(kind)
    assert (array == ROUTES).all()


def test_a_state_cannot_change_what_a_dtype_is(tmp_path: Path) -> None:
    """Flags, fields and a subarray in the state are not looked at."""
    kind = dtype_of("<", (np.dtype("<i4"), (9,)), ("a",), {"a": (0,)}, 400, 4, 63)
    trace = convert(tmp_path, [sample(rollout_routed_experts=array_of(kind=kind))])
    assert trace.load().expert_ids_TLK.tolist() == ROUTES[:, 1:].tolist()


@pytest.mark.parametrize("entry", [{}, [], (), 0.5, True, "a"], ids=str)
def test_a_pickle_of_too_many_values_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: object) -> None:
    large = np.zeros((3, 3, 2000), np.int32)
    monkeypatch.setattr(torch_files, "MAX_OPERATIONS", 400)
    load_plain(save(tmp_path, [sample(rollout_routed_experts=large)]), arrays=True)
    with pytest.raises(TraceError, match="more than 400 values besides those of arrays"):
        load_plain(save(tmp_path, [sample(), sample(metadata=[entry] * 500)]), arrays=True)


@pytest.mark.parametrize("kind", ["numpy", "tensor"])
def test_an_array_that_many_samples_share_is_refused(tmp_path: Path, kind: str) -> None:
    ids_TLK = np.random.default_rng(0).random((3, 50, 128)).argsort(-1)[..., :64].astype(np.int32)
    shared = sample(rollout_routed_experts=ids_TLK if kind == "numpy" else torch.from_numpy(ids_TLK))
    convert(tmp_path, [shared])
    with pytest.raises(TraceError, match="the rollout_routed_experts of its samples are larger than the file"):
        import_trace(save(tmp_path, [shared] * 5), tmp_path / "u")
