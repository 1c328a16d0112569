"""The record as JSON lines, one row per (problem, token, MoE layer):

{"problem_id": 0, "layer": 0, "token_id": 0, "expert_ids": [3, 7], "weights": [0.6, 0.4]}
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from profiler.capture_stream import RoutingWriter
from profiler.errors import TraceError
from profiler.reader import Trace
from profiler.schema import MAX_EXPERTS, MAX_TOP_K, Metadata, ModelMetadata, RoutingChunk
from profiler.sealing import run_folder, seal
from profiler.writer import write_manifest, write_metadata

_LINE = '{{"problem_id": {}, "layer": {}, "token_id": {}, "expert_ids": [{}], "weights": [{}]}}\n'

_SCHEMA = pa.schema(
    [
        ("problem_id", pa.int32()),
        ("layer", pa.int16()),
        ("token_id", pa.int32()),
        ("expert_ids", pa.list_(pa.int32())),
        ("weights", pa.list_(pa.float32())),
    ]
)


def write_jsonl(trace: Trace, path: Path) -> int:
    """Write the trace's routing to `path` and return the number of lines. Weights round-trip to the same float16."""
    return _write(trace.chunks(), trace.metadata.model.moe_layers, path)


def _write(chunks: Iterator[RoutingChunk], moe_layers: list[int], path: Path) -> int:
    temporary = path.with_name(path.name + ".tmp")
    lines = 0
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for chunk in chunks:
                lines += _write_chunk(chunk, moe_layers, file)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    return lines


def _write_chunk(chunk: RoutingChunk, moe_layers: list[int], file: TextIO) -> int:
    assert chunk.weights_TLK is not None
    weight_text = _float16_texts()[chunk.weights_TLK.view(np.uint16)]
    tokens = zip(
        chunk.problem_ids_T.tolist(),
        chunk.token_ids_T.tolist(),
        chunk.expert_ids_TLK.tolist(),
        weight_text.tolist(),
        strict=True,
    )
    for problem_id, token_id, ids_LK, weights_LK in tokens:
        file.writelines(
            _LINE.format(problem_id, layer, token_id, ", ".join(map(str, ids_K)), ", ".join(weights_K))
            for layer, ids_K, weights_K in zip(moe_layers, ids_LK, weights_LK, strict=True)
        )
    return len(chunk) * len(moe_layers)


@functools.cache
def _float16_texts() -> npt.NDArray[Any]:
    """Shortest decimal text of every float16, indexed by its bits."""
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    return np.array([np.format_float_positional(value, trim="0") for value in values])


def read_jsonl(source: Path, directory: Path, *, num_experts: int | None = None) -> Trace:
    """Make the trace `directory` from the JSON lines `source`; rows may be in any order within a problem.

    num_experts: if None, the highest expert id plus one, and the metadata says that it was inferred.
    A token that lacks one of the MoE layers is an error, as are lists of differing length. Memory is that of one problem and
    one block of the file, provided that a problem's rows are adjacent; a problem that comes back later is an error too.
    Raises `TraceError` naming the file and what was expected.
    """
    if not source.is_file():
        raise TraceError(f"{source}: no such file")
    if directory.exists() and any(directory.iterdir()):
        raise TraceError(f"{directory} is not empty; choose another folder")
    layers, top_k, highest = _survey(source)
    if top_k > min(highest + 1, MAX_TOP_K):
        raise TraceError(f"{source}: {top_k} experts per token with ids up to {highest}: more than there can be")
    if num_experts is not None and not highest < num_experts <= MAX_EXPERTS:
        raise TraceError(f"{source}: expert id {highest}, expected below --num-experts, and that at most {MAX_EXPERTS}")
    model = ModelMetadata(id="unknown", moe_layers=layers, num_experts=num_experts or highest + 1, top_k=top_k)
    gaps = [] if num_experts else ["num_experts was inferred from the highest expert id"]
    metadata = Metadata(
        model=model, engine="unknown", hook="unknown", gaps=[*gaps, "no prompts, outputs or vocabulary ids"], command=[]
    )
    created = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        _fill(source, directory, metadata)
    except BaseException:
        shutil.rmtree(directory)
        if not created:
            directory.mkdir()
        raise
    return Trace.open(directory)


