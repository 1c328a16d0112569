"""Seal a trace: sort the streams of `capture/`, written in the order of computation, by problem, token and layer."""

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
"""Where the tokens of a problem are in `capture/`: the run, and the request number that its rows carry there."""

Missing = dict[int, npt.NDArray[np.int64]]
"""Problem id -> its positions without routing, as G half-open intervals `[G, 2]`."""


def run_folder(directory: Path, run: int) -> Path:
    """The folder of the `run`-th attempt (from 0) at collecting the trace `directory`."""
    return directory / CAPTURE_FOLDER / f"run-{run:05d}"


def runs_of(directory: Path) -> list[int]:
    """The numbers of the runs in `directory`, ascending."""
    names = [path.name.removeprefix("run-") for path in (directory / CAPTURE_FOLDER).glob("run-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def seal(
    directory: Path,
    model: ModelMetadata,
    sequence_tokens: dict[int, int],
    captured_as: dict[int, Source] | None = None,
    *,
    record: RecordMetadata | None = None,
    drop_other_requests: bool = False,
    dropped_keys: npt.NDArray[np.int64] | None = None,
) -> Missing:
    """Sort `capture/` into `routing/` (and `logits/`, `hidden/`) and return each problem's missing positions.

    `capture/` stays until `write_manifest` removes it, so that an interrupted seal can be repeated. Memory: about 40 bytes
    per token, and one row group.

    sequence_tokens: problem id -> N, the tokens of prompt and output. A model routes N - 1 of them: the last generated
    token is never fed back. Engines that schedule ahead may have routed it; such rows are dropped. A position that was
    captured twice keeps its last capture. Pairs are sorted by weight, descending.
    captured_as: problem id -> run and request number of its rows; default: run 0, the problem id itself.
    drop_other_requests: drop rows of other requests (those that a killed run left unfinished); otherwise they are an error.
    dropped_keys: problem id << 32 | position of tokens to leave out, ascending.
    Returns the positions without routing, among the N - 1, of every problem that has some.
    Raises `TraceError` on rows of another request, or if a token has the same expert twice in a layer.
    """
    if captured_as is None:
        captured_as = {problem_id: (0, problem_id) for problem_id in sequence_tokens}
    problems = _Problems(sequence_tokens, captured_as)
    dropped = problems.keys(np.empty(0, np.int64) if dropped_keys is None else dropped_keys)
    missing = problems.missing(np.empty(0, dtype=np.int64))
    for name, stream in STREAMS.items():
        # An earlier attempt may have been cut short by a full disk or a kill.
        shutil.rmtree(directory / name, ignore_errors=True)
        found = {run: read_index(run_folder(directory, run) / stream) for run in runs_of(directory)}
        indices = {run: index for run, index in found.items() if index is not None}
        if indices:
            without = _sort(
                indices, directory / name, model, record or RecordMetadata(), problems, dropped, drop_other_requests
            )
            missing = without if name == ROUTING_FOLDER else missing
    gates = [run_folder(directory, run) / GATES_FILE for run in runs_of(directory)]
    for path in gates:
        if path.is_file() and not path.is_symlink():
            shutil.copyfile(path, directory / GATES_FILE)
    return missing


def captured_positions(folder: Path) -> dict[str, dict[int, npt.NDArray[np.int32]]]:
    """Positions captured in a run's folder: stream name -> request number -> `[T]`, ascending and distinct.

    Streams that hold no rows are absent.
    """
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


class _Problems:
    """The P problems of the trace in order of their ids, and where their tokens are."""

    def __init__(self, sequence_tokens: dict[int, int], captured_as: dict[int, Source]) -> None:
        self.problem_ids_P = np.array(sorted(sequence_tokens), dtype=np.int32)
        self.routed_P = np.array([max(sequence_tokens[i] - 1, 0) for i in self.problem_ids_P.tolist()], dtype=np.int64)
        sources = [captured_as.get(problem_id) for problem_id in self.problem_ids_P.tolist()]
        # Problems that were never routed have no source; -1 matches none.
        keys_P = np.array([-1 if source is None else source[0] << 32 | source[1] for source in sources], dtype=np.int64)
        self._order_P = np.argsort(keys_P, kind="stable")
        self._sorted_keys_P = keys_P[self._order_P]

    def rank(self, run: int, numbers_N: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """Index into the P problems for each token `[N]`; -1 for tokens of other requests."""
        keys_N = numbers_N.astype(np.int64) | run << 32
        if not len(self._sorted_keys_P):
            return np.full(len(keys_N), -1)
        at_N = np.minimum(np.searchsorted(self._sorted_keys_P, keys_N), len(self._sorted_keys_P) - 1)
        return np.where(self._sorted_keys_P[at_N] == keys_N, self._order_P[at_N], -1)

    def keys(self, keys_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Keys of problem id << 32 | position as keys of rank << 32 | position; those of other problems are left out."""
        if not len(keys_N) or not len(self.problem_ids_P):
            return np.empty(0, dtype=np.int64)
        rank_N = np.minimum(np.searchsorted(self.problem_ids_P, keys_N >> 32), len(self.problem_ids_P) - 1)
        known_N = self.problem_ids_P[rank_N] == keys_N >> 32
        return np.asarray((rank_N << 32 | keys_N & 0xFFFFFFFF)[known_N])

    def missing(self, keys_N: npt.NDArray[np.int64]) -> Missing:
        """The positions that are not among `keys_N`: rank << 32 | position, ascending and distinct."""
        counts_P = np.bincount(keys_N >> 32, minlength=len(self.problem_ids_P))
        starts_P = np.cumsum(counts_P) - counts_P
        missing = {}
        for p in np.flatnonzero(counts_P < self.routed_P).tolist():
            found = keys_N[starts_P[p] : starts_P[p] + counts_P[p]] & 0xFFFFFFFF
            # Gaps lie between neighboring positions that are present; sentinels stand before the first and after the last.
            edges = np.concatenate([[-1], found, [self.routed_P[p]]])
            gaps_G2 = np.stack([edges[:-1] + 1, edges[1:]], axis=1)
            missing[int(self.problem_ids_P[p])] = gaps_G2[gaps_G2[:, 1] > gaps_G2[:, 0]]
        return missing


def _sort(
    indices: dict[int, CaptureIndex],
    target: Path,
    model: ModelMetadata,
    record: RecordMetadata,
    problems: _Problems,
    dropped: npt.NDArray[np.int64],
    drop_other_requests: bool,
) -> Missing:
    layout = next(iter(indices.values())).layout
    keys, places = [], []
    first = 0
    for run, index in indices.items():
        if index.layout != layout:
            raise TraceError(f"{index.path}: its layers or widths differ from those of the run before it")
        rank_N = problems.rank(run, index.problem_ids_N)
        if not drop_other_requests and (rank_N < 0).any():
            unknown = int(index.problem_ids_N[rank_N < 0].min())
            raise TraceError(f"{index.path}: rows of unknown problem {unknown}")
        # Positions beyond the end of the sequence were scheduled before the engine knew that it had ended.
        places_N = np.flatnonzero((rank_N >= 0) & (index.token_ids_N < problems.routed_P[rank_N]))
        keys.append(rank_N[places_N] << 32 | index.token_ids_N[places_N])
        places.append(places_N + first)
        first += len(rank_N)
    # Most captures have one run, and the index of a long one is too large to copy.
    keys_N, places_N = (found[0] if len(found) == 1 else np.concatenate(found) for found in (keys, places))
    del keys, places
    if (np.diff(keys_N) <= 0).any():
        order_N = np.argsort(keys_N, kind="stable")
        # The sort is stable: among equal keys, the last was computed last.
        order_N = order_N[np.append(np.diff(keys_N[order_N]) > 0, True)]
        keys_N, places_N = keys_N[order_N], places_N[order_N]
    if len(dropped):
        kept_N = ~np.isin(keys_N, dropped)
        keys_N, places_N = keys_N[kept_N], places_N[kept_N]
    schema = _schema(layout, model, record)
    with BlockWriter(target, layout.layers, schema) as writer:
        for start in range(0, len(keys_N), writer.tokens_per_group):
            keys_T = keys_N[start : start + writer.tokens_per_group]
            lists = _gather(list(indices.values()), layout, places_N[start : start + writer.tokens_per_group])
            problem_ids_T = problems.problem_ids_P[keys_T >> 32]
            token_ids_T = (keys_T & 0xFFFFFFFF).astype(np.int32)
            if "expert_ids" in lists:
                _arrange(lists, model, record, problem_ids_T, token_ids_T)
            writer.write(problem_ids_T, token_ids_T, lists)
    return problems.missing(keys_N)


def _schema(layout: StreamLayout, model: ModelMetadata, record: RecordMetadata) -> Any:
    if "expert_ids" in layout.types:
        return routing_schema(model.num_experts, model.top_k, weights=record.weights, empty_slots=bool(record.empty_slots))
    ((column, (_, width)),) = layout.types.items()
    return values_schema(column, width)


def _gather(indices: list[CaptureIndex], layout: StreamLayout, places_T: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
    """Read tokens as `[T, L, W]` arrays; `places_T` counts through the streams of all runs, one after the other."""
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
    """Sort the pairs of each token, after checking that no expert occurs twice."""
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
