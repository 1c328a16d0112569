"""Routing rows of a trace's files as `[T, L, K]` arrays, with every row checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from profiler.errors import TraceError
from profiler.trace.rows import INFINITY_BITS, has_repeats
from profiler.trace.schema import Metadata, RoutingChunk, expert_dtype


def decode_routing(table: pa.Table, metadata: Metadata, where: str) -> RoutingChunk:
    """Check and decode the routing rows of a row group. Raises `TraceError`, which names `where`, if they break the format."""
    model, record = metadata.model, metadata.record
    layers = len(model.moe_layers)
    if table.num_rows == 0 or table.num_rows % layers:
        raise TraceError(f"{where}: {table.num_rows} rows, expected a multiple of {layers} layers")
    lists = [] if record.empty_slots else [array for name in table.column_names[3:] for array in entries(table.column(name))]
    if any(column.null_count for column in [*table.columns, *lists]):
        raise TraceError(f"{where}: nulls, expected none")
    chunk = decode_rows(table, layers, model.num_experts if record.empty_slots else None)
    if not _is_sound(table, chunk, metadata):
        row = _first_broken_row(table, chunk, metadata)
        raise TraceError(
            f"{where}, row {row}: expected rows sorted by (problem_id, token_id, layer), every MoE layer "
            f"once, different expert ids below {model.num_experts}, and finite weights, not negative, in descending order"
        )
    return chunk


def _is_sound(table: pa.Table, chunk: RoutingChunk, metadata: Metadata) -> bool:
    """Whether every row follows the format. Not looking for the row at fault makes this cheap next to the decoding."""
    layers_L = np.asarray(metadata.model.moe_layers, dtype=np.int16)
    layers, experts = len(layers_L), metadata.model.num_experts
    for name, first_T in (("problem_id", chunk.problem_ids_T), ("token_id", chunk.token_ids_T)):
        if first_T.min() < 0 or (table.column(name).to_numpy().reshape(-1, layers) != first_T[:, None]).any():
            return False
    if (table.column("layer").to_numpy().reshape(-1, layers) != layers_L).any():
        return False
    if (np.diff(chunk.problem_ids_T.astype(np.int64) << 32 | chunk.token_ids_T) <= 0).any():
        return False
    ids_TLK, weights_TLK = chunk.expert_ids_TLK, chunk.weights_TLK
    if metadata.record.empty_slots:
        return not _broken_pairs(chunk, metadata).any()
    if ids_TLK.max() >= experts or has_repeats(ids_TLK).any():
        return False
    if weights_TLK is None:
        return True
    bits_TLK = weights_TLK.view(np.uint16)
    if bits_TLK.max() >= INFINITY_BITS:
        return not _broken_pairs(chunk, metadata).any()
    return not (bits_TLK[..., 1:] > bits_TLK[..., :-1]).any()


def _broken_pairs(chunk: RoutingChunk, metadata: Metadata) -> npt.NDArray[np.bool_]:
    """Which tokens `[T]` have (expert id, weight) pairs that break the format."""
    experts, ids_TLK, weights_TLK = metadata.model.num_experts, chunk.expert_ids_TLK, chunk.weights_TLK
    empty = experts if metadata.record.empty_slots else None
    is_empty_TLK = ids_TLK == experts if empty is not None else np.zeros_like(ids_TLK, dtype=np.bool_)
    broken_T = (ids_TLK > (experts if empty is not None else experts - 1)).any((1, 2)) | has_repeats(ids_TLK, empty).any(1)
    # Empty slots come last, and have no weight.
    broken_T |= (is_empty_TLK[..., :-1] & ~is_empty_TLK[..., 1:]).any((1, 2))
    if weights_TLK is not None:
        with np.errstate(invalid="ignore"):
            known_TLK = np.where(is_empty_TLK, np.float16(0), weights_TLK)
            broken_T |= ~((known_TLK >= 0) & np.isfinite(known_TLK)).all((1, 2))
            broken_T |= (known_TLK[..., 1:] > known_TLK[..., :-1]).any((1, 2))
        broken_T |= (np.isnan(weights_TLK) != is_empty_TLK).any((1, 2))
    return np.asarray(broken_T)


def _first_broken_row(table: pa.Table, chunk: RoutingChunk, metadata: Metadata) -> int:
    layers_L = np.asarray(metadata.model.moe_layers)
    layers = len(layers_L)
    broken_T = _broken_pairs(chunk, metadata) | (chunk.problem_ids_T < 0) | (chunk.token_ids_T < 0)
    for name, expected in (
        ("problem_id", chunk.problem_ids_T[:, None]),
        ("token_id", chunk.token_ids_T[:, None]),
        ("layer", layers_L),
    ):
        broken_T |= (table.column(name).to_numpy().reshape(-1, layers) != expected).any(1)
    broken_T[1:] |= np.diff(chunk.problem_ids_T.astype(np.int64) << 32 | chunk.token_ids_T) <= 0
    return int(np.flatnonzero(broken_T)[0]) * layers


def concatenate(chunks: list[RoutingChunk]) -> RoutingChunk:
    """Join chunks in order. Raises `TraceError` if the list is empty (a trace without rows)."""
    if not chunks:
        raise TraceError("the trace has no routing rows")
    if len(chunks) == 1:
        return chunks[0]
    weights = [chunk.weights_TLK for chunk in chunks if chunk.weights_TLK is not None]
    return RoutingChunk(
        problem_ids_T=np.concatenate([chunk.problem_ids_T for chunk in chunks]),
        token_ids_T=np.concatenate([chunk.token_ids_T for chunk in chunks]),
        expert_ids_TLK=np.concatenate([chunk.expert_ids_TLK for chunk in chunks]),
        weights_TLK=np.concatenate(weights) if weights else None,
    )


def decode_rows(table: pa.Table, layers: int, empty: int | None = None) -> RoutingChunk:
    """Rows sorted by token and layer as `[T, L, K]` views of the table's own buffers (copied only to join Arrow chunks).

    The caller has checked that every token has all layers. empty: the id to put in place of null; the ids are then copied.
    """
    has_weights = "weights" in table.column_names
    return RoutingChunk(
        problem_ids_T=table.column("problem_id").to_numpy()[::layers],
        token_ids_T=table.column("token_id").to_numpy()[::layers],
        expert_ids_TLK=decode_lists(table.column("expert_ids"), layers, empty),
        weights_TLK=decode_lists(table.column("weights"), layers, None if empty is None else np.nan) if has_weights else None,
    )


def decode_lists(column: pa.ChunkedArray, layers: int, null: float | None = None) -> npt.NDArray[Any]:
    """A fixed-size list column, rows sorted by token and layer, as `[T, L, W]`: a view unless it has several chunks.

    null: the value to put in place of null entries. If it is an expert id that the column's type cannot hold, the type is
    widened.
    """
    array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays([pa.array([], column.type), *column.chunks])
    entries = array.flatten()
    if null is not None:
        if pa.types.is_integer(entries.type):
            entries = entries.cast(pa.from_numpy_dtype(expert_dtype(int(null) + 1)))
        entries = pc.fill_null(
            entries, pa.scalar(np.float16(null) if pa.types.is_floating(entries.type) else null, entries.type)
        )
    return np.asarray(entries.to_numpy(zero_copy_only=True).reshape(-1, layers, column.type.list_size))


def entries(column: pa.ChunkedArray) -> list[pa.Array]:
    """The entries of all lists of a column."""
    return [chunk.flatten() for chunk in column.chunks]
