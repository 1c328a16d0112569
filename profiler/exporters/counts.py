"""How often each expert is chosen in the parts of a trace's split: all that the exporters need to know of a trace.

Shape letters: T tokens, L MoE layers, K experts per token, E experts, P problems.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from profiler.errors import EmptyPartError, TraceError, counted
from profiler.trace.reader import Trace
from profiler.trace.schema import DECODE, RoutingChunk
from profiler.trace.splits import PARTS, all_digests, part_of_digest
from profiler.trace.token_columns import TokenColumns

# Tokens that are counted at a time: their ids take 8 bytes each while they are counted.
TOKENS_AT_A_TIME = 1 << 14


@dataclass(frozen=True)
class ExpertCounts:
    """Choices of experts over some problems.

    Attributes:
        tokens_LE: int64 `[L, E]`, tokens that were routed to each expert.
        mass_LE: float64 `[L, E]`, the sum of their routing weights; 1/K for each choice if the trace has no weights.
        num_tokens: Number of tokens.
        num_problems: Number of problems with at least one of these tokens.
    """

    tokens_LE: npt.NDArray[np.int64]
    mass_LE: npt.NDArray[np.float64]
    num_tokens: int
    num_problems: int

    def __add__(self, other: ExpertCounts) -> ExpertCounts:
        return ExpertCounts(
            self.tokens_LE + other.tokens_LE,
            self.mass_LE + other.mass_LE,
            self.num_tokens + other.num_tokens,
            self.num_problems + other.num_problems,
        )


@dataclass(frozen=True)
class PartCounts:
    """The counts of each part of the split.

    Attributes:
        parts: Part -> counts. Parts without tokens are missing.
        is_decode_only: Whether only generated tokens were counted.
        problems: Part -> problems with any tokens, counted or not.
    """

    parts: dict[str, ExpertCounts]
    is_decode_only: bool
    problems: dict[str, int]

    def part(self, name: str) -> ExpertCounts:
        """The counts of a part, or of all parts (`"all"`). Raises `EmptyPartError` if it has no token."""
        found = [counts for part, counts in self.parts.items() if name in {"all", part}]
        if not found and (problems := self.problems.get(name, 0)):
            raise EmptyPartError(
                f"none of {counted(problems, 'problem')} in the {name} part of the split has a generated token with "
                "routing: count the tokens of prompts too (phase all), or choose another part"
            )
        if not found:
            raise EmptyPartError(f"no problem falls into the {name} part of the split: choose another part, or a longer trace")
        total = found[0]
        for counts in found[1:]:
            total = total + counts
        return total


def count_parts(trace: Trace, *, decode_only: bool = True) -> PartCounts:
    """Count the choices of experts in every part of a trace's split by problem, in one pass and bounded memory.

    Args:
        trace: An open trace.
        decode_only: Count generated tokens only. If the trace does not say which ones were generated, all are counted.

    Raises:
        TraceError: As `Trace.chunks` does, if the trace has no tokens, or if `problems.parquet` lacks a problem.
    """
    digests = all_digests(trace)
    ids_P = np.array(sorted(digests), dtype=np.int64)
    part_P = np.array([PARTS.index(part_of_digest(digests[int(problem)])) for problem in ids_P], dtype=np.int64)
    model = trace.metadata.model
    shape = (len(PARTS), 2, len(model.moe_layers), model.num_experts)
    tokens, mass = np.zeros(shape, dtype=np.int64), np.zeros(shape)
    counted = np.zeros(shape[:2], dtype=np.int64)
    seen = np.zeros((len(ids_P), 2), dtype=np.bool_)
    generated = TokenColumns(trace, [pa.field("phase", pa.string())], _is_decode, False)
    for chunk in trace.chunks(whole_problems=False):
        at_T = np.minimum(np.searchsorted(ids_P, chunk.problem_ids_T), max(0, len(ids_P) - 1))
        if not len(ids_P) or (ids_P[at_T] != chunk.problem_ids_T).any():
            raise TraceError(f"{trace.path}: routing rows of a problem that problems.parquet does not list")
        is_decode_T = generated.of(chunk).astype(np.int64)
        seen[at_T, is_decode_T] = True
        kind_T = part_P[at_T] * 2 + is_decode_T
        for kind in np.unique(kind_T):
            part, phase = divmod(int(kind), 2)
            chosen = chunk.take(kind_T == kind)
            counted[part, phase] += len(chosen)
            for first in range(0, len(chosen), TOKENS_AT_A_TIME):
                found_LE, mass_LE = _count(chosen.take(slice(first, first + TOKENS_AT_A_TIME)), model.num_experts)
                tokens[part, phase] += found_LE
                mass[part, phase] += mass_LE
    if not counted.any():
        raise TraceError(f"{trace.path} has no routing rows")
    is_decode_only = decode_only and bool(counted[:, 1].any())
    phases = [1] if is_decode_only else [0, 1]
    parts = {}
    for number, part_name in enumerate(PARTS):
        if counted[number, phases].any():
            problems = int(seen[part_P == number][:, phases].any(1).sum())
            parts[part_name] = ExpertCounts(
                tokens[number, phases].sum(0), mass[number, phases].sum(0), int(counted[number, phases].sum()), problems
            )
    with_tokens = {name: int(seen[part_P == number].any(1).sum()) for number, name in enumerate(PARTS)}
    return PartCounts(parts, is_decode_only, with_tokens)


def _is_decode(table: pa.Table) -> npt.NDArray[np.bool_]:
    is_decode: npt.NDArray[np.bool_] = table.column("phase").to_numpy(zero_copy_only=False) == DECODE
    return is_decode


def _count(chunk: RoutingChunk, num_experts: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Choices and weights of each expert `[L, E]`. Empty slots, which hold the id E, are left out."""
    _, layers, top_k = chunk.expert_ids_TLK.shape
    places = chunk.expert_ids_TLK + np.arange(layers, dtype=np.int64)[:, None] * (num_experts + 1)
    flat, size = places.reshape(-1), layers * (num_experts + 1)
    counts = np.bincount(flat, minlength=size)
    if chunk.weights_TLK is None:
        weights: npt.NDArray[Any] = counts / top_k
    else:
        weights = np.bincount(flat, chunk.weights_TLK.reshape(-1).astype(np.float64), size)
    return counts.reshape(layers, -1)[:, :-1], weights.reshape(layers, -1)[:, :-1]
