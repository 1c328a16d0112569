"""prime-rl's training batches: MessagePack whose fields are found by what they are, as releases order them differently."""

from __future__ import annotations

import io
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.samples import packed

from profiler.errors import TraceError
from profiler.importers import import_trace, msgpack
from profiler.trace.reader import Trace

# The last token is padding.
ROUTES = np.array([[[3, 1], [5, 2]], [[2, 0], [1, 4]], [[0, 0], [0, 0]]], np.int16)


def routes(array: np.ndarray = ROUTES) -> list[object]:
    return [array.tobytes(), list(array.shape), str(array.dtype)]


def convert(tmp_path: Path, *samples: list[Any]) -> Trace:
    (tmp_path / "rollouts.bin").write_bytes(packed([list(samples), 7]))
    return import_trace(tmp_path / "rollouts.bin", tmp_path / "t", format_name="prime-rl")


@pytest.mark.parametrize(
    "sample",
    [
        [[11, 12, 13], [False, True, True], [0.5] * 3, [1.0] * 3, "env", None, routes()],
        [[11], [False], [12, 13], [True, True], [0.5] * 2, [1.0] * 2, "env", None, routes(ROUTES.astype(np.uint8))],
    ],
    ids=["one sequence with a mask", "prompt and completion"],
)
def test_tokens_phases_and_routes_are_found_in_either_layout(tmp_path: Path, sample: list[Any]) -> None:
    trace = convert(tmp_path, sample, sample[:-1])
    assert trace.load().expert_ids_TLK.tolist() == ROUTES[:2].tolist()
    assert trace.tokens.column("vocab_id").to_pylist() == [11, 12, 13]
    assert trace.tokens.column("phase").to_pylist() == ["prefill", "decode", "decode"]
    assert trace.problems.column("source_key").to_pylist() == ["0"]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32"])
@pytest.mark.parametrize("dense", [0, -1])
def test_dense_layers_are_zero_or_minus_one(tmp_path: Path, dtype: str, dense: int) -> None:
    ids_TLK = np.insert(ROUTES[:2], 0, 0 if dtype == "uint8" else dense, axis=1).astype(dtype)
    trace = convert(tmp_path, [[11, 12, 13], [True] * 3, routes(ids_TLK)])
    assert trace.metadata.model.moe_layers == [1, 2]
    assert trace.load().expert_ids_TLK.tolist() == ROUTES[:2].tolist()
    assert "layers that are 0 or -1 throughout were taken as dense: 0" in trace.metadata.gaps


def test_expert_0_is_not_padding_except_at_the_end(tmp_path: Path) -> None:
    ids_TLK = np.array([[[0], [0]], [[0], [3]], [[0], [0]], [[2], [1]], [[0], [0]], [[0], [0]]], np.uint8)
    trace = convert(tmp_path, [[11, 12, 13, 14, 15, 16], [True] * 6, routes(ids_TLK)])
    assert trace.load().expert_ids_TLK.tolist() == ids_TLK[:4].tolist()


def test_samples_keep_their_numbers_where_some_have_no_routes(tmp_path: Path) -> None:
    sample = [[11, 12, 13], [False, True, True], routes()]
    trace = convert(tmp_path, sample[:2], sample, sample[:2], sample)
    assert trace.problems.column("source_key").to_pylist() == ["1", "3"]
    assert "2 samples left out: no routed experts" in trace.metadata.gaps


def test_steps_are_read_in_their_order(tmp_path: Path) -> None:
    for step in (10, 9):
        folder = tmp_path / "rollouts" / f"step_{step}"
        folder.mkdir(parents=True)
        (folder / "rollouts.bin").write_bytes(packed([[[[step, 1, 2], [True] * 3, routes()]], step]))
    trace = import_trace(tmp_path / "rollouts", tmp_path / "t", format_name="prime-rl")
    assert trace.problems.column("source_key").to_pylist() == ["step_9/0", "step_10/0"]


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ([[1, 2, 3], [True] * 3, [ROUTES.tobytes(), [3, 2, 3], "int16"]], "24 bytes of int16, which is not a shape"),
        ([[1, 2, 3], [True] * 3, [ROUTES.tobytes(), [3, 2, -2], "int16"]], "below 0"),
        ([[1, 2, 3], [True] * 2, routes()], "expected token ids and a mask of the same length"),
        ([routes()], "expected token ids and a mask"),
        ([[1, 2, 3], [True] * 3], "no sample has routed experts"),
    ],
)
def test_broken_samples_are_refused(tmp_path: Path, sample: list[Any], reason: str) -> None:
    with pytest.raises(TraceError, match=reason):
        convert(tmp_path, sample)


