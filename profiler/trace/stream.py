"""Write and read the rows of a running capture: Arrow IPC streams, readable up to the last block if the process is killed.

One row per token, its `[L, W]` values packed as bytes. Rows are neither compressed nor sorted, because the engine waits for the
writer. `profiler.capture.sealing` turns streams into the files of the trace.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import ipc

from profiler.errors import UNREADABLE, TraceError, first_line
from profiler.trace.rows import check_ids, check_weights
from profiler.trace.schema import MAX_HIDDEN_SIZE, MAX_TOP_K, ModelMetadata, RecordMetadata, expert_dtype

ROUTING_STREAM, LOGITS_STREAM, HIDDEN_STREAM = "routing.arrows", "logits.arrows", "hidden.arrows"
# The vocabulary id that the model read at each captured position; `profiler.capture.inputs` compares it with the sequence.
INPUTS_STREAM = "inputs.arrows"
# The key in the metadata of a stream's schema that holds its layout: layers, element types and widths.
LAYOUT_KEY = b"specmoe.capture"
MAPPED_BYTES = 64 << 20
ELEMENT_TYPES = ("|u1", "<u2", "<i4", "<f2")

Problems = int | npt.NDArray[np.integer[Any]]
"""Problem ids of a block of tokens: one for all of them `[]`, or one per token `[T]`."""


@dataclass(frozen=True)
class StreamLayout:
    """The shape of each token in a stream: its L layers, and the element type and width W of each column."""

    layers: list[int]
    types: dict[str, tuple[np.dtype[Any], int]]

    def schema(self) -> pa.Schema:
        """The Arrow schema of the stream; its metadata contains this layout, so that `of` can read it back."""
        document = {"layers": self.layers, "types": {name: [kind.str, width] for name, (kind, width) in self.types.items()}}
        columns = [(name, pa.binary(self.row_bytes(name))) for name in self.types]
        keys = [("problem_id", pa.int32()), ("token_id", pa.int32())]
        return pa.schema([*keys, *columns], metadata={LAYOUT_KEY: json.dumps(document)})

    def row_bytes(self, column: str) -> int:
        """The size in bytes of one token in `column`."""
        kind, width = self.types[column]
        return len(self.layers) * width * kind.itemsize

    @classmethod
    def of(cls, schema: pa.Schema) -> Self:
        """The layout in a stream's schema. Raises `ValueError` or another error of parsing if it is not a capture's."""
        document = json.loads((schema.metadata or {})[LAYOUT_KEY])
        layers = [int(layer) for layer in document["layers"]]
        types = {}
        for name, (kind, width) in document["types"].items():
            if kind not in ELEMENT_TYPES or not 1 <= int(width) <= max(MAX_TOP_K, MAX_HIDDEN_SIZE):
                raise ValueError(f"column {name!r} of {width} {kind}")
            types[str(name)] = (np.dtype(kind), int(width))
        layout = cls(layers, types)
        if not layers or not types or schema.remove_metadata() != layout.schema().remove_metadata():
            raise ValueError("its columns differ from the layout in its metadata")
        return layout


class CaptureWriter:
    """Append blocks of tokens to the stream `path`. Every block is readable as soon as `add_tokens` returns.

    Raises `TraceError` if the file exists. After an `OSError` (a full disk), earlier blocks stay readable.
    """

    def __init__(self, path: Path, layout: StreamLayout) -> None:
        if path.exists():
            raise TraceError(f"{path} exists already: a capture needs a new folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._layout = layout
        self._schema = layout.schema()
        self._file = pa.OSFile(str(path), "wb")
        self._stream: Any = ipc.new_stream(self._file, self._schema)

    def add_tokens(
        self, problems: Problems, token_ids_T: npt.NDArray[np.integer[Any]], values: dict[str, npt.NDArray[Any]]
    ) -> None:
        """Append tokens of one problem or of several. `values` maps each column to an array `[T, L, W]`.

        Raises `TraceError` if a shape differs, or if a problem or token id is negative or does not fit into int32.
        """
        layout = self._layout
        for name, (_, width) in layout.types.items():
            expected = (len(token_ids_T), len(layout.layers), width)
            if values[name].shape != expected:
                raise TraceError(f"{problems_in_words(problems)}: {name} of shape {values[name].shape}, expected {expected}")
        if len(token_ids_T) == 0:
            return
        for ids in (problems, token_ids_T):
            if np.min(ids) < 0 or np.max(ids) >= 2**31:
                raise TraceError(
                    f"{problems_in_words(problems)}: a problem_id or token_id is negative or does not fit into int32"
                )
        problem_ids_T = np.ascontiguousarray(np.broadcast_to(np.asarray(problems, dtype=np.int32), token_ids_T.shape))
        arrays = [pa.array(problem_ids_T), pa.array(token_ids_T.astype(np.int32, copy=False))]
        for name, (kind, _) in layout.types.items():
            packed = pa.py_buffer(np.ascontiguousarray(values[name], dtype=kind).reshape(-1))
            arrays.append(pa.Array.from_buffers(self._schema.field(name).type, len(token_ids_T), [None, packed]))
        whole = self._file.tell()
        try:
            self._stream.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        except OSError:
            # The torn block would take up space on the full disk, and no reader could use it.
            self._stream = None
            self._file.close()
            os.truncate(self._path, whole)
            raise

    def close(self) -> None:
        """End the stream."""
        if self._stream is not None:
            self._stream.close()
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


class RoutingWriter(CaptureWriter):
    """Write routing to `folder`: K pairs of expert id and weight per token in each of the L MoE layers, in any order."""

    def __init__(self, folder: Path, model: ModelMetadata, record: RecordMetadata | None = None) -> None:
        record = record or RecordMetadata()
        # Empty slots hold the id E.
        self._ids = model.num_experts + bool(record.empty_slots)
        types = {"expert_ids": (expert_dtype(self._ids), model.top_k)}
        if record.weights:
            types["weights"] = (np.dtype(np.float16), model.top_k)
        super().__init__(folder / ROUTING_STREAM, StreamLayout(model.moe_layers, types))

    def add(
        self,
        problems: Problems,
        token_ids_T: npt.NDArray[np.integer[Any]],
        expert_ids_TLK: npt.NDArray[np.integer[Any]],
        weights_TLK: npt.NDArray[np.floating[Any]] | None = None,
    ) -> None:
        """Append tokens of one problem, or of one problem per token. Weights of empty slots are 0.

        Raises `TraceError` if shapes differ, if an id is negative, if an expert id is not in 0..E-1, or if a weight is negative
        or not a finite float16. Repeated experts are detected later, when the trace is sealed.
        """
        check_ids(expert_ids_TLK, self._ids, problems_in_words(problems))
        values: dict[str, npt.NDArray[Any]] = {"expert_ids": expert_ids_TLK}
        if weights_TLK is not None:
            values["weights"] = check_weights(weights_TLK, problems_in_words(problems))
        self.add_tokens(problems, token_ids_T, values)


class ValuesWriter(CaptureWriter):
    """Write float16 vectors of width W (router logits or router inputs) per token in each of the L layers."""

    def __init__(self, path: Path, layers: list[int], column: str, width: int) -> None:
        super().__init__(path, StreamLayout(layers, {column: (np.dtype(np.float16), width)}))
        self._column = column

    def add(self, problems: Problems, token_ids_T: npt.NDArray[np.integer[Any]], values_TLW: npt.NDArray[np.float16]) -> None:
        """Append tokens of one problem, or of one problem per token.

        Raises `TraceError` if the shape or type differs, or if a value is not a finite number.
        """
        if values_TLW.dtype != np.float16:
            raise TraceError(f"{problems_in_words(problems)}: {self._column} of {values_TLW.dtype}, expected float16")
        if not np.isfinite(values_TLW).all():
            raise TraceError(f"{problems_in_words(problems)}: {self._column} contain a value that is not a finite float16")
        self.add_tokens(problems, token_ids_T, {self._column: values_TLW})


INPUTS_LAYOUT = StreamLayout([0], {"vocab_ids": (np.dtype(np.int32), 1)})


class InputsWriter(CaptureWriter):
    """Write the vocabulary id of each captured token to `folder`, in any order."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / INPUTS_STREAM, INPUTS_LAYOUT)

    def add(
        self, problems: Problems, token_ids_T: npt.NDArray[np.integer[Any]], vocab_ids_T: npt.NDArray[np.integer[Any]]
    ) -> None:
        """Append tokens of one problem, or of one problem per token. Negative vocabulary ids mean unknown."""
        self.add_tokens(problems, token_ids_T, {"vocab_ids": vocab_ids_T.reshape(-1, 1, 1)})


