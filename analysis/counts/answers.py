"""Single answers of a trace: the routing of some problems token by token, with their tokens and, if known, their prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from analysis.counts.survey import ALL_PROBLEMS, EVERYTHING, Choice, TokenKey, chosen_problems, token_identity
from profiler.errors import TraceError
from profiler.trace.reader import Trace
from profiler.trace.schema import DECODE, LOGITS_FOLDER, PROBLEMS_FILE, TOKENS_FILE, RoutingChunk
from profiler.trace.splits import all_digests
from profiler.trace.untrusted.parquet_files import open_parquet, stream_table

# Tokens of a problem that are shown: prompts may be long, so the window begins this many tokens before the answer.
WINDOW, BEFORE_ANSWER = 256, 64
ROWS_AT_A_TIME = 1 << 16
# Of a prompt, which serves to find a problem.
PROMPT_CHARACTERS = 300


@dataclass(frozen=True)
class Answer:
    """A window of the tokens of one problem. Shape letters: T tokens, L MoE layers, K experts per token.

    Attributes:
        problem_id: The problem's id in the trace.
        digest: Identifies its prompt, see `profiler.trace.splits`.
        domain: Its dataset, or the value of another column that the analysis was given.
        prompt: The beginning of its prompt; empty if unknown.
        recorded: Number of tokens that the trace has of the problem.
        token_ids_T: int64 `[T]`, positions in the sequence.
        keys: For each token its vocabulary id, its text if the trace has no ids, or None.
        is_decode_T: bool `[T]`, whether the token was generated.
        expert_ids_TLK: `[T, L, K]`, by weight, descending; ascending ids if the trace has no weights. Empty slots hold E.
        weights_TLK: float `[T, L, K]`, or None.
        margins_TL: float `[T, L]`, the K-th largest router logit minus the next; None if logits were not recorded.
    """

    problem_id: int
    digest: int
    domain: str
    prompt: str
    recorded: int
    token_ids_T: npt.NDArray[np.int64]
    keys: list[TokenKey | None]
    is_decode_T: npt.NDArray[np.bool_]
    expert_ids_TLK: npt.NDArray[np.int64]
    weights_TLK: npt.NDArray[np.float64] | None
    margins_TL: npt.NDArray[np.float64] | None


def spread(problem_ids: Iterable[int], domains: Iterable[str], limit: int) -> list[int]:
    """At most `limit` problems, taken in turn from each domain, so that each domain is shown."""
    of_domain: dict[str, list[int]] = {}
    for problem_id, domain in zip(problem_ids, domains, strict=True):
        of_domain.setdefault(domain, []).append(problem_id)
    turns = zip_longest(*(of_domain[name] for name in sorted(of_domain)))
    return [problem for problem in chain.from_iterable(turns) if problem is not None][:limit]


def window_of(is_decode_T: npt.NDArray[np.bool_], size: int = WINDOW) -> slice:
    """The tokens of a problem that are shown: from a quarter of the window before its first generated token."""
    first = int(is_decode_T.argmax()) if is_decode_T.any() else 0
    start = max(0, min(first - min(BEFORE_ANSWER, size // 4), len(is_decode_T) - size))
    return slice(start, min(len(is_decode_T), start + size))


def read_answers(
    trace: Trace, choice: Choice = EVERYTHING, *, first: Sequence[int] = (), limit: int = 48, window: int = WINDOW
) -> list[Answer]:
    """Read a sample of a trace's problems.

    Args:
        trace: The trace.
        choice: Which problems are analyzed, and the column whose values are the domains.
        first: Digests of problems that come first, such as those that a predictor was evaluated on.
        limit: Most problems to read.
        window: Most tokens of each.

    Returns:
        The problems: those of `first`, then problems of each domain in turn. Problems without routing are left out.

    Raises:
        TraceError: Files of the trace break the format.
    """
    domains = _domains(trace, choice)
    digests = all_digests(trace) if first else {}
    wanted = set(first)
    chosen = [problem for problem in domains if digests.get(problem) in wanted]
    chosen = spread(chosen, [domains[problem] for problem in chosen], limit)
    others = spread(domains, domains.values(), limit + len(chosen))
    chosen = list(dict.fromkeys([*chosen, *others]))[:limit]
    prompts = _prompts(trace, chosen)
    tokens = _tokens(trace, chosen)
    found = []
    for problem in sorted(chosen):
        chunk = next(iter(trace.chunks(problems=range(problem, problem + 1))), None)
        if chunk is None:
            continue
        row_T = tokens.rows_of(chunk)
        is_decode_T = np.append(tokens.is_decode_N, False)[row_T]
        shown = window_of(is_decode_T, window)
        found.append(
            _answer(
                trace,
                chunk.take(shown),
                tokens.keys_of(row_T[shown]),
                is_decode_T[shown],
                digest=digests.get(problem, 0),
                domain=domains[problem],
                prompt=prompts.get(problem, ""),
                recorded=len(chunk),
            )
        )
    place = {problem: number for number, problem in enumerate(chosen)}
    return sorted(found, key=lambda answer: place[answer.problem_id])


def _answer(
    trace: Trace,
    chunk: RoutingChunk,
    keys: list[TokenKey | None],
    is_decode_T: npt.NDArray[np.bool_],
    *,
    digest: int,
    domain: str,
    prompt: str,
    recorded: int,
) -> Answer:
    problem_id = int(chunk.problem_ids_T[0])
    ids_TLK = chunk.expert_ids_TLK.astype(np.int64)
    if chunk.weights_TLK is None:
        # The source's order means nothing.
        ids_TLK = np.sort(ids_TLK, axis=2)
    return Answer(
        problem_id=problem_id,
        digest=digest,
        domain=domain,
        prompt=prompt,
        recorded=recorded,
        token_ids_T=chunk.token_ids_T.astype(np.int64),
        keys=keys,
        is_decode_T=is_decode_T,
        expert_ids_TLK=ids_TLK,
        weights_TLK=None if chunk.weights_TLK is None else chunk.weights_TLK.astype(np.float64),
        margins_TL=_margins(trace, problem_id, chunk.token_ids_T),
    )


def _domains(trace: Trace, choice: Choice) -> dict[int, str]:
    """The domain of each problem that is analyzed; without a table of problems, of those in the first rows."""
    if trace.has_problems:
        return {
            int(problem): name
            for ids_P, names in chosen_problems(trace, choice)
            for problem, name in zip(ids_P.tolist(), names, strict=True)
            if name is not None
        }
    chunk = next(iter(trace.chunks()), None)
    return {} if chunk is None else dict.fromkeys(np.unique(chunk.problem_ids_T).tolist(), ALL_PROBLEMS)


def _prompts(trace: Trace, problems: list[int]) -> dict[int, str]:
    """The beginnings of the problems' prompts, where they are known."""
    path = trace.path / PROBLEMS_FILE
    if not trace.has_problems:
        return {}
    with open_parquet(path) as file:
        if "prompt" not in file.schema_arrow.names:
            return {}
    wanted, found = set(problems), {}
    schema = pa.schema([("problem_id", pa.int32()), ("prompt", pa.string())])
    for table in stream_table(path, schema, ROWS_AT_A_TIME):
        for problem, prompt in zip(*(column.to_pylist() for column in table.columns), strict=True):
            if problem in wanted and prompt:
                found[problem] = prompt[:PROMPT_CHARACTERS]
    return found


