"""Routes of one side of a problem-level split: what predictors are fitted on and judged by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from analysis.counts.survey import token_identity
from profiler.errors import EmptyPartError, SpecmoeError, TraceError
from profiler.trace.reader import Trace, concatenate
from profiler.trace.schema import DECODE, TOKENS_FILE, RoutingChunk
from profiler.trace.splits import digest, digest_of_number, problem_digests
from profiler.trace.untrusted.parquet_files import stream_table
from speculation.data.repeats import UNKNOWN_TOKEN, Matches, find_matches
from speculation.data.router_inputs import RouterInputs, with_router_inputs

TOKEN_FIELDS = [("problem_id", pa.int32()), ("token_id", pa.int32()), ("phase", pa.string())]
TOKEN_ROWS = 1 << 16
# Shares of the hash space in percent. A problem's side depends on its prompt alone, so it never changes when a trace grows.
_UP_TO = {"train": 70, "validation": 80, "test": 100}


class RouteSource(Protocol):
    """Routes to learn from, in groups of whole problems: one group in memory is enough."""

    @property
    def group_tokens(self) -> list[int]:
        """Tokens of each group; none is empty."""
        ...

    @property
    def problem_ids(self) -> npt.NDArray[np.int32]:
        """Of the problems that have a token here `[P]`, ascending."""
        ...

    def __len__(self) -> int:
        """Tokens, of all groups."""
        ...

    def group(self, number: int) -> Routes:
        """One group in memory."""
        ...


def each_group(source: RouteSource) -> Iterator[Routes]:
    """All groups, one after the other."""
    return (source.group(number) for number in range(len(source.group_tokens)))


@dataclass(frozen=True)
class Routes:
    """Tokens of whole problems, in order; as a `RouteSource`, one group.

    expert_ids_TLK `[T, L, K]` and weights_TLK `[T, L, K]` as in the trace, sorted by weight; equal weights if it has none.
    problem_ids_T, token_ids_T `[T]`: problem and position in the sequence.
    token_keys_T `[T]`: which token it is: its vocabulary id, a digest of its text where there is no id, or UNKNOWN_TOKEN.
    is_decode_T `[T]`: generated, not prompt.
    first_T `[T]`: index here of the first token of the unbroken stretch that the token is in: all of `first_T[t]..t` is known.
    router: what the routers were given, where that was recorded and asked for.
    """

    expert_ids_TLK: npt.NDArray[np.unsignedinteger[Any]]
    weights_TLK: npt.NDArray[np.float16]
    problem_ids_T: npt.NDArray[np.int32]
    token_ids_T: npt.NDArray[np.int32]
    token_keys_T: npt.NDArray[np.int64]
    is_decode_T: npt.NDArray[np.bool_]
    first_T: npt.NDArray[np.int64]
    router: RouterInputs | None = None

    def __len__(self) -> int:
        return len(self.problem_ids_T)

    @property
    def group_tokens(self) -> list[int]:
        return [len(self)]

    @property
    def problem_ids(self) -> npt.NDArray[np.int32]:
        return np.unique(self.problem_ids_T)

    def group(self, number: int) -> Routes:
        return self

    def of_problems(self, is_chosen_T: npt.NDArray[np.bool_]) -> Routes:
        """The routes of some problems only; is_chosen_T `[T]`: true for all tokens of these."""
        place_T = np.cumsum(is_chosen_T) - 1
        fields = {name: getattr(self, name) for name in Routes.__dataclass_fields__ if name != "router"}
        arrays: dict[str, Any] = {name: array[is_chosen_T] for name, array in fields.items()}
        arrays["router"] = None if self.router is None else self.router.of_tokens(is_chosen_T)
        return Routes(**arrays | {"first_T": place_T[self.first_T[is_chosen_T]]})

    @cached_property
    def previous_T(self) -> npt.NDArray[np.int64]:
        """Index of the token directly before `[T]`, or -1."""
        index_T = np.arange(len(self))
        return np.where(self.first_T < index_T, index_T - 1, -1)

    @cached_property
    def followers_T(self) -> npt.NDArray[np.int64]:
        """How many tokens follow directly, without a gap `[T]`."""
        firsts_S, counts_S = np.unique(self.first_T, return_counts=True)
        return np.asarray(np.repeat(firsts_S + counts_S - 1, counts_S) - np.arange(len(self)))

    @cached_property
    def matches(self) -> Matches:
        """Where the run of tokens that ends at each one ended before."""
        return find_matches(self.token_keys_T, self.first_T)


def part_of(prompt: str) -> str:
    """train, validation or test (70 : 10 : 20), from the SHA-256 of the prompt; equal prompts fall on one side."""
    return _part_of_digest(digest(prompt))


def _part_of_digest(number: int) -> str:
    return next(part for part, limit in _UP_TO.items() if number % 100 < limit)


def load_routes(trace: Trace, part: str, *, router_inputs: bool = False) -> Routes:
    """The routes of one part of `trace`, in memory.

    part: train, validation, test, or all. A trace without prompts is split by its problem ids. router_inputs: with them, and
    then only of the problems that have them. Raises `EmptyPartError` if no problem falls into the part.
    """
    return load_problems(trace, problems_of_part(trace, part), part, router_inputs=router_inputs)


def load_problems(
    trace: Trace, problem_ids: npt.NDArray[np.int32], part: str, *, among: range | None = None, router_inputs: bool = False
) -> Routes:
    """As `load_routes`, of these problems. among: they are in this range of ids, and nothing else is read."""
    pieces = []
    for chunk in trace.chunks(problems=among):
        keep_T = np.isin(chunk.problem_ids_T, problem_ids)
        if keep_T.any():
            pieces.append(chunk.take(keep_T))
    if not pieces:
        raise EmptyPartError(f"{trace.path}: no problem falls into the {part} part of the split; collect more problems")
    chunk = concatenate(pieces)
    if not router_inputs:
        return make_routes(chunk, _token_facts(trace, among))
    chunk, router = with_router_inputs(trace, chunk)
    return replace(make_routes(chunk, _token_facts(trace, among)), router=router)


def router_inputs_of(routes: Routes, name: str, width: int | None = None) -> RouterInputs:
    """The router inputs, for the predictor of this name. Raises `SpecmoeError` if there are none, or of another width."""
    if routes.router is None:
        raise SpecmoeError(f"{name} needs router inputs: a trace collected with --capture-hidden of all MoE layers")
    found = routes.router.hidden_TLD.shape[2]
    if width not in {None, found}:
        raise SpecmoeError(f"{name} takes router inputs of width {width}, these have {found}")
    return routes.router


def router_input_scale(source: RouteSource, name: str) -> npt.NDArray[np.float64]:
    """1 / the standard deviation of each router input `[L, D]`: models differ in the size of their activations."""
    sizes = router_inputs_of(source.group(0), name).hidden_TLD.shape[1:]
    sum_LD, squares_LD = np.zeros(sizes), np.zeros(sizes)
    for routes in each_group(source):
        hidden_TLD = router_inputs_of(routes, name, sizes[1]).hidden_TLD
        for layer in range(sizes[0]):
            values_TD = hidden_TLD[:, layer].astype(np.float64)
            sum_LD[layer] += values_TD.sum(0)
            squares_LD[layer] += (values_TD**2).sum(0)
    deviation_LD = np.sqrt(np.maximum(squares_LD / len(source) - (sum_LD / len(source)) ** 2, 0))
    return np.asarray(1 / np.maximum(deviation_LD, 1e-4))


@dataclass(frozen=True)
class TokenFacts:
    """The known tokens `[N]`: ascending `problem_id << 32 | token_id`, which token each is, and whether it was generated."""

    places_N: npt.NDArray[np.int64]
    token_keys_N: npt.NDArray[np.int64]
    is_decode_N: npt.NDArray[np.bool_]


def make_routes(chunk: RoutingChunk, facts: TokenFacts | None = None) -> Routes:
    """Routes of a chunk of whole problems."""
    place_T = _places(chunk.problem_ids_T, chunk.token_ids_T)
    token_keys_T = np.full(len(chunk), UNKNOWN_TOKEN, dtype=np.int64)
    is_decode_T = np.zeros(len(chunk), dtype=np.bool_)
    if facts is not None and len(facts.places_N):
        found_T = np.minimum(np.searchsorted(facts.places_N, place_T), len(facts.places_N) - 1)
        known_T = facts.places_N[found_T] == place_T
        token_keys_T[known_T] = facts.token_keys_N[found_T[known_T]]
        is_decode_T[known_T] = facts.is_decode_N[found_T[known_T]]
    starts_T = np.diff(place_T, prepend=-2) != 1
    return Routes(
        expert_ids_TLK=chunk.expert_ids_TLK,
        weights_TLK=equal_weights(chunk) if chunk.weights_TLK is None else chunk.weights_TLK,
        problem_ids_T=chunk.problem_ids_T,
        token_ids_T=chunk.token_ids_T,
        token_keys_T=token_keys_T,
        is_decode_T=is_decode_T,
        first_T=np.maximum.accumulate(np.where(starts_T, np.arange(len(chunk)), 0)),
    )


def equal_weights(chunk: RoutingChunk) -> npt.NDArray[np.float16]:
    """1/K for every expert: what is known where nothing was recorded."""
    return np.full(chunk.expert_ids_TLK.shape, 1 / chunk.expert_ids_TLK.shape[-1], dtype=np.float16)


def route_digests(trace: Trace, routes: RouteSource) -> npt.NDArray[np.uint64]:
    """What identifies the problems of `routes` `[P]`, ascending: digests of what decides the split of `trace`."""
    digests = _digests(trace)
    return np.unique(np.array([digests[int(i)] for i in routes.problem_ids], dtype=np.uint64))


def problems_of_part(trace: Trace, part: str) -> npt.NDArray[np.int32]:
    """Ids of the problems that fall into a part `[P]`, ascending. Raises `TraceError` if predictors cannot use the trace."""
    if trace.metadata.record.empty_slots:
        count = trace.metadata.record.empty_slots
        raise TraceError(
            f"{trace.path}: {count:,} slots have no expert, and predictors are judged by sets of K: "
            "convert the source again with --drop-incomplete"
        )
    chosen = [problem_id for problem_id, number in _digests(trace).items() if part in {"all", _part_of_digest(number)}]
    return np.array(sorted(chosen), dtype=np.int32)


def _digests(trace: Trace) -> dict[int, int]:
    if trace.has_problems:
        return problem_digests(trace)
    return {int(i): digest_of_number(int(i)) for chunk in trace.chunks() for i in np.unique(chunk.problem_ids_T)}


def _token_facts(trace: Trace, problems: range | None) -> TokenFacts | None:
    if not trace.has_tokens:
        return None
    identity = token_identity(trace)
    tokens = _tokens_of(trace, identity, problems) if problems is not None else trace.tokens
    places = _places(tokens.column("problem_id").to_numpy(), tokens.column("token_id").to_numpy())
    if (np.diff(places) <= 0).any():
        raise TraceError(f"{trace.path}: tokens.parquet is not sorted by (problem_id, token_id)")
    phase = tokens.column("phase").cast("string").to_numpy(zero_copy_only=False)
    return TokenFacts(places, _token_keys(tokens, identity), phase == DECODE)


def _tokens_of(trace: Trace, identity: pa.Field | None, problems: range) -> pa.Table:
    """The rows of `tokens.parquet` about these problems; no more of it is in memory at a time."""
    schema = pa.schema([*TOKEN_FIELDS, *([identity] if identity else [])])
    tables = [schema.empty_table()]
    for table in stream_table(trace.path / TOKENS_FILE, schema, TOKEN_ROWS, problems.start):
        ids = table.column("problem_id").to_numpy()
        if (np.diff(ids) < 0).any():
            raise TraceError(f"{trace.path}: tokens.parquet is not sorted by (problem_id, token_id)")
        first, end = np.searchsorted(ids, [problems.start, problems.stop])
        tables.append(table.slice(first, end - first))
        if end < len(ids):
            break
    return pa.concat_tables(tables)


def _token_keys(tokens: pa.Table, identity: pa.Field | None) -> npt.NDArray[np.int64]:
    """Which token each is, by the column that says so."""
    if identity is None:
        return np.full(len(tokens), UNKNOWN_TOKEN, dtype=np.int64)
    column = tokens.column(identity.name)
    if pa.types.is_integer(identity.type):
        return np.asarray(column.fill_null(UNKNOWN_TOKEN).to_numpy(), dtype=np.int64)
    text = column.combine_chunks().dictionary_encode()
    keys = [UNKNOWN_TOKEN if word is None else digest(word) >> 1 for word in text.dictionary.to_pylist()]
    index_N = text.indices.fill_null(len(keys)).to_numpy(zero_copy_only=False)
    return np.asarray(np.array([*keys, UNKNOWN_TOKEN], dtype=np.int64)[index_N])


def _places(problem_ids: npt.NDArray[Any], token_ids: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    return problem_ids.astype(np.int64) << 32 | token_ids.astype(np.int64)
