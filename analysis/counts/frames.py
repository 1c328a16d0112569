"""Chunks of routing, joined with the dataset, phase, fold and vocabulary entry of each token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from analysis.counts.kernels import as_input
from analysis.counts.survey import Axes, dataset_indices, token_identity
from profiler.errors import TraceError
from profiler.trace.reader import Trace
from profiler.trace.schema import DECODE, PREFILL, RoutingChunk
from profiler.trace.splits import digest_of_number, iterate_digests
from profiler.trace.token_columns import TokenColumns

PHASES = (PREFILL, DECODE, "unknown")
UNKNOWN_PHASE = 2
EVERY_PROBLEM = range(1 << 31)


@dataclass(frozen=True)
class Frame:
    """A chunk with the properties of each of its tokens `[T]`; all arrays are contiguous and read-only.

    dataset_T: index into `Axes.datasets`. phase_T: index into PHASES. fold_T: 0 or 1, by hash of the problem's prompt; the two
    folds are halves of the problems for cross-validation. vocab_T: index into `Axes.vocabulary`; its length for tokens outside
    it, -1 if unknown.
    """

    chunk: RoutingChunk
    dataset_T: npt.NDArray[np.int32]
    phase_T: npt.NDArray[np.int32]
    fold_T: npt.NDArray[np.int32]
    vocab_T: npt.NDArray[np.int32]

    def __post_init__(self) -> None:
        chunk = self.chunk
        contiguous = RoutingChunk(
            problem_ids_T=as_input(chunk.problem_ids_T),
            token_ids_T=as_input(chunk.token_ids_T),
            expert_ids_TLK=as_input(chunk.expert_ids_TLK),
            weights_TLK=None if chunk.weights_TLK is None else as_input(chunk.weights_TLK),
        )
        object.__setattr__(self, "chunk", contiguous)
        for name in ("dataset_T", "phase_T", "fold_T", "vocab_T"):
            object.__setattr__(self, name, as_input(getattr(self, name)))

    def __len__(self) -> int:
        return len(self.chunk)

    def take(self, tokens: slice) -> Frame:
        """The frame with only these tokens (views)."""
        return Frame(
            self.chunk.take(tokens), self.dataset_T[tokens], self.phase_T[tokens], self.fold_T[tokens], self.vocab_T[tokens]
        )


@dataclass(frozen=True)
class ProblemFacts:
    """Domain (-1 if left out) and fold of the problems in `problems.parquet`, by ascending id `[P]`; empty without the file."""

    ids_P: npt.NDArray[np.int64]
    dataset_P: npt.NDArray[np.int32]
    fold_P: npt.NDArray[np.int8]


def problem_facts(trace: Trace, axes: Axes) -> ProblemFacts:
    """Domain and fold of each problem."""
    ids_P, dataset_P = dataset_indices(trace, axes)
    folds = (_fold(digest) for _, digest in iterate_digests(trace)) if trace.has_problems else ()
    return ProblemFacts(ids_P, dataset_P, np.fromiter(folds, dtype=np.int8))


def _fold(digest: int) -> int:
    """The half that a problem belongs to; independent of the digits that decide whether it is a training or a test problem."""
    return digest // 100 & 1


def read_frames(
    trace: Trace, axes: Axes, problems: range = EVERY_PROBLEM, facts: ProblemFacts | None = None
) -> Iterator[Frame]:
    """The frames of the problems with ids in a range, in order, one row group at a time.

    facts: `problem_facts` of the trace, if already computed. Raises `TraceError` as `Trace.chunks` does, and if
    `problems.parquet` lacks a problem or a table is not sorted.
    """
    facts = facts or problem_facts(trace, axes)
    tokens = _tokens(trace, axes, problems.start)
    for chunk in trace.chunks(whole_problems=False, problems=None if problems == EVERY_PROBLEM else problems):
        if trace.has_problems:
            at_T = np.minimum(np.searchsorted(facts.ids_P, chunk.problem_ids_T), len(facts.ids_P) - 1)
            unlisted_T = facts.ids_P[at_T] != chunk.problem_ids_T
            if unlisted_T.any():
                problem_id = chunk.problem_ids_T[unlisted_T][0]
                raise TraceError(f"{trace.path}: routing rows of problem {problem_id}, which problems.parquet does not list")
            dataset_T, fold_T = facts.dataset_P[at_T], facts.fold_P[at_T].astype(np.int32)
            kept_T = dataset_T >= 0
            if not kept_T.all():
                chunk, dataset_T, fold_T = chunk.take(kept_T), dataset_T[kept_T], fold_T[kept_T]
                if not len(chunk):
                    continue
        else:
            ids_P, of_T = np.unique(chunk.problem_ids_T, return_inverse=True)
            dataset_T = np.zeros(len(chunk), dtype=np.int32)
            fold_T = np.array([_fold(digest_of_number(int(number))) for number in ids_P], dtype=np.int32)[of_T]
        phase_T, vocab_T = np.ascontiguousarray(tokens.of(chunk).T)
        yield Frame(chunk, dataset_T, phase_T, fold_T, vocab_T)


def _tokens(trace: Trace, axes: Axes, first_problem: int) -> TokenColumns:
    """Phase and vocabulary index of each token, `[T, 2]`."""
    identity = token_identity(trace) if trace.has_tokens else None
    vocabulary = pa.array(axes.vocabulary, identity.type) if identity and axes.vocabulary else None
    phases = pa.array(PHASES[:UNKNOWN_PHASE])

    def values(table: pa.Table) -> npt.NDArray[np.int32]:
        values_N2 = np.empty((table.num_rows, 2), dtype=np.int32)
        values_N2[:, 0] = _places(table.column("phase"), phases, UNKNOWN_PHASE)
        values_N2[:, 1] = -1
        if identity and vocabulary is not None:
            column = table.column(identity.name)
            known = column.is_valid().to_numpy()
            values_N2[known, 1] = _places(column, vocabulary, len(vocabulary))[known]
        return values_N2

    columns = [pa.field("phase", pa.string()), *([identity] if identity else [])]
    return TokenColumns(trace, columns, values, np.array([UNKNOWN_PHASE, -1], dtype=np.int32), first_problem=first_problem)


def _places(column: Any, values: Any, otherwise: int) -> npt.NDArray[np.int32]:
    """Index of each entry in `values`, `otherwise` where it is not in them."""
    found = pc.fill_null(pc.index_in(column, value_set=values), otherwise)
    return np.array(found.to_numpy(), dtype=np.int32)
