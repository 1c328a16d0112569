"""Seal a trace: rewrite `capture/`, which has blocks in the order in which they came, sorted by problem, token and layer.

Memory is bounded by a window of decoded row groups.
"""

from __future__ import annotations

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
from profiler.reader import decode_lists
from profiler.schema import CAPTURE_FOLDER, GATES_FILE, HIDDEN_FOLDER, LOGITS_FOLDER, ROUTING_FOLDER, ModelMetadata
from profiler.writer import KEY_COLUMNS, BlockWriter

# Row groups kept while sealing: problems finish roughly in order, so a window of them is enough.
CACHED_GROUPS = 16


def seal(
    directory: Path, model: ModelMetadata, sequence_tokens: dict[int, int], captured_as: dict[int, int] | None = None
) -> dict[int, list[int]]:
    """Sort `capture/` into `routing/` (and `logits/`, `hidden/`) and return the positions that each problem lacks.

    sequence_tokens: problem id -> N, the tokens of prompt and output. A model routes N - 1 of them: the last generated
    token is never fed back. Engines that schedule ahead may have routed it; such rows are dropped. Positions that were
    captured twice keep the last capture.
    captured_as: problem id -> the id that its rows have in `capture/`, where that is another one.
    Returns problem id -> those of the N - 1 positions without routing, for the problems that lack some.
    Raises `TraceError` if a captured id is none of these.
    """
    capture = directory / CAPTURE_FOLDER
    names = captured_as if captured_as is not None else {problem_id: problem_id for problem_id in sequence_tokens}
    missing = _sort(capture, directory / ROUTING_FOLDER, model.moe_layers, sequence_tokens, names)
    for name in (LOGITS_FOLDER, HIDDEN_FOLDER):
        if (capture / name).is_dir():
            _sort(capture / name, directory / name, _layers_of(capture / name), sequence_tokens, names)
    if (capture / GATES_FILE).exists():
        (capture / GATES_FILE).rename(directory / GATES_FILE)
    shutil.rmtree(capture)
    return missing


def _sort(
    source: Path, target: Path, layers: list[int], sequence_tokens: dict[int, int], names: dict[int, int]
) -> dict[int, list[int]]:
    blocks = _blocks_by_problem(source)
    unknown = sorted(set(blocks) - set(names.values()))
    if unknown:
        raise TraceError(f"{source}: rows of unknown problem {unknown[0]}")
    missing: dict[int, list[int]] = {}
    parts = sorted(source.glob("part-*.parquet"))
    if not parts:
        return {problem: list(range(tokens - 1)) for problem, tokens in sequence_tokens.items() if tokens > 1}
    groups = _RowGroupCache(len(layers))
    with BlockWriter(target, layers, pq.read_schema(parts[0])) as writer:
        for problem_id in sorted(sequence_tokens):
            routed = sequence_tokens[problem_id] - 1
            pieces = [groups.tokens(*block) for block in blocks.get(names.get(problem_id, -1), [])]
            found = np.empty(0, dtype=np.int32)
            if pieces:
                found, lists = _last_capture_of_each_position(pieces, routed)
                writer.add_block(problem_id, found, lists)
            if len(found) < routed:
                missing[problem_id] = np.setdiff1d(np.arange(routed), found, assume_unique=True).tolist()
    groups.close()
    return missing


def _layers_of(folder: Path) -> list[int]:
    """The layers of a values folder, from the first token of its first part."""
    for path in sorted(folder.glob("part-*.parquet")):
        table = pq.ParquetFile(path).read_row_group(0, columns=["token_id", "layer"])
        tokens, layers = table.column("token_id").to_numpy(), table.column("layer").to_numpy()
        # Layers ascend within a token and start again with the next.
        ends = np.flatnonzero((np.diff(layers) <= 0) | (np.diff(tokens) != 0))
        return [int(layer) for layer in layers[: ends[0] + 1 if len(ends) else len(layers)]]
    return []


@dataclass(frozen=True)
class _Piece:
    """Tokens of one problem: positions `[T]`, and each list column as `[T, L, W]`."""

    token_ids_T: npt.NDArray[np.int32]
    lists: dict[str, npt.NDArray[Any]]


def _last_capture_of_each_position(
    pieces: list[_Piece], routed: int
) -> tuple[npt.NDArray[np.int32], dict[str, npt.NDArray[Any]]]:
    token_ids = np.concatenate([piece.token_ids_T for piece in pieces])
    # np.unique keeps the first of equals: look from the end, so that the last capture wins.
    positions, from_end = np.unique(token_ids[::-1], return_index=True)
    keep = (len(token_ids) - 1 - from_end)[positions < routed]
    lists = {name: np.concatenate([piece.lists[name] for piece in pieces])[keep] for name in pieces[0].lists}
    return token_ids[keep], lists


_Block = tuple[Path, int, int, int]
"""Rows of one problem: file, row group, first row in the group, number of rows."""


def _blocks_by_problem(folder: Path) -> dict[int, list[_Block]]:
    blocks: dict[int, list[_Block]] = defaultdict(list)
    for path in sorted(folder.glob("part-*.parquet")):
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

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._files: dict[Path, pq.ParquetFile] = {}
        self._groups: OrderedDict[tuple[Path, int], _Piece] = OrderedDict()

    def tokens(self, path: Path, group: int, start: int, rows: int) -> _Piece:
        key = (path, group)
        if key in self._groups:
            self._groups.move_to_end(key)
        else:
            if path not in self._files:
                self._files[path] = pq.ParquetFile(path)
            self._groups[key] = _decode(self._files[path].read_row_group(group), self._layers)
            if len(self._groups) > CACHED_GROUPS:
                self._groups.popitem(last=False)
        piece = self._groups[key]
        tokens = slice(start // self._layers, (start + rows) // self._layers)
        return _Piece(piece.token_ids_T[tokens], {name: values[tokens] for name, values in piece.lists.items()})

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _decode(table: pa.Table, layers: int) -> _Piece:
    names = [name for name in table.column_names if name not in KEY_COLUMNS]
    return _Piece(
        table.column("token_id").to_numpy()[::layers], {name: decode_lists(table.column(name), layers) for name in names}
    )
