"""Seal a trace: rewrite the streams of `capture/`, which are in the order of computing, sorted by problem, token and layer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.errors import TraceError
from profiler.trace.rows import empty_slots_last, has_repeats, sort_pairs
from profiler.trace.schema import (
    CAPTURE_FOLDER,
    GATES_FILE,
    HIDDEN_FOLDER,
    LOGITS_FOLDER,
    ROUTING_FOLDER,
    ModelMetadata,
    RecordMetadata,
    routing_schema,
    values_schema,
)
from profiler.trace.stream import HIDDEN_STREAM, LOGITS_STREAM, ROUTING_STREAM, CaptureIndex, StreamLayout, gather, read_index
from profiler.trace.writer import BlockWriter

STREAMS = {ROUTING_FOLDER: ROUTING_STREAM, LOGITS_FOLDER: LOGITS_STREAM, HIDDEN_FOLDER: HIDDEN_STREAM}

Source = tuple[int, int]
"""Where the tokens of a problem are in `capture/`: run, and the number that they have there."""

Missing = dict[int, npt.NDArray[np.int64]]
"""Problem id -> its positions without routing, as intervals `[G, 2]` from first to behind last."""


def run_folder(directory: Path, run: int) -> Path:
    """The folder of the `run`-th attempt (from 0) at collecting the trace `directory`."""
    return directory / CAPTURE_FOLDER / f"run-{run:05d}"


def runs_of(directory: Path) -> list[int]:
    """The runs that there are, ascending."""
    names = [path.name.removeprefix("run-") for path in (directory / CAPTURE_FOLDER).glob("run-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def seal(
    directory: Path,
    model: ModelMetadata,
    sequence_tokens: dict[int, int],
    captured_as: dict[int, Source] | None = None,
    *,
    record: RecordMetadata | None = None,
    others_abandoned: bool = False,
) -> Missing:
    """Sort `capture/` into `routing/` (and `logits/`, `hidden/`) and return the positions that each problem lacks.

    `capture/` stays: `write_manifest` removes it, so that a seal that was cut short can be repeated. Memory: about 40 bytes
    per token, and one row group.

    sequence_tokens: problem id -> N, the tokens of prompt and output. A model routes N - 1 of them: the last generated
    token is never fed back. Engines that schedule ahead may have routed it; such rows are dropped. Positions that were
    captured twice keep the last capture. Pairs are sorted by weight, descending.
    captured_as: problem id -> run and number of its tokens; default: run 0, the same number.
    others_abandoned: leave out rows of other numbers (requests of a run that was killed); otherwise they are an error.
    Returns those of the N - 1 positions without routing, of the problems that lack some.
    Raises `TraceError` if a captured number is none of these, or if a token has an expert twice.
    """
    if captured_as is None:
        captured_as = {problem_id: (0, problem_id) for problem_id in sequence_tokens}
    wanted = _Wanted(sequence_tokens, captured_as)
    missing = wanted.lacking(np.empty(0, dtype=np.int64))
    for name, stream in STREAMS.items():
        # What an earlier attempt left, which a full disk or a kill cut short.
        shutil.rmtree(directory / name, ignore_errors=True)
        found = {run: read_index(run_folder(directory, run) / stream) for run in runs_of(directory)}
        indices = {run: index for run, index in found.items() if index is not None}
        if indices:
            lacking = _sort(indices, directory / name, model, record or RecordMetadata(), wanted, others_abandoned)
            missing = lacking if name == ROUTING_FOLDER else missing
    gates = [run_folder(directory, run) / GATES_FILE for run in runs_of(directory)]
    for path in gates:
        if path.is_file() and not path.is_symlink():
            shutil.copyfile(path, directory / GATES_FILE)
    return missing


def captured_positions(folder: Path) -> dict[str, dict[int, npt.NDArray[np.int32]]]:
    """Positions that a run has, ascending and once each: stream name -> number -> `[T]`; streams without any are absent."""
    found = {}
    for stream in STREAMS.values():
        index = read_index(folder / stream)
        if index is None:
            continue
        keys_N = np.unique(index.problem_ids_N.astype(np.int64) << 32 | index.token_ids_N)
        numbers, starts = np.unique(keys_N >> 32, return_index=True)
        pieces = np.split((keys_N & 0xFFFFFFFF).astype(np.int32), starts[1:])
        found[stream] = dict(zip(numbers.tolist(), pieces, strict=True))
    return found


class _Wanted:
    """The problems of the trace in order (P of them), and where their tokens are."""

    def __init__(self, sequence_tokens: dict[int, int], captured_as: dict[int, Source]) -> None:
        self.problem_ids_P = np.array(sorted(sequence_tokens), dtype=np.int32)
        self.routed_P = np.array([max(sequence_tokens[i] - 1, 0) for i in self.problem_ids_P.tolist()], dtype=np.int64)
        sources = [captured_as.get(problem_id) for problem_id in self.problem_ids_P.tolist()]
        # Problems that were never routed have no source; -1 matches none.
        keys_P = np.array([-1 if source is None else source[0] << 32 | source[1] for source in sources], dtype=np.int64)
        self._order_P = np.argsort(keys_P, kind="stable")
        self._sorted_keys_P = keys_P[self._order_P]

    def rank(self, run: int, numbers_N: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """Index into the P problems for each token `[N]`; -1 for tokens of others."""
        keys_N = numbers_N.astype(np.int64) | run << 32
        if not len(self._sorted_keys_P):
            return np.full(len(keys_N), -1)
        at_N = np.minimum(np.searchsorted(self._sorted_keys_P, keys_N), len(self._sorted_keys_P) - 1)
        return np.where(self._sorted_keys_P[at_N] == keys_N, self._order_P[at_N], -1)

    def lacking(self, keys_N: npt.NDArray[np.int64]) -> Missing:
        """What is missing besides `keys_N`: rank << 32 | position, ascending, each once."""
        counts_P = np.bincount(keys_N >> 32, minlength=len(self.problem_ids_P))
        starts_P = np.cumsum(counts_P) - counts_P
        lacking = {}
        for p in np.flatnonzero(counts_P < self.routed_P).tolist():
            found = keys_N[starts_P[p] : starts_P[p] + counts_P[p]] & 0xFFFFFFFF
            # Between one that is there and the next, with one before the first and one behind the last.
            edges = np.concatenate([[-1], found, [self.routed_P[p]]])
            gaps_G2 = np.stack([edges[:-1] + 1, edges[1:]], axis=1)
            lacking[int(self.problem_ids_P[p])] = gaps_G2[gaps_G2[:, 1] > gaps_G2[:, 0]]
        return lacking


def _sort(
    indices: dict[int, CaptureIndex],
    target: Path,
    model: ModelMetadata,
    record: RecordMetadata,
    wanted: _Wanted,
    others_abandoned: bool,
) -> Missing:
    layout = next(iter(indices.values())).layout
    keys, places = [], []
    first = 0
    for run, index in indices.items():
        if index.layout != layout:
            raise TraceError(f"{index.path}: other layers or widths than in the run before it")
        rank_N = wanted.rank(run, index.problem_ids_N)
        if not others_abandoned and (rank_N < 0).any():
            unknown = int(index.problem_ids_N[rank_N < 0].min())
            raise TraceError(f"{index.path}: rows of unknown problem {unknown}")
        # Positions beyond the sequence were scheduled ahead of its end.
        places_N = np.flatnonzero((rank_N >= 0) & (index.token_ids_N < wanted.routed_P[rank_N]))
        keys.append(rank_N[places_N] << 32 | index.token_ids_N[places_N])
        places.append(places_N + first)
        first += len(rank_N)
    # Mostly there is one run, and a long capture's index is not to be copied.
    keys_N, places_N = (found[0] if len(found) == 1 else np.concatenate(found) for found in (keys, places))
    del keys, places
    if (np.diff(keys_N) <= 0).any():
        order_N = np.argsort(keys_N, kind="stable")
        # Of equal ones the last was computed last.
        order_N = order_N[np.append(np.diff(keys_N[order_N]) > 0, True)]
        keys_N, places_N = keys_N[order_N], places_N[order_N]
    schema = _schema(layout, model, record)
    with BlockWriter(target, layout.layers, schema) as writer:
        for start in range(0, len(keys_N), writer.tokens_per_group):
            keys_T = keys_N[start : start + writer.tokens_per_group]
            lists = _gather(list(indices.values()), layout, places_N[start : start + writer.tokens_per_group])
            problem_ids_T = wanted.problem_ids_P[keys_T >> 32]
            token_ids_T = (keys_T & 0xFFFFFFFF).astype(np.int32)
            if "expert_ids" in lists:
                _arrange(lists, model, record, problem_ids_T, token_ids_T)
            writer.write(problem_ids_T, token_ids_T, lists)
    return wanted.lacking(keys_N)


def _schema(layout: StreamLayout, model: ModelMetadata, record: RecordMetadata) -> Any:
    if "expert_ids" in layout.types:
        return routing_schema(model.num_experts, model.top_k, weights=record.weights, empty_slots=bool(record.empty_slots))
    ((column, (_, width)),) = layout.types.items()
    return values_schema(column, width)


def _gather(indices: list[CaptureIndex], layout: StreamLayout, places_T: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
    """Tokens by their place in all streams, one after the other, as `[T, L, W]` arrays."""
    lists = {name: np.empty((len(places_T), len(layout.layers), width), kind) for name, (kind, width) in layout.types.items()}
    first = 0
    for index in indices:
        end = first + len(index.token_ids_N)
        at = np.flatnonzero((places_T >= first) & (places_T < end))
        if len(at):
            gather(index, places_T[at] - first, lists, at)
        first = end
    return lists


def _arrange(
    lists: dict[str, npt.NDArray[Any]],
    model: ModelMetadata,
    record: RecordMetadata,
    problem_ids_T: npt.NDArray[np.int32],
    token_ids_T: npt.NDArray[np.int32],
) -> None:
    """Put the pairs of each token into order, after a check that no expert comes twice."""
    empty = model.num_experts if record.empty_slots else None
    repeats_TL = has_repeats(lists["expert_ids"], empty)
    if repeats_TL.any():
        token, layer = np.argwhere(repeats_TL)[0].tolist()
        where = f"problem {problem_ids_T[token]}, token {token_ids_T[token]}, layer {model.moe_layers[layer]}"
        raise TraceError(f"{where}: the same expert twice")
    if record.weights:
        lists["expert_ids"], lists["weights"] = sort_pairs(lists["expert_ids"], lists["weights"])
    elif empty is not None:
        lists["expert_ids"] = empty_slots_last(lists["expert_ids"], empty)
    if empty is not None:
        lists["empty"] = lists["expert_ids"] == empty
