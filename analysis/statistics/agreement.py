"""Do two traces route the same tokens to the same experts? Measures what a quantization or another engine changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from analysis.counts.accumulator import Counts, Floats
from analysis.counts.kernels import as_bits, as_input
from analysis.counts.load import count_experts
from analysis.counts.survey import EVERYTHING, ROWS_AT_A_TIME, Choice, chosen_problems
from analysis.statistics.load import normalized
from profiler.trace.reader import Trace
from profiler.trace.schema import PREFILL, TOKENS_FILE
from profiler.trace.splits import problem_digests, split_key
from profiler.trace.untrusted.parquet_files import stream_table


@dataclass(frozen=True)
class Agreement:
    """How often two traces of the same shape route the same prompt tokens to the same experts.

    Only prompt tokens are compared: generated texts diverge from the first token that differs. Shares are between 0 and 1.

    Attributes:
        problems: Number of prompts that were compared.
        tokens: Number of tokens that were compared.
        shared: Mean number of experts in common, divided by K, per MoE layer `[L]`.
        same_set: Share of tokens with the same set of K experts `[L]`.
        same_first: Share of tokens with the same strongest expert `[L]`; `nan` if a trace does not say which that is.
        shared_shuffled: The control for `shared` `[L]`: its expected value for two random tokens, one from each trace, computed
            from the expert loads of both.
    """

    problems: int
    tokens: int
    shared: Floats
    same_set: Floats
    same_first: Floats
    shared_shuffled: Floats


def prompt_agreement(first: Trace, second: Trace, choice: Choice = EVERYTHING) -> Agreement | None:
    """Compare two traces token by token on the prompts that are in both.

    Prompts match if their text, or the hash that the source provided, is equal and they have the same number of tokens. Both
    traces are read in the order of their problem ids. If two prompts come in the opposite order in the other trace, one of the
    two is skipped. Memory use: one row group of each trace.

    Args:
        first: A trace.
        second: Another trace, for example of the same model in another precision.
        choice: Problems to compare; those that it leaves out are skipped in both traces.

    Returns:
        The agreement, or None if the traces cannot be compared: the numbers of MoE layers, experts or K differ, a trace has
        empty expert slots, lacks `tokens.parquet` or does not identify its prompts, or no prompt is in both.

    Raises:
        TraceError: A file of a trace is broken, or lacks a column that `choice` names.

    Example:
        >>> from profiler import Trace
        >>> bf16, awq = Trace.open("traces/bf16"), Trace.open("traces/awq")  # doctest: +SKIP
        >>> agreement = prompt_agreement(bf16, awq)  # doctest: +SKIP
        >>> agreement.shared.mean()  # share of the K experts that both precisions select  # doctest: +SKIP
    """
    return agreement_of(read_prompts(first, choice), read_prompts(second, choice))


@dataclass(frozen=True)
class Prompts:
    """The prompts of a trace.

    Attributes:
        trace: The trace.
        is_identified: Whether equal digests mean equal prompts in any trace.
        digests: Digest of each problem's prompt, by problem id; empty if they are not identified.
        chosen: Ids of the problems that the choice keeps.
    """

    trace: Trace
    is_identified: bool
    digests: dict[int, int]
    chosen: set[int]


def read_prompts(trace: Trace, choice: Choice = EVERYTHING) -> Prompts:
    """Read the digests of a trace's prompts once, for any number of comparisons."""
    if split_key(trace) in {"source key", "problem id"}:
        return Prompts(trace, False, {}, set())
    chosen = {
        problem_id
        for problem_ids, names in chosen_problems(trace, choice)
        for problem_id, name in zip(problem_ids.tolist(), names, strict=True)
        if name is not None
    }
    return Prompts(trace, True, problem_digests(trace), chosen)