def problems_in_words(problems: Problems) -> str:
    """The problems of a block, as text for messages."""
    # Not np.unique, which is slower: this runs for every block, while the engine may be waiting.
    first, last = (np.min(problems), np.max(problems)) if np.size(problems) else (0, -1)
    return f"problem {first}" if first == last else f"problems {first}..{last}"


@dataclass(frozen=True)
class CaptureIndex:
    """Where the tokens of a stream are. All arrays are `[N]`, in the order in which tokens were written.

    offsets: byte offsets of the blocks. block_N: the index into `offsets` of the token's block; row_N: its row in that block.
    """

    path: Path
    layout: StreamLayout
    offsets: list[int]
    problem_ids_N: npt.NDArray[np.int32]
    token_ids_N: npt.NDArray[np.int32]
    block_N: npt.NDArray[np.int32]
    row_N: npt.NDArray[np.int32]


def read_index(path: Path) -> CaptureIndex | None:
    """Find the tokens of a stream, up to its last complete block. None if the file does not exist or has no complete block.

    Raises `TraceError` if the file is a stream of something else.
    """
    if not path.is_file() or path.stat().st_size == 0:
        return None
    with _mapped(path) as file:
        try:
            schema = ipc.read_schema(file)
        except UNREADABLE:
            # The writer was killed before the first block.
            return None
        offset = file.tell()
    layout = _layout_of(path, schema)
    offsets: list[int] = []
    problems: list[npt.NDArray[np.int32]] = []
    tokens: list[npt.NDArray[np.int32]] = []
    while offset is not None:
        offset = _read_keys(path, schema, offset, offsets, problems, tokens)
    if not offsets:
        return None
    counts = np.array([len(block) for block in problems], dtype=np.int32)
    return CaptureIndex(
        path=path,
        layout=layout,
        offsets=offsets,
        problem_ids_N=np.concatenate(problems),
        token_ids_N=np.concatenate(tokens),
        block_N=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        row_N=np.concatenate([np.arange(count, dtype=np.int32) for count in counts]),
    )


