"""Seal a trace: rewrite `capture/`, which has tokens in the order in which they came, sorted by problem, token and layer.

Memory is bounded by a window of decoded row groups.
"""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from profiler.errors import TraceError
from profiler.schema import (
    CAPTURE_FOLDER,
    GATES_FILE,
    HIDDEN_FOLDER,
    LOGITS_FOLDER,
    ROUTING_FOLDER,
    ModelMetadata,
    routing_schema,
    values_schema,
)
from profiler.writer import CAPTURE_FORM, BlockWriter, refuse_repeats, sort_pairs

# Row groups kept while sealing: problems finish roughly in order, so a window of them is enough.
CACHED_GROUPS = 16

Arrays = dict[str, npt.NDArray[Any]]


def seal(
    directory: Path, model: ModelMetadata, sequence_tokens: dict[int, int], captured_as: dict[int, int] | None = None
) -> dict[int, list[int]]:
    """Sort `capture/` into `routing/` (and `logits/`, `hidden/`) and return the positions that each problem lacks.

    `capture/` stays: `write_manifest` removes it, so that a seal that was cut short can be repeated.

    sequence_tokens: problem id -> N, the tokens of prompt and output. A model routes N - 1 of them: the last generated
    token is never fed back. Engines that schedule ahead may have routed it; such rows are dropped. Positions that were
    captured twice keep the last capture. Pairs are sorted by weight, descending.
    captured_as: problem id -> the id that its tokens have in `capture/`, where that is another one.
    Returns problem id -> those of the N - 1 positions without routing, for the problems that lack some.
    Raises `TraceError` if a captured id is none of these, or if a token has an expert twice.
    """
    capture = directory / CAPTURE_FOLDER
    names = captured_as if captured_as is not None else {problem_id: problem_id for problem_id in sequence_tokens}
    missing = {problem: list(range(tokens - 1)) for problem, tokens in sequence_tokens.items() if tokens > 1}
    folders = {ROUTING_FOLDER: capture, LOGITS_FOLDER: capture / LOGITS_FOLDER, HIDDEN_FOLDER: capture / HIDDEN_FOLDER}
    for name, source in folders.items():
        # What an earlier attempt left, which a full disk or a kill cut short.
        shutil.rmtree(directory / name, ignore_errors=True)
        parts = sorted(source.glob("part-*.parquet"), key=lambda path: (len(path.name), path.name))
        if parts:
            lacking = _sort(parts, directory / name, model, sequence_tokens, names)
            missing = lacking if name == ROUTING_FOLDER else missing
    if (capture / GATES_FILE).exists():
        shutil.copyfile(capture / GATES_FILE, directory / GATES_FILE)
    return missing


def _sort(
    parts: list[Path], target: Path, model: ModelMetadata, sequence_tokens: dict[int, int], names: dict[int, int]
) -> dict[int, list[int]]:
    form = _read_form(parts[0])
    if "expert_ids" in form.types:
        schema = routing_schema(model.num_experts, model.top_k)
    else:
        ((column, (_, width)),) = form.types.items()
        schema = values_schema(column, width)
    blocks = _blocks_by_problem(parts)
    unknown = sorted(set(blocks) - set(names.values()))
    if unknown:
        raise TraceError(f"{parts[0].parent}: rows of unknown problem {unknown[0]}")
    missing: dict[int, list[int]] = {}
    groups = _RowGroupCache(form)
    with BlockWriter(target, form.layers, schema) as writer:
        for problem_id in sorted(sequence_tokens):
            routed = sequence_tokens[problem_id] - 1
            pieces = [groups.tokens(*block) for block in blocks.get(names.get(problem_id, -1), [])]
            found = np.empty(0, dtype=np.int32)
            if pieces:
                found, lists = _last_capture_of_each_position(pieces, routed)
                if "expert_ids" in lists:
                    refuse_repeats(lists["expert_ids"], f"problem {problem_id}")
                    lists["expert_ids"], lists["weights"] = sort_pairs(lists["expert_ids"], lists["weights"])
                writer.add(problem_id, found, lists)
            if len(found) < routed:
                missing[problem_id] = np.setdiff1d(np.arange(routed), found, assume_unique=True).tolist()
    return missing


@dataclass(frozen=True)
class _Form:
    """What the tokens of a capture folder hold: L layers, and element type and width of each column."""

    layers: list[int]
    types: dict[str, tuple[np.dtype[Any], int]]


def _read_form(part: Path) -> _Form:
    form = json.loads(pq.read_schema(part).metadata[CAPTURE_FORM])
    return _Form(form["layers"], {name: (np.dtype(kind), width) for name, (kind, width) in form["types"].items()})


@dataclass(frozen=True)
class _Piece:
    """Tokens of one problem: positions `[T]`, and each column as `[T, L, W]`."""

    token_ids_T: npt.NDArray[np.int32]
    lists: Arrays


def _last_capture_of_each_position(pieces: list[_Piece], routed: int) -> tuple[npt.NDArray[np.int32], Arrays]:
    token_ids = np.concatenate([piece.token_ids_T for piece in pieces])
    # np.unique keeps the first of equals: look from the end, so that the last capture wins.
    positions, from_end = np.unique(token_ids[::-1], return_index=True)
    keep = (len(token_ids) - 1 - from_end)[positions < routed]
    lists = {name: np.concatenate([piece.lists[name] for piece in pieces])[keep] for name in pieces[0].lists}
    return token_ids[keep], lists


_Block = tuple[Path, int, int, int]
"""Tokens of one problem: file, row group, first row in the group, number of rows."""


def _blocks_by_problem(parts: list[Path]) -> dict[int, list[_Block]]:
    blocks: dict[int, list[_Block]] = defaultdict(list)
    for path in parts:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                ids = file.read_row_group(group, columns=["problem_id"]).column(0).to_numpy()
                starts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 1))
                ends = np.append(starts[1:], len(ids))
                for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                    blocks[int(ids[start])].append((path, group, start, end - start))
    return dict(blocks)


class _RowGroupCache:
    """Decoded row groups, least recently used dropped first."""

    def __init__(self, form: _Form) -> None:
        self._form = form
        self._groups: OrderedDict[tuple[Path, int], _Piece] = OrderedDict()

    def tokens(self, path: Path, group: int, start: int, rows: int) -> _Piece:
        key = (path, group)
        if key in self._groups:
            self._groups.move_to_end(key)
        else:
            # Opened for each read: a long capture has more files than a process may hold open.
            with pq.ParquetFile(path) as file:
                self._groups[key] = _decode(file.read_row_group(group), self._form)
            if len(self._groups) > CACHED_GROUPS:
                self._groups.popitem(last=False)
        piece = self._groups[key]
        tokens = slice(start, start + rows)
        return _Piece(piece.token_ids_T[tokens], {name: values[tokens] for name, values in piece.lists.items()})


def _decode(table: pa.Table, form: _Form) -> _Piece:
    lists = {}
    for name, (dtype, width) in form.types.items():
        column = table.column(name)
        pieces = [_unpack(chunk, dtype) for chunk in column.chunks]
        lists[name] = np.concatenate(pieces).reshape(-1, len(form.layers), width)
    return _Piece(table.column("token_id").to_numpy(), lists)


def _unpack(chunk: pa.FixedSizeBinaryArray, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    width = chunk.type.byte_width
    data = chunk.buffers()[1]
    return np.frombuffer(data, dtype=np.uint8)[chunk.offset * width : (chunk.offset + len(chunk)) * width].view(dtype)
