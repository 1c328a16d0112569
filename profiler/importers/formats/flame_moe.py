"""Import FLAME-MoE's traces: one Parquet file per layer (`actives/iter_0540/layer_02.parquet`), `scores` and `indices`.

Each row has the scores and indices of a token's K experts. Row n of every layer is the same token; `samples/*.parquet`, two
folders up, has its vocabulary id. Scores are probabilities of the router's softmax, in descending order, not renormalized.
Layers are counted from 1 (Megatron): layer_02 is decoder layer 1. The tokens are packed training sequences of 2,048, without
the boundaries of documents (huggingface.co/datasets/CMU-FLAME/FLAME-MoE-Traces).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.errors import TraceError
from profiler.importers.reading import (
    batches,
    files_in,
    files_of,
    has_columns,
    id_lists,
    integer_column,
    lists,
    sources_of,
)
from profiler.importers.target import Target
from profiler.trace.schema import PREFILL

NAME = "flame-moe"
ABOUT = "FLAME-MoE Parquet, a file or folder of layer_NN.parquet: scores list<float16>, indices list<int16>"
KINDS = ("file", "folder")

PATTERN = "layer_*.parquet"
SEQUENCE_TOKENS = 2048
BATCH_ROWS = 16 * SEQUENCE_TOKENS


def detect(source: Path) -> bool:
    files = files_of(source, PATTERN)
    return bool(files) and has_columns(files[0], {"scores", "indices"})


def read(source: Path, target: Target) -> None:
    files = sources_of(source, PATTERN)
    numbered = {path: int(number.group(1)) for path in files if (number := re.search(r"layer_(\d{1,5})$", path.stem))}
    if len(numbered) < len(files):
        if len(files) > 1:
            raise TraceError(f"{source}: expected files of the form layer_NN.parquet only")
        numbered = {files[0]: 1}
        target.gaps.append("the file's name contains no layer number: its layer is recorded as layer 0")
    files.sort(key=lambda path: numbered[path])
    layers = [numbered[path] - 1 for path in files]
    if layers[0] < 0 or len(set(layers)) < len(layers):
        raise TraceError(f"{source}: layers {[layer + 1 for layer in layers]}, expected numbers from 1, once each")
    target.renormalized = False
    target.gaps.append(f"packed training text, cut into sequences of {SEQUENCE_TOKENS} tokens; nothing generated")
    start = 0
    for pieces in _aligned_batches(files):
        lengths = {len(ids) for ids, _ in pieces}
        if len(lengths) > 1:
            raise TraceError(f"{source}: the layers' files differ in their number of rows, from row {start} on")
        ids_TLK = np.stack([ids for ids, _ in pieces], axis=1)
        weights_TLK = np.stack([weights for _, weights in pieces], axis=1)
        # BATCH_ROWS is a multiple of SEQUENCE_TOKENS, so every batch begins with a new sequence.
        for first in range(0, len(ids_TLK), SEQUENCE_TOKENS):
            part = slice(first, first + SEQUENCE_TOKENS)
            problem_id = target.problem("flame-moe", str((start + first) // SEQUENCE_TOKENS))
            where = f"{source}, rows {start + first}.."
            target.add_arrays(problem_id, np.arange(len(ids_TLK[part])), layers, ids_TLK[part], weights_TLK[part], where)
        start += len(ids_TLK)
    _add_tokens(source, start, target)


def _aligned_batches(files: list[Path]) -> Iterator[list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]]:
    """Expert ids and scores `[T, K]` of the same rows in every file, batch by batch."""
    readers = [_pairs(path) for path in files]
    while True:
        pieces = [next(reader, None) for reader in readers]
        if all(piece is None for piece in pieces):
            return
        nothing = (np.empty((0, 1), np.int32), np.empty((0, 1), np.float32))
        yield [nothing if piece is None else piece for piece in pieces]


def _pairs(path: Path) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    for batch in batches(path, ["scores", "indices"], BATCH_ROWS):
        yield id_lists(batch.column("indices"), f"{path}: indices"), lists(batch.column("scores"), f"{path}: scores")


def _add_tokens(source: Path, rows: int, target: Target) -> None:
    folder = source if source.is_dir() else source.parent
    samples = files_in(folder.parent.parent / "samples", "*.parquet")
    if not samples:
        return
    start = 0
    for path in samples:
        for batch in batches(path, ["token_id"], BATCH_ROWS):
            vocab_ids_T = integer_column(batch.column("token_id"), f"{path}: token_id")[: max(0, rows - start)]
            at_T = np.arange(start, start + len(vocab_ids_T))
            for sequence in np.unique(at_T // SEQUENCE_TOKENS).tolist():
                mine_T = at_T // SEQUENCE_TOKENS == sequence
                problem_id = target.problem("flame-moe", str(sequence))
                target.add_tokens(problem_id, at_T[mine_T] % SEQUENCE_TOKENS, PREFILL, vocab_ids_T=vocab_ids_T[mine_T])
            start += len(vocab_ids_T)