def decode(data: bytes) -> Any:
    """A value in the place of the only sample."""
    (value,) = msgpack.entries_of_first(io.BytesIO(b"\x91\x91" + data))
    return value


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"\x90", "the list is empty"), (b"\x05", "expected a list of lists"), (b"\x91\xa0", "expected a list of lists")],
)
def test_what_does_not_begin_with_a_list_of_samples_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        list(msgpack.entries_of_first(io.BytesIO(data)))


def test_one_sample_is_in_memory_at_a_time(tmp_path: Path) -> None:
    sample = [[1, 2, 3], [True] * 3, routes(), bytes(1 << 20)]
    (tmp_path / "rollouts.bin").write_bytes(packed([[sample] * 20, [bytes(1 << 20)] * 2]))
    with (tmp_path / "rollouts.bin").open("rb") as file:
        tracemalloc.start()
        assert sum(len(found) for found in msgpack.entries_of_first(file)) == 20 * 4
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    # Two are there while the next one is decoded.
    assert peak < 3.5 * (1 << 20)


VALUES = [
    None,
    True,
    False,
    0,
    -1,
    127,
    -33,
    2**40,
    -(2**40),
    0.5,
    math.inf,
    "é",
    b"\x00\xff",
    [],
    [1, [2.5, ["x"]]],
    list(range(300)),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:20])
def test_messagepack_is_decoded_as_it_was_encoded(value: object) -> None:
    assert decode(packed(value)) == value


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"\x05", 5),
        (b"\xff", -1),
        (b"\xcc\xc8", 200),
        (b"\xd1\xff\x38", -200),
        (b"\xca\x3f\x00\x00\x00", 0.5),
        (b"\xa2hi", "hi"),
        (b"\xd9\x02hi", "hi"),
        (b"\xc4\x02hi", b"hi"),
        (b"\x92\x01\xc0", [1, None]),
        (b"\xdc\x00\x01\xc3", [True]),
        (b"\x81\xa1a\x01", {"a": 1}),
        (b"\xde\x00\x01\xa1a\x01", {"a": 1}),
    ],
)
def test_every_width_of_the_specification_is_decoded(data: bytes, value: object) -> None:
    assert decode(data) == value


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "ends within a value"),
        (b"\x92\x01", "ends within a value"),
        (b"\x01\x02", "1 bytes follow"),
        (b"\xc1", "type 0xc1"),
        (b"\xd4\x01\x02", "type 0xd4"),
        (b"\x91" * 100, "nested more than 32 deep"),
        (b"\x81\x90\x01", "a key that is a list"),
        (b"\xdd\xff\xff\xff\xff", "ends within a value"),
    ],
)
def test_broken_messagepack_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode(data)


@pytest.mark.parametrize("sample", [[bytes(100)], ["text"] * 20, [1] * 100], ids=["one", "several", "numbers"])
def test_the_bytes_of_a_sample_are_limited(monkeypatch: pytest.MonkeyPatch, sample: list[Any]) -> None:
    """Those of each sample by itself: a file may have any number of them."""
    size, data = len(packed(sample)), packed([[sample] * 3])
    monkeypatch.setattr(msgpack, "MAX_BYTES", size)
    assert list(msgpack.entries_of_first(io.BytesIO(data))) == [sample] * 3
    monkeypatch.setattr(msgpack, "MAX_BYTES", size - 1)
    with pytest.raises(ValueError, match=f"a value of more than {size - 1} bytes"):
        list(msgpack.entries_of_first(io.BytesIO(data)))


@pytest.mark.parametrize(
    ("entry", "count"),
    [(b"\x90", 20), (b"\x80", 20), (b"\xa0", 20), (b"\xdd\0\0\0\0", 20), (b"\xc4\0", 20), (b"\x00", 40), (b"\xc3", 40)],
    ids=["lists", "dictionaries", "texts", "long lists", "bytes", "numbers", "truths"],
)
def test_what_becomes_much_larger_than_the_file_is_refused(monkeypatch: pytest.MonkeyPatch, entry: bytes, count: int) -> None:
    data = b"\xdc\0" + bytes([count]) + entry * count
    assert len(decode(data)) == count
    monkeypatch.setattr(msgpack, "MAX_OBJECTS", 10)
    monkeypatch.setattr(msgpack, "MAX_VALUES", 30)
    with pytest.raises(ValueError, match="more than 10 lists, dictionaries and texts, or 30 values"):
        decode(data)