def _layout_of(path: Path, schema: pa.Schema) -> StreamLayout:
    try:
        return StreamLayout.of(schema)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TraceError(f"{path} is not a captured stream: {first_line(error)}") from error


def _read_keys(
    path: Path,
    schema: pa.Schema,
    start: int,
    offsets: list[int],
    problems: list[npt.NDArray[np.int32]],
    tokens: list[npt.NDArray[np.int32]],
) -> int | None:
    """Append the keys of the blocks from byte `start` on. Returns where to continue, or None at the end.

    The file is mapped again every `MAPPED_BYTES`: until it is unmapped, every page that was read counts as this process's
    memory.
    """
    with _mapped(path) as file:
        file.seek(start)
        while (offset := file.tell()) < start + MAPPED_BYTES:
            batch = _read_block(file, schema)
            if batch is None:
                return None
            # Copied, so that nothing refers to the mapped file.
            problem_ids_T, token_ids_T = (batch.column(key).to_numpy().copy() for key in (0, 1))
            if min(problem_ids_T.min(), token_ids_T.min()) < 0:
                raise TraceError(f"{path}, at byte {offset}: negative problem_id or token_id")
            offsets.append(offset)
            problems.append(problem_ids_T)
            tokens.append(token_ids_T)
    return int(offset)


