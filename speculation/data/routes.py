"""The routes of one part of a problem-level split, which predictors are fitted on or evaluated on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from analysis.counts.survey import token_identity
from profiler.errors import EmptyPartError, SpecmoeError, TraceError, counted
from profiler.trace.decoding import concatenate
from profiler.trace.reader import Trace
from profiler.trace.schema import DECODE, TOKENS_FILE, RoutingChunk
from profiler.trace.splits import all_digests, digest, part_of_digest
from profiler.trace.untrusted.parquet_files import stream_table
from speculation.data.repeats import UNKNOWN_TOKEN, Matches, find_matches
from speculation.data.router_inputs import RouterInputs, with_router_inputs

TOKEN_FIELDS = [("problem_id", pa.int32()), ("token_id", pa.int32()), ("phase", pa.string())]
TOKEN_ROWS = 1 << 16
# Routes are packed in pieces that have at most so many bytes, one for each expert, before they are.
UNPACKED_BYTES = 4 << 20


class RouteSource(Protocol):
    """Routes in groups of whole problems. Only one group needs to be in memory at a time."""

    @property
    def group_tokens(self) -> list[int]:
        """The number of tokens in each group; no group is empty."""
        ...

    @property
    def problem_ids(self) -> npt.NDArray[np.int32]:
        """The ids of the problems with at least one token here, `[P]`, ascending."""
        ...

    def __len__(self) -> int:
        """The number of tokens in all groups."""
        ...

    def group(self, number: int) -> Routes:
        """Load one group into memory."""
        ...


def each_group(source: RouteSource) -> Iterator[Routes]:
    """Load all groups, one after the other."""
    return (source.group(number) for number in range(len(source.group_tokens)))


@dataclass(frozen=True)
class Routes:
    """The routes of T tokens of whole problems, in order. As a `RouteSource`, it is a single group.

    A *stretch* is a sequence of tokens of one problem without a gap in their positions.

    Args:
        expert_ids_TLK: uint8 or uint16 `[T, L, K]`, the selected experts as in the trace, sorted by weight, descending.
        weights_TLK: float16 `[T, L, K]`, their routing weights; 1 / K each if the trace has no weights.
        problem_ids_T: int32 `[T]`, the problem of each token.
        token_ids_T: int32 `[T]`, the token's position in its sequence (prompt + output), from 0.
        token_keys_T: int64 `[T]`, the token's identity: its vocabulary id; a digest of its text if the trace has no ids; or -1
            if unknown.
        is_decode_T: bool `[T]`, whether the token was generated (decode) rather than part of the prompt (prefill).
        first_T: int64 `[T]`, the index in these arrays of the first token of the stretch that the token is in. The routes of
            tokens `first_T[t]` to `t` are all known.
        router: The inputs of the routers, if they were recorded and requested.

    Example:
        >>> from speculation.data.history import History
        >>> from speculation.data.tasks import Shape
        >>> history = History(Shape(layers=2, experts=4, top_k=1, horizon=1))
        >>> history.begin(vocab_id=17)
        >>> history.add([3])
        >>> history.add([0])
        >>> routes = history.routes
        >>> len(routes), routes.expert_ids_TLK.tolist(), routes.token_keys_T.tolist()
        (1, [[[3], [0]]], [17])
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
        """The number of tokens in each group: there is one group."""
        return [len(self)]

    @property
    def problem_ids(self) -> npt.NDArray[np.int32]:
        """The ids of the problems with at least one token here, int32 `[P]`, ascending."""
        return np.unique(self.problem_ids_T)

    def group(self, number: int) -> Routes:
        """These routes, which are the only group."""
        return self

    def of_problems(self, is_chosen_T: npt.NDArray[np.bool_]) -> Routes:
        """Select problems.

        Args:
            is_chosen_T: bool `[T]`, true for every token of the problems to keep.

        Returns:
            The routes of these problems, copied.
        """
        place_T = np.cumsum(is_chosen_T) - 1
        fields = {name: getattr(self, name) for name in Routes.__dataclass_fields__ if name != "router"}
        arrays: dict[str, Any] = {name: array[is_chosen_T] for name, array in fields.items()}
        arrays["router"] = None if self.router is None else self.router.of_tokens(is_chosen_T)
        return Routes(**arrays | {"first_T": place_T[self.first_T[is_chosen_T]]})

    @cached_property
    def previous_T(self) -> npt.NDArray[np.int64]:
        """The index of the token directly before each one in its stretch, int64 `[T]`; -1 for the first."""
        index_T = np.arange(len(self))
        return np.where(self.first_T < index_T, index_T - 1, -1)

    @cached_property
    def followers_T(self) -> npt.NDArray[np.int64]:
        """The number of tokens that follow each one in its stretch, int64 `[T]`."""
        firsts_S, counts_S = np.unique(self.first_T, return_counts=True)
        return np.asarray(np.repeat(firsts_S + counts_S - 1, counts_S) - np.arange(len(self)))

    def packed(self, experts: int) -> npt.NDArray[np.uint64]:
        """The routes as bits for a model with this many experts, uint64 `[T, W]`: see `pack_routes`. Computed once."""
        state = vars(self)
        if state.get("_packed_for") != experts:
            packed_TW = pack_routes(self.expert_ids_TLK, experts)
            state.update(_packed=lambda ids_TLK: packed_TW, _packed_for=experts)
        # The routes of a history pack only what was added since.
        found: npt.NDArray[np.uint64] = state["_packed"](self.expert_ids_TLK)
        return found

    @cached_property
    def matches(self) -> Matches:
        """For each token, the latest earlier place where the same run of tokens ended."""
        return find_matches(self.token_keys_T, self.first_T)


