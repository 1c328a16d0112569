"""Routes of one side of a problem-level split: what predictors are fitted on and judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.errors import TraceError
from profiler.reader import Trace, concatenate
from profiler.schema import DECODE, RoutingChunk
from profiler.splits import digest, digest_of_number, problem_digests

PARTS = ("train", "validation", "test")
# Shares of the hash space in percent. A problem's side depends on its prompt alone, so it never changes when a trace grows.
_UP_TO = {"train": 70, "validation": 80, "test": 100}
UNKNOWN_TOKEN = -1


class EmptyPartError(TraceError):
    """No problem of the trace falls into the asked part of the split."""


@dataclass(frozen=True)
class Routes:
    """Tokens of whole problems, in order.

    expert_ids_TLK `[T, L, K]` and weights_TLK `[T, L, K]` as in the trace, sorted by weight; equal weights if it has none.
    problem_ids_T, token_ids_T `[T]`: problem and position in the sequence.
    vocab_ids_T `[T]`: the token's vocabulary id, or -1 if the trace does not say. is_decode_T `[T]`: generated, not prompt.
    previous_T `[T]`: index of the same problem's preceding token in these arrays, or -1.
    """

    expert_ids_TLK: npt.NDArray[np.unsignedinteger[Any]]
    weights_TLK: npt.NDArray[np.float16]
    problem_ids_T: npt.NDArray[np.int32]
    token_ids_T: npt.NDArray[np.int32]
    vocab_ids_T: npt.NDArray[np.int32]
    is_decode_T: npt.NDArray[np.bool_]
    previous_T: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.problem_ids_T)

    @property
    def num_problems(self) -> int:
        """Problems that have at least one token here."""
        return len(np.unique(self.problem_ids_T))


def part_of(prompt: str) -> str:
    """train, validation or test (70 : 10 : 20), from the SHA-256 of the prompt; equal prompts fall on one side."""
    return _part_of_digest(digest(prompt))


def _part_of_digest(number: int) -> str:
    return next(part for part, limit in _UP_TO.items() if number % 100 < limit)


def load_routes(trace: Trace, part: str) -> Routes:
    """The routes of one part of `trace`, in memory.

    part: train, validation, test, or all. A trace without prompts is split by its problem ids.
    Raises `EmptyPartError` if no problem falls into the part.
    """
    if trace.metadata.record.empty_slots:
        count = trace.metadata.record.empty_slots
        raise TraceError(
            f"{trace.path}: {count:,} slots have no expert, and predictors are judged by sets of K: "
            "convert the source again with --drop-incomplete"
        )
    problem_ids = _problems_of_part(trace, part)
    pieces = []
    for chunk in trace.chunks():
        keep_T = np.isin(chunk.problem_ids_T, problem_ids)
        if keep_T.any():
            pieces.append(chunk.take(keep_T))
    if not pieces:
        raise EmptyPartError(f"{trace.path}: no problem falls into the {part} part of the split; collect more problems")
    return make_routes(concatenate(pieces), *_token_facts(trace))


def make_routes(
    chunk: RoutingChunk,
    token_keys: npt.NDArray[np.int64] | None = None,
    vocab_ids: npt.NDArray[np.int32] | None = None,
    is_decode: npt.NDArray[np.bool_] | None = None,
) -> Routes:
    """Routes of a chunk of whole problems.

    token_keys: ascending `problem_id << 32 | token_id` of the known tokens, with their vocabulary ids and phases.
    """
    key_T = _keys(chunk.problem_ids_T, chunk.token_ids_T)
    vocab_ids_T = np.full(len(chunk), UNKNOWN_TOKEN, dtype=np.int32)
    is_decode_T = np.zeros(len(chunk), dtype=np.bool_)
    if token_keys is not None and vocab_ids is not None and is_decode is not None and len(token_keys):
        found_T = np.minimum(np.searchsorted(token_keys, key_T), len(token_keys) - 1)
        known_T = token_keys[found_T] == key_T
        vocab_ids_T[known_T] = vocab_ids[found_T[known_T]]
        is_decode_T[known_T] = is_decode[found_T[known_T]]
    follows_T = np.zeros(len(chunk), dtype=np.bool_)
    follows_T[1:] = np.diff(key_T) == 1
    return Routes(
        expert_ids_TLK=chunk.expert_ids_TLK,
        weights_TLK=equal_weights(chunk) if chunk.weights_TLK is None else chunk.weights_TLK,
        problem_ids_T=chunk.problem_ids_T,
        token_ids_T=chunk.token_ids_T,
        vocab_ids_T=vocab_ids_T,
        is_decode_T=is_decode_T,
        previous_T=np.where(follows_T, np.arange(len(chunk)) - 1, -1),
    )


def equal_weights(chunk: RoutingChunk) -> npt.NDArray[np.float16]:
    """1/K for every expert: what is known where nothing was recorded."""
    return np.full(chunk.expert_ids_TLK.shape, 1 / chunk.expert_ids_TLK.shape[-1], dtype=np.float16)


def _problems_of_part(trace: Trace, part: str) -> npt.NDArray[np.int32]:
    if trace.has_problems:
        digests = problem_digests(trace)
    else:
        digests = {int(i): digest_of_number(int(i)) for chunk in trace.chunks() for i in np.unique(chunk.problem_ids_T)}
    chosen = [problem_id for problem_id, number in digests.items() if part in {"all", _part_of_digest(number)}]
    return np.array(sorted(chosen), dtype=np.int32)


def _token_facts(
    trace: Trace,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.bool_]] | tuple[None, None, None]:
    if not trace.has_tokens:
        return None, None, None
    tokens = trace.tokens
    keys = _keys(tokens.column("problem_id").to_numpy(), tokens.column("token_id").to_numpy())
    if (np.diff(keys) <= 0).any():
        raise TraceError(f"{trace.path}: tokens.parquet is not sorted by (problem_id, token_id)")
    phase = tokens.column("phase").cast("string").to_numpy(zero_copy_only=False)
    return keys, tokens.column("vocab_id").fill_null(UNKNOWN_TOKEN).to_numpy(), phase == DECODE


def _keys(problem_ids: npt.NDArray[Any], token_ids: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    return problem_ids.astype(np.int64) << 32 | token_ids.astype(np.int64)