def gather(
    index: CaptureIndex, tokens: npt.NDArray[np.integer[Any]], into: dict[str, npt.NDArray[Any]], at: npt.NDArray[Any]
) -> None:
    """Copy tokens of a stream (indices into its `[N]`) to the rows `at` of the arrays `into`, each `[T, L, W]`.

    The file is mapped only during the call, so the memory is that of the pages that hold these tokens.
    """
    block_T, row_T = index.block_N[tokens], index.row_N[tokens]
    order_T = np.argsort(block_T, kind="stable")
    starts = np.flatnonzero(np.diff(block_T[order_T], prepend=-1))
    with _mapped(index.path) as file:
        schema = ipc.read_schema(file)
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(order_T)], strict=True):
            here = order_T[start:end]
            file.seek(index.offsets[block_T[here[0]]])
            batch = _read_block(file, schema)
            if batch is None:
                raise TraceError(f"{index.path}: truncated while it was being read")
            for name, values in into.items():
                kind = np.void(index.layout.row_bytes(name)).dtype
                raw = np.frombuffer(batch.column(name).buffers()[1], dtype=kind, count=batch.num_rows)
                values.reshape(len(values), -1).view(raw.dtype)[at[here], 0] = raw[row_T[here]]


def read_blocks(
    path: Path, layout: StreamLayout
) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], dict[str, npt.NDArray[Any]]]]:
    """Problem ids `[T]`, token ids `[T]` and values `[T, L, W]` of each block, in the order in which they were written.

    Ends after the last complete block; nothing if the file does not exist. Raises `TraceError` if its columns are others.
    """
    if not path.is_file():
        return
    with pa.OSFile(str(path), "rb") as file:
        try:
            schema = ipc.read_schema(file)
        except UNREADABLE:
            # The writer was killed before the first block.
            return
        if _layout_of(path, schema) != layout:
            raise TraceError(f"{path}: its columns are not {', '.join(layout.types)} of layers {layout.layers}")
        while (batch := _read_block(file, schema)) is not None:
            problem_ids_T, token_ids_T = (batch.column(key).to_numpy() for key in (0, 1))
            if len(problem_ids_T) and min(problem_ids_T.min(), token_ids_T.min()) < 0:
                raise TraceError(f"{path}: negative problem_id or token_id")
            values = {}
            for name, (kind, width) in layout.types.items():
                count = batch.num_rows * len(layout.layers) * width
                packed = np.frombuffer(batch.column(name).buffers()[1], dtype=kind, count=count)
                values[name] = packed.reshape(batch.num_rows, len(layout.layers), width)
            yield problem_ids_T, token_ids_T, values


def _mapped(path: Path) -> pa.NativeFile:
    """The file mapped into memory, or opened as a plain file on file systems that cannot map it (some network ones)."""
    try:
        return pa.memory_map(str(path))
    except OSError:
        return pa.OSFile(str(path), "rb")


def _read_block(file: pa.NativeFile, schema: pa.Schema) -> pa.RecordBatch | None:
    """The next block; None at the end, and where the rest of the file is torn."""
    try:
        message = ipc.read_message(file)
        if _is_compressed(message.metadata.to_pybytes()):
            return None
        batch = ipc.read_record_batch(message, schema)
        batch.validate(full=True)
    except (*UNREADABLE, struct.error):
        return None
    torn = any(column.null_count or column.offset for column in batch.columns)
    return None if torn or batch.num_rows == 0 else batch


def _is_compressed(message: bytes) -> bool:
    """Whether a block's header declares compression. We never compress; a few untrusted bytes could expand to gigabytes.

    The header is a flatbuffer (apache/arrow, Message.fbs): field 2 of Message is the RecordBatch, whose field 3 is the
    compression.
    """

    def field(table: int, number: int) -> int | None:
        vtable = table - struct.unpack_from("<i", message, table)[0]
        (size,) = struct.unpack_from("<H", message, vtable)
        entry = 4 + 2 * number
        (offset,) = struct.unpack_from("<H", message, vtable + entry) if entry < size else (0,)
        return table + offset if offset else None

    (root,) = struct.unpack_from("<I", message, 0)
    header = field(root, 2)
    if header is None:
        return False
    return field(header + struct.unpack_from("<I", message, header)[0], 3) is not None