def pack_routes(expert_ids_TLK: npt.NDArray[Any], experts: int) -> npt.NDArray[np.uint64]:
    """Routes as bits: bit `layer * experts + expert` of a token is set if the expert is selected.

    Args:
        expert_ids_TLK: `[T, L, K]`.
        experts: E, the number of experts per layer.

    Returns:
        uint64 `[T, W]` with W = ceil(L * E / 64), the lowest bits first.
    """
    tokens, layers, _ = expert_ids_TLK.shape
    words = -(-layers * experts // 64)
    packed_TW = np.empty((tokens, words), dtype=np.uint64)
    start_L1 = np.arange(layers)[:, None] * experts
    at_once = max(1, UNPACKED_BYTES // (64 * max(1, words)))
    for first in range(0, tokens, at_once):
        part_TLK = expert_ids_TLK[first : first + at_once]
        is_selected = np.zeros((len(part_TLK), 64 * words), dtype=np.bool_)
        is_selected[np.arange(len(part_TLK))[:, None, None], part_TLK + start_L1] = True
        packed_TW[first : first + at_once] = np.packbits(is_selected, axis=1, bitorder="little").view("<u8")
    return packed_TW


def load_routes(
    trace: Trace, part: str, *, router_inputs: bool = False, without: npt.NDArray[np.uint64] | None = None
) -> Routes:
    """Load the routes of one part of a trace into memory.

    A trace is split by a hash of the prompt, 70 : 10 : 20. A trace without prompts is split by its problem ids.

    Args:
        trace: An open trace.
        part: "train", "validation", "test" or "all".
        router_inputs: Also load the router inputs. Only problems whose router inputs were recorded are then returned.
        without: Leave out problems with these digests (see `route_digests`).

    Returns:
        The routes of all problems of the part, in the order of the trace.

    Raises:
        EmptyPartError: No problem falls into the part.
        TraceError: The trace has tokens without an expert, or lacks the router inputs.

    Example:
        >>> routes = load_routes(Trace.open("traces/math"), "test")  # doctest: +SKIP
        >>> tokens, layers, top_k = routes.expert_ids_TLK.shape  # doctest: +SKIP
    """
    return load_problems(trace, problems_of_part(trace, part, without), part, router_inputs=router_inputs)


def load_problems(
    trace: Trace, problem_ids: npt.NDArray[np.int32], part: str, *, among: range | None = None, router_inputs: bool = False
) -> Routes:
    """Load the routes of the given problems, like `load_routes`.

    part: the name of the part, for error messages. among: a range of ids that contains these problems; only it is read.
    """
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
    """The router inputs of `routes`, for the predictor called `name`.

    Raises `SpecmoeError` if `routes` has no router inputs, or if their width is not `width`.
    """
    if routes.router is None:
        raise SpecmoeError(f"{name} needs router inputs: a trace collected with capture_hidden for all MoE layers")
    found = routes.router.hidden_TLD.shape[2]
    if width not in {None, found}:
        raise SpecmoeError(f"{name} takes router inputs of width {width}, these have width {found}")
    return routes.router


def router_input_scale(source: RouteSource, name: str) -> npt.NDArray[np.float64]:
    """1 / the standard deviation of each dimension of the router inputs `[L, D]`.

    Predictors scale by it because models differ in the size of their activations.
    """
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
    """What `tokens.parquet` says about N tokens.

    places_N: `problem_id << 32 | token_id`, ascending. token_keys_N: the identity of each token. is_decode_N: whether it was
    generated.
    """

    places_N: npt.NDArray[np.int64]
    token_keys_N: npt.NDArray[np.int64]
    is_decode_N: npt.NDArray[np.bool_]


def make_routes(chunk: RoutingChunk, facts: TokenFacts | None = None) -> Routes:
    """Build `Routes` from a chunk of whole problems."""
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
    """Weights of 1/K for every expert, for traces without weights."""
    return np.full(chunk.expert_ids_TLK.shape, 1 / chunk.expert_ids_TLK.shape[-1], dtype=np.float16)


def route_digests(trace: Trace, routes: RouteSource) -> npt.NDArray[np.uint64]:
    """Digests that identify the problems of `routes` `[P]`, ascending: hashes of the field by which `trace` is split."""
    digests = all_digests(trace)
    return np.unique(np.array([digests[int(i)] for i in routes.problem_ids], dtype=np.uint64))


def problems_of_part(trace: Trace, part: str, without: npt.NDArray[np.uint64] | None = None) -> npt.NDArray[np.int32]:
    """The ids of the problems in a part `[P]`, ascending, except those with the digests `without`.

    Raises `TraceError` if predictors cannot use the trace, and `EmptyPartError` if `without` leaves out the whole part.
    """
    if trace.metadata.record.empty_slots:
        count = trace.metadata.record.empty_slots
        raise TraceError(
            f"{trace.path}: {counted(count, 'slot')} without an expert, but predictors are evaluated on complete sets of K "
            "experts: "
            "convert the source again with drop_incomplete"
        )
    left_out = set() if without is None else set(without.tolist())
    digests = {
        problem_id: number for problem_id, number in all_digests(trace).items() if part in {"all", part_of_digest(number)}
    }
    chosen = sorted(problem_id for problem_id, number in digests.items() if number not in left_out)
    if digests and not chosen:
        kept = "problems" if part == "all" else f"problems of the {part} part"
        raise EmptyPartError(
            f"{trace.path}: all its {kept} are also among those that it must not share: choose a trace with other problems"
        )
    return np.array(chosen, dtype=np.int32)


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
    """The rows of `tokens.parquet` for these problems, read in pieces so that the rest is never in memory."""
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
    """The identity of each token, from the column `identity`: vocabulary ids as they are, texts as digests."""
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