@dataclass(frozen=True)
class _Tokens:
    """Rows of `tokens.parquet` of some problems: `problem_id << 32 | token_id` of each, ascending, and their columns."""

    places_N: npt.NDArray[np.int64]
    is_decode_N: npt.NDArray[np.bool_]
    keys: pa.ChunkedArray | None

    def rows_of(self, chunk: RoutingChunk) -> npt.NDArray[np.int64]:
        """The row of each token of a chunk `[T]`, -1 for none."""
        place_T = chunk.problem_ids_T.astype(np.int64) << 32 | chunk.token_ids_T
        if not len(self.places_N):
            return np.full(len(place_T), -1)
        row_T = np.minimum(np.searchsorted(self.places_N, place_T), len(self.places_N) - 1)
        return np.where(self.places_N[row_T] == place_T, row_T, -1)

    def keys_of(self, row_T: npt.NDArray[np.int64]) -> list[TokenKey | None]:
        """The identity of the tokens in these rows."""
        if self.keys is None:
            return [None] * len(row_T)
        found: list[TokenKey | None] = self.keys.take(pa.array(np.maximum(row_T, 0), mask=row_T < 0)).to_pylist()
        return found


def _tokens(trace: Trace, problems: list[int]) -> _Tokens:
    """The tokens of the given problems, read in pieces so that the rest is never in memory."""
    identity = token_identity(trace) if trace.has_tokens else None
    fields = [("problem_id", pa.int32()), ("token_id", pa.int32()), ("phase", pa.string())]
    schema = pa.schema([*fields, *([] if identity is None else [identity])])
    tables = [schema.empty_table()]
    if trace.has_tokens and problems:
        for table in stream_table(trace.path / TOKENS_FILE, schema, ROWS_AT_A_TIME, min(problems)):
            ids_N = table.column("problem_id").to_numpy()
            tables.append(table.filter(pa.array(np.isin(ids_N, problems))))
            if len(ids_N) and ids_N[-1] > max(problems):
                break
    found = pa.concat_tables(tables)
    places_N = found.column("problem_id").to_numpy().astype(np.int64) << 32 | found.column("token_id").to_numpy()
    if (np.diff(places_N) <= 0).any():
        raise TraceError(f"{trace.path / TOKENS_FILE} is not sorted by (problem_id, token_id)")
    is_decode_N = found.column("phase").to_numpy() == DECODE
    return _Tokens(places_N, is_decode_N, None if identity is None else found.column(3))


def _margins(trace: Trace, problem: int, token_ids_T: npt.NDArray[np.int32]) -> npt.NDArray[np.float64] | None:
    """Margins `[T, L]` of the given tokens; NaN where no logits were recorded, None if the trace has none."""
    model = trace.metadata.model
    if trace.manifest is None or model.top_k == model.num_experts:
        return None
    if not any(name.startswith(f"{LOGITS_FOLDER}/") for name in trace.manifest.files):
        return None
    positions_N, layers, logits_NLE = trace.values(LOGITS_FOLDER, problem)
    sorted_NLE = np.sort(logits_NLE.astype(np.float64), axis=2)
    margins_TL = np.full((len(token_ids_T), len(model.moe_layers)), np.nan)
    column = {layer: n for n, layer in enumerate(model.moe_layers)}
    known = [n for n, layer in enumerate(layers) if layer in column]
    at_T = np.minimum(np.searchsorted(positions_N, token_ids_T), len(positions_N) - 1)
    is_known_T = positions_N[at_T] == token_ids_T
    of_N = sorted_NLE[..., -model.top_k] - sorted_NLE[..., -model.top_k - 1]
    margins_TL[np.ix_(is_known_T, [column[layers[n]] for n in known])] = of_N[at_T[is_known_T]][:, known]
    return margins_TL