def agreement_of(one: Prompts, other: Prompts) -> Agreement | None:
    """Compute `prompt_agreement` from prompts that were read before."""
    first, second = one.trace, other.trace
    a, b = first.metadata.model, second.metadata.model
    if (len(a.moe_layers), a.num_experts, a.top_k) != (len(b.moe_layers), b.num_experts, b.top_k):
        return None
    if first.metadata.record.empty_slots or second.metadata.record.empty_slots:
        return None
    if not (one.is_identified and other.is_identified) or split_key(first) != split_key(second):
        return None
    if not (first.has_tokens and second.has_tokens):
        return None
    layers, experts, top_k = len(a.moe_layers), a.num_experts, a.top_k
    totals: Counts = np.zeros((3, layers), dtype=np.int64)
    loads = [np.zeros((layers, experts), dtype=np.int64) for _ in range(2)]
    problems = tokens = 0
    for mine_TLK, theirs_TLK in _same_prompts(one, other):
        problems, tokens = problems + 1, tokens + len(mine_TLK)
        bits = [as_bits(as_input(ids_TLK), top_k, experts) for ids_TLK in (mine_TLK, theirs_TLK)]
        common_TL = np.bitwise_count(bits[0] & bits[1]).sum(-1, dtype=np.int64)
        same_first_TL = mine_TLK[:, :, 0] == theirs_TLK[:, :, 0]
        totals += np.stack([common_TL.sum(0), (common_TL == top_k).sum(0), same_first_TL.sum(0)])
        for load, ids_TLK in zip(loads, (mine_TLK, theirs_TLK), strict=True):
            load += count_experts(ids_TLK, experts)
    if tokens == 0:
        return None
    shuffled = (normalized(loads[0]) * normalized(loads[1])).sum(1) * top_k
    shared_L, same_set_L, same_first_L = totals[0] / tokens / top_k, totals[1] / tokens, totals[2] / tokens
    if not (first.metadata.knows_strongest and second.metadata.knows_strongest):
        same_first_L = np.full(layers, np.nan)
    return Agreement(problems, tokens, shared_L, same_set_L, same_first_L, shuffled)


Ids = npt.NDArray[Any]


def _same_prompts(one: Prompts, other: Prompts) -> Iterator[tuple[Ids, Ids]]:
    """Expert ids `[T, L, K]` of the chosen prompts that are in both traces, in order."""
    number_of = {
        digest: problem_id for problem_id, digest in sorted(other.digests.items(), reverse=True) if problem_id in other.chosen
    }
    theirs = _prompts(other.trace)
    candidate = next(theirs, None)
    for problem_id, mine_TLK in _prompts(one.trace):
        wanted = number_of.get(one.digests[problem_id]) if problem_id in one.chosen else None
        if wanted is None:
            continue
        while candidate is not None and candidate[0] < wanted:
            candidate = next(theirs, None)
        if candidate is None:
            return
        if candidate[0] == wanted and len(candidate[1]) == len(mine_TLK):
            yield mine_TLK, candidate[1]


def same_problems(one: Prompts, other: Prompts) -> bool:
    """Whether two traces have the same prompts under the same problem ids, so that their problems can be paired."""
    return (
        one.is_identified
        and other.is_identified
        and split_key(one.trace) == split_key(other.trace)
        and one.digests == other.digests
    )


def _prompts(trace: Trace) -> Iterator[tuple[int, Ids]]:
    """Problem ids and the expert ids of their prompts `[T, L, K]`, in order; problems without prompt tokens are skipped."""
    lengths = _prompt_lengths(trace)
    for chunk in trace.chunks():
        starts = np.flatnonzero(np.diff(chunk.problem_ids_T, prepend=-1))
        for start, end in zip(starts, [*starts[1:], len(chunk)], strict=True):
            problem_id = int(chunk.problem_ids_T[start])
            prompt = chunk.take(slice(int(start), int(end)))
            prompt = prompt.take(prompt.token_ids_T < lengths.get(problem_id, 0))
            if len(prompt):
                yield problem_id, prompt.expert_ids_TLK


def _prompt_lengths(trace: Trace) -> dict[int, int]:
    """Number of prompt tokens of each problem."""
    lengths: dict[int, int] = {}
    schema = pa.schema([("problem_id", pa.int32()), ("phase", pa.string())])
    for table in stream_table(trace.path / TOKENS_FILE, schema, ROWS_AT_A_TIME):
        prefill = table.column(1).to_numpy(zero_copy_only=False) == PREFILL
        ids, counts = np.unique(table.column(0).to_numpy()[prefill], return_counts=True)
        for problem_id, count in zip(ids.tolist(), counts.tolist(), strict=True):
            lengths[problem_id] = lengths.get(problem_id, 0) + count
    return lengths
