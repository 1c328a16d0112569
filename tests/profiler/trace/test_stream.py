"""Streams of a running capture: readable to the last whole block, wherever they were cut off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc

from profiler.errors import TraceError
from profiler.trace.schema import ModelMetadata, RecordMetadata
from profiler.trace.stream import ROUTING_STREAM, CaptureIndex, RoutingWriter, gather, read_index

MODEL = ModelMetadata(id="synthetic", moe_layers=[0, 1], num_experts=4, top_k=2)


def write(folder: Path, blocks: int, tokens: int = 3) -> Path:
    with RoutingWriter(folder, MODEL) as writer:
        for number in range(blocks):
            ids = np.tile([number % 4, (number + 1) % 4], (tokens, 2, 1))
            writer.add(number, np.arange(tokens), ids, np.tile([0.75, 0.25], (tokens, 2, 1)))
    return folder / ROUTING_STREAM


def experts(index: CaptureIndex, tokens: list[int]) -> list[int]:
    shape = (len(tokens), 2, 2)
    into: dict[str, npt.NDArray[Any]] = {"expert_ids": np.empty(shape, np.uint8), "weights": np.empty(shape, np.float16)}
    gather(index, np.array(tokens), into, np.arange(len(tokens)))
    assert (into["weights"][:, 0] == [0.75, 0.25]).all()
    found: list[int] = into["expert_ids"][:, 0, 0].tolist()
    return found


def test_tokens_are_found_in_any_order(tmp_path: Path) -> None:
    index = read_index(write(tmp_path, blocks=4))
    assert index is not None
    assert index.problem_ids_N.tolist() == np.repeat(np.arange(4), 3).tolist()
    assert experts(index, [11, 0, 5, 3, 4]) == [3, 0, 1, 1, 1]


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, 1))
def test_a_stream_cut_off_anywhere_has_all_blocks_before_the_cut(tmp_path_factory: pytest.TempPathFactory, cut: float) -> None:
    path = write(tmp_path_factory.mktemp("cut"), blocks=5)
    whole = read_index(path)
    assert whole is not None
    content = path.read_bytes()
    size = int(cut * len(content))
    path.write_bytes(content[:size])
    index = read_index(path)
    ends = [*whole.offsets[1:], len(content) - 8]  # the end of the stream has 8 bytes of its own
    assert (0 if index is None else len(index.offsets)) == sum(end <= size for end in ends)


def test_blocks_are_readable_while_the_writer_goes_on(tmp_path: Path) -> None:
    writer = RoutingWriter(tmp_path, MODEL)
    assert read_index(tmp_path / ROUTING_STREAM) is None
    writer.add(7, np.arange(2), np.tile([0, 1], (2, 2, 1)), np.tile([0.5, 0.5], (2, 2, 1)))
    index = read_index(tmp_path / ROUTING_STREAM)
    assert index is not None
    assert index.problem_ids_N.tolist() == [7, 7]


def test_a_full_disk_leaves_the_blocks_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RoutingWriter(tmp_path, MODEL)
    block = np.tile([0, 1], (2, 2, 1)), np.tile([0.5, 0.5], (2, 2, 1))
    writer.add(0, np.arange(2), *block)
    size = (tmp_path / ROUTING_STREAM).stat().st_size

    class Full:
        def write_batch(self, _: object) -> None:
            with (tmp_path / ROUTING_STREAM).open("ab") as file:
                file.write(b"half a block")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_stream", Full())
    with pytest.raises(OSError, match="No space left"):
        writer.add(1, np.arange(2), *block)
    writer.close()
    assert (tmp_path / ROUTING_STREAM).stat().st_size == size
    index = read_index(tmp_path / ROUTING_STREAM)
    assert index is not None
    assert index.problem_ids_N.tolist() == [0, 0]


def test_an_existing_stream_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path, blocks=1)
    with pytest.raises(TraceError, match="exists already: a capture needs a new folder"):
        RoutingWriter(tmp_path, MODEL)


def test_a_stream_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / ROUTING_STREAM
    for metadata in (None, {b"specmoe.capture": b'{"layers": [0], "types": {"x": ["|O", 8]}}'}):
        schema = pa.schema([("problem_id", pa.int32()), ("token_id", pa.int32()), ("x", pa.binary(8))], metadata=metadata)
        with pa.OSFile(str(path), "wb") as file, ipc.new_stream(file, schema) as stream:
            stream.write_batch(pa.RecordBatch.from_pylist([{"problem_id": 0, "token_id": 0, "x": b"12345678"}], schema=schema))
        with pytest.raises(TraceError, match="is not a captured stream"):
            read_index(path)


def test_compressed_blocks_are_not_unpacked(tmp_path: Path) -> None:
    """A few bytes of an untrusted stream must not become gigabytes."""
    schema = read_schema(write(tmp_path / "ours", blocks=1))
    path = tmp_path / ROUTING_STREAM
    rows = 100_000
    packed = [pa.array([bytes(field.type.byte_width)] * rows, field.type) for field in list(schema)[2:]]
    columns = [pa.array(np.zeros(rows, np.int32))] * 2 + packed
    options = ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(path), "wb") as file, ipc.new_stream(file, schema, options=options) as stream:
        stream.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    assert path.stat().st_size < 10_000
    assert read_index(path) is None


def read_schema(path: Path) -> pa.Schema:
    with pa.OSFile(str(path)) as file:
        return ipc.open_stream(file).schema


@pytest.mark.parametrize(("problem", "token"), [(-1, 0), (0, -1), (2**31, 0), (0, 2**31)])
def test_numbers_that_no_table_holds_are_refused(tmp_path: Path, problem: int, token: int) -> None:
    ids, weights = np.tile([0, 1], (1, 2, 1)), np.tile([0.5, 0.5], (1, 2, 1))
    with pytest.raises(TraceError, match="a problem_id or token_id is negative or does not fit into int32"):
        RoutingWriter(tmp_path, MODEL).add(problem, np.array([token]), ids, weights)


def test_empty_slots_and_missing_weights_have_streams_of_their_own_form(tmp_path: Path) -> None:
    with RoutingWriter(tmp_path, MODEL, RecordMetadata(weights=False, empty_slots=1)) as writer:
        writer.add(0, np.arange(1), np.array([[[1, 4], [4, 4]]]))
        with pytest.raises(TraceError, match=r"expected 0\.\.4"):
            writer.add(0, np.arange(1), np.array([[[1, 5], [4, 4]]]))
    index = read_index(tmp_path / ROUTING_STREAM)
    assert index is not None
    assert list(index.layout.types) == ["expert_ids"]


def test_file_systems_without_maps_and_locks_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import fcntl

    from profiler.capture.sealing import run_folder, seal
    from profiler.trace.writer import exclusive

    def seal_copy(name: str) -> bytes:
        directory = tmp_path / name
        write(run_folder(directory, 0), blocks=4)
        seal(directory, MODEL, dict.fromkeys(range(4), 4))
        return (directory / "routing" / "part-00000.parquet").read_bytes()

    def no_map(path: str) -> None:
        raise OSError(errno.ENODEV, "no such device")

    def no_lock(handle: int, flags: int) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    mapped = seal_copy("mapped")
    monkeypatch.setattr("profiler.trace.stream.pa.memory_map", no_map)
    assert seal_copy("plain") == mapped
    monkeypatch.setattr(fcntl, "flock", no_lock)
    with exclusive(tmp_path):
        pass