def _fill(source: Path, directory: Path, metadata: Metadata) -> None:
    model = metadata.model
    sequence_tokens: dict[int, int] = {}
    write_metadata(directory, metadata)
    with RoutingWriter(run_folder(directory, 0), model) as writer:
        for table in _problems(source):
            problem_id = int(table.column("problem_id")[0].as_py())
            if problem_id in sequence_tokens:
                raise TraceError(f"{source}: rows of problem {problem_id} are not adjacent; sort the file by problem_id")
            token_ids_T, ids_TLK, weights_TLK = _arrays(table, model.moe_layers, model.top_k, source)
            writer.add(problem_id, token_ids_T, ids_TLK, weights_TLK)
            sequence_tokens[problem_id] = int(token_ids_T[-1]) + 2
    missing = seal(directory, model, sequence_tokens)
    if missing:
        gap = f"{sum(map(len, missing.values()))} positions of {len(missing)} problems have no rows"
        write_metadata(directory, metadata.model_copy(update={"gaps": [*metadata.gaps, gap]}))
    write_manifest(directory)


def _survey(source: Path) -> tuple[list[int], int, int]:
    """MoE layers, K and the highest expert id of the file."""
    layers: set[int] = set()
    lengths: set[int] = set()
    highest = -1
    for batch in _batches(source):
        layers |= set(pc.unique(batch.column("layer")).to_pylist())
        for name in ("expert_ids", "weights"):
            lengths |= set(pc.unique(pc.list_value_length(batch.column(name))).to_pylist())
        ids = batch.column("expert_ids").flatten()
        if len(ids) and pc.min(ids).as_py() < 0:
            raise TraceError(f"{source}: negative expert id")
        highest = max(highest, pc.max(ids).as_py() if len(ids) else -1)
    if len(lengths) != 1 or highest < 0:
        raise TraceError(f"{source}: expert_ids and weights of {sorted(lengths)} entries, expected one length everywhere")
    if min(layers) < 0 or highest >= MAX_EXPERTS:
        raise TraceError(f"{source}: layer {min(layers)} or expert id {highest} is out of range")
    return sorted(layers), lengths.pop(), highest


def _problems(source: Path) -> Iterator[pa.Table]:
    """Runs of rows with the same problem_id."""
    carried: pa.Table | None = None
    for batch in _batches(source):
        table = pa.Table.from_batches([batch])
        if carried is not None:
            table = pa.concat_tables([carried, table])
        ids = table.column("problem_id").to_numpy()
        starts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 1))
        for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            yield table.slice(start, end - start)
        carried = table.slice(int(starts[-1]))
    if carried is not None:
        yield carried


def _batches(source: Path) -> Iterator[pa.RecordBatch]:
    options = pj.ParseOptions(explicit_schema=_SCHEMA, unexpected_field_behavior="ignore")
    try:
        for batch in pj.open_json(source, parse_options=options):
            if batch.num_rows == 0:
                continue
            for name in _SCHEMA.names:
                column = batch.column(name)
                nested = column.flatten() if pa.types.is_list(column.type) else column
                if column.null_count or nested.null_count:
                    raise TraceError(f"{source}: a row without {name!r}; expected {', '.join(_SCHEMA.names)} in every row")
            yield batch
    except pa.ArrowException as error:
        raise TraceError(f"{source} is not JSON lines of routing rows: {str(error).splitlines()[0]}") from error


def _arrays(
    table: pa.Table, layers: list[int], top_k: int, source: Path
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    problem_id = table.column("problem_id")[0].as_py()
    layer = table.column("layer").to_numpy()
    token = table.column("token_id").to_numpy()
    order = np.lexsort((layer, token))
    if len(order) % len(layers):
        raise TraceError(f"{source}: problem {problem_id} has a token without all of the layers {layers}")
    layer_TL, token_TL = layer[order].reshape(-1, len(layers)), token[order].reshape(-1, len(layers))
    token_ids_T = token_TL[:, 0]
    if (layer_TL != layers).any() or (token_TL != token_TL[:, :1]).any() or (np.diff(token_ids_T) <= 0).any():
        raise TraceError(f"{source}: problem {problem_id} has a token with a missing or repeated layer (of {layers})")
    if token_ids_T[0] < 0:
        raise TraceError(f"{source}: problem {problem_id} has a negative token_id")

    def values(name: str) -> npt.NDArray[Any]:
        flat = table.column(name).combine_chunks().flatten().to_numpy()
        return np.asarray(flat.reshape(-1, top_k)[order].reshape(-1, len(layers), top_k))

    weights_TLK = values("weights")
    if not (np.isfinite(weights_TLK).all() and (weights_TLK >= 0).all()):
        raise TraceError(f"{source}: problem {problem_id} has a weight that is negative or not finite")
    return token_ids_T, values("expert_ids"), weights_TLK
