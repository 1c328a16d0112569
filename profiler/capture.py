"""What is captured, and how a finished capture becomes a complete trace.

Engines leave a folder for each run (`capture/run-00000`): rows under a number per request, and `requests.jsonl`, which says
which request has which number. `finish_trace` joins both with the sequences that were run, says what is missing, and writes the
manifest last.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from profiler.capture_stream import ROUTING_STREAM
from profiler.errors import EngineError, TraceError
from profiler.jsonl import write_jsonl
from profiler.reader import Trace
from profiler.schema import (
    DECODE,
    JSONL_FILE,
    PREFILL,
    PROBLEMS_FILE,
    PROBLEMS_SCHEMA,
    TOKENS_FILE,
    TOKENS_SCHEMA,
    DatasetMetadata,
    Metadata,
)
from profiler.sealing import Missing, Source, run_folder, runs_of, seal
from profiler.writer import write_manifest, write_metadata, write_table

REQUESTS_FILE, PLANNED_FILE, COMPLETIONS_FILE = "requests.jsonl", "planned.jsonl", "completions.jsonl"
ABORTED = "abort"
# Problem ids named in a line about gaps; the tables have them all.
NAMED_PROBLEMS = 10

_VARIABLE = "SPECMOE_CAPTURE"
# The process that started an engine only to collect with it: the engine ends when that process does.
OWNER_VARIABLE = f"{_VARIABLE}_OWNER"


@dataclass(frozen=True, kw_only=True)
class CaptureOptions:
    """What is recorded besides expert ids and weights. Engines read it from the environment of their worker processes.

    logits: all router logits, float16. hidden_layers: decoder layers whose router inputs are recorded, float16.
    hidden_tokens: no request is admitted to the recording of router inputs once so many tokens have been recorded.
    out: where a server records by itself from its start; empty for engines that are told when and where.
    rotate_megabytes: a server begins a new trace for new requests when the rows of this one have grown to this; 0 for never.
    """

    logits: bool = False
    hidden_layers: tuple[int, ...] = ()
    hidden_tokens: int = 20_000
    out: str = ""
    rotate_megabytes: int = 0

    def to_environment(self) -> dict[str, str]:
        """Variables that switch the plugin on with these options."""
        return {
            _VARIABLE: "1",
            f"{_VARIABLE}_LOGITS": str(int(self.logits)),
            f"{_VARIABLE}_HIDDEN": ",".join(map(str, self.hidden_layers)),
            f"{_VARIABLE}_HIDDEN_TOKENS": str(self.hidden_tokens),
            f"{_VARIABLE}_OUT": self.out,
            f"{_VARIABLE}_ROTATE_MB": str(self.rotate_megabytes),
        }

    @classmethod
    def from_environment(cls, environment: dict[str, str]) -> Self | None:
        """The options, or None if capture is off. Raises `EngineError` on values that are no numbers."""
        if environment.get(_VARIABLE) != "1":
            return None
        try:
            return cls(
                logits=bool(int(environment.get(f"{_VARIABLE}_LOGITS") or 0)),
                hidden_layers=tuple(sorted({int(x) for x in (environment.get(f"{_VARIABLE}_HIDDEN") or "").split(",") if x})),
                hidden_tokens=int(environment.get(f"{_VARIABLE}_HIDDEN_TOKENS") or cls.hidden_tokens),
                out=environment.get(f"{_VARIABLE}_OUT", ""),
                rotate_megabytes=int(environment.get(f"{_VARIABLE}_ROTATE_MB") or 0),
            )
        except ValueError as error:
            raise EngineError(
                f"{_VARIABLE}_LOGITS, _HIDDEN, _HIDDEN_TOKENS or _ROTATE_MB: expected whole numbers: {error}"
            ) from error


def parse_layers(text: str) -> tuple[int, ...]:
    """Layer numbers with commas, ascending. Raises `EngineError` on anything else."""
    if not re.fullmatch(r"(\d{1,5}(,\d{1,5})*)?", text.replace(" ", "")):
        raise EngineError(f"--capture-hidden {text!r}: expected layer numbers with commas, such as 1,5")
    return tuple(sorted({int(layer) for layer in text.split(",") if layer.strip()}))


def keep_compiled_code_apart() -> None:
    """Give vLLM a cache folder of its own, unless one is set: captured and plain runs share its key for compiled code."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm" / "specmoe"
    os.environ.setdefault("VLLM_CACHE_ROOT", str(cache))


Count = Annotated[int, Field(ge=0, lt=2**31)]
"""A number that fits the tables' int32."""


class _JsonLine:
    """A record that is one line of a run's files; a line with other fields is none."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    def to_json(self) -> str:
        """The line, without its end."""
        return json.dumps(vars(self), separators=(",", ":"))


@dataclass(frozen=True)
class CapturedRequest(_JsonLine):
    """A request as the engine's worker saw it.

    number: what its rows have as problem id. label: what the client gave as problem id. cached_tokens: from the prefix cache.
    """

    number: Count
    request_id: str
    label: int | str | None
    prompt_token_ids: list[Count]
    cached_tokens: Count


def read_requests(run: Path) -> list[CapturedRequest]:
    """The requests of a run's folder, in the order in which they started. Raises `TraceError` on a line that is none."""
    return _records(run / REQUESTS_FILE, CapturedRequest)


def problem_ids(requests: list[CapturedRequest]) -> dict[int, int]:
    """Problem id by request number: the clients' own where they are numbers and not taken, else the smallest free ones."""
    ids: dict[int, int] = {}
    taken: set[int] = set()
    for request in requests:
        if isinstance(request.label, int) and 0 <= request.label < 2**31 and request.label not in taken:
            ids[request.number] = request.label
            taken.add(request.label)
    free = free_ids(taken)
    return ids | {request.number: next(free) for request in requests if request.number not in ids}


@dataclass(frozen=True, kw_only=True)
class PlannedProblem(_JsonLine):
    """A problem that a run set out to do: one line of `planned.jsonl`, written before the engine begins."""

    problem_id: Count
    dataset: str
    source_key: str
    prompt: str
    prompt_token_ids: list[Count]
    truncated_tokens: Count

    def sequence(self, source: Source | None, request: CapturedRequest | None = None) -> Sequence:
        """As a sequence that was begun and not finished."""
        cached = 0 if request is None else request.cached_tokens
        return Sequence(
            **vars(self), captured_as=source, output="", output_token_ids=[], cached_tokens=cached, finish_reason=ABORTED
        )


@dataclass(frozen=True, kw_only=True)
class CompletedProblem(_JsonLine):
    """A problem that a run finished: one line of `completions.jsonl`, written at once."""

    problem_id: Count
    output: str
    output_token_ids: list[Count]
    cached_tokens: Count
    finish_reason: str


def read_planned(run: Path) -> list[PlannedProblem]:
    """What a run set out to do. Raises `TraceError` on a line that is no such record."""
    return _records(run / PLANNED_FILE, PlannedProblem)


def read_completed(directory: Path, run: int) -> dict[int, Sequence]:
    """The problems that a run of the trace `directory` finished. Raises `TraceError` on a line that is no such record."""
    folder = run_folder(directory, run)
    planned = {problem.problem_id: problem for problem in read_planned(folder)}
    requests = {request.label: request for request in read_requests(folder)}
    completed = {}
    for completion in _records(folder / COMPLETIONS_FILE, CompletedProblem):
        problem_id = completion.problem_id
        if problem_id not in planned:
            raise TraceError(f"{folder / COMPLETIONS_FILE}: problem {problem_id}, which {PLANNED_FILE} does not have")
        source = (run, requests[problem_id].number) if problem_id in requests else None
        completed[problem_id] = replace(planned[problem_id].sequence(source), **vars(completion))
    return completed


def free_ids(taken: Container[int]) -> Iterator[int]:
    """Whole numbers from 0 that are not taken, as long as there are."""
    return (number for number in range(2**31) if number not in taken)


_Record = TypeVar("_Record")


def _records(path: Path, kind: type[_Record]) -> list[_Record]:
    """JSON lines as `kind`; a last line without its end was cut off by a kill and is left out."""
    if not path.is_file():
        return []
    adapter = TypeAdapter(kind)
    records = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break
            try:
                records.append(adapter.validate_json(line, strict=True))
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                where = ".".join(map(str, first["loc"]))
                raise TraceError(f"{path}, line {number}: {where + ': ' if where else ''}{first['msg']}") from error
    return records


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """One problem that was run: prompt and output tokens, and what the tables say of it.

    captured_as: run, and the number of its rows there; None if no step ever routed it.
    cached_tokens: prompt tokens taken from the prefix cache, which are not routed again.
    """

    problem_id: int
    captured_as: Source | None
    dataset: str
    source_key: str
    prompt: str | None
    output: str
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    truncated_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str = "unknown"

    @property
    def tokens(self) -> int:
        """N, prompt and output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)


def finish_trace(
    directory: Path, metadata: Metadata, sequences: list[Sequence], *, jsonl: bool = False, others_abandoned: bool = False
) -> Trace:
    """Seal `directory/capture` as the routing of `sequences` and write tables, gaps and the manifest.

    others_abandoned: leave out rows of requests that are not among the sequences.
    Raises `TraceError` if the capture has rows of other requests, or none at all.
    """
    sequences = sorted(sequences, key=lambda sequence: sequence.problem_id)
    if not any((run_folder(directory, run) / ROUTING_STREAM).is_file() for run in runs_of(directory)):
        raise TraceError(f"{directory}: nothing was captured")
    missing = seal(
        directory,
        metadata.model,
        {sequence.problem_id: sequence.tokens for sequence in sequences},
        {s.problem_id: s.captured_as for s in sequences if s.captured_as is not None},
        others_abandoned=others_abandoned,
    )
    counts = Counter(sequence.dataset for sequence in sequences)
    datasets = metadata.datasets or [DatasetMetadata(name=name, problems=count) for name, count in counts.items()]
    gaps = [*metadata.gaps, *_gaps(sequences, missing)]
    write_metadata(directory, metadata.model_copy(update={"datasets": datasets, "gaps": gaps}))
    write_table(directory / TOKENS_FILE, _tokens_table(sequences))
    write_table(directory / PROBLEMS_FILE, _problems_table(sequences))
    extra_files = {}
    if jsonl:
        extra_files[JSONL_FILE] = write_jsonl(Trace.open(directory, allow_incomplete=True), directory / JSONL_FILE)
    write_manifest(directory, extra_files)
    return Trace.open(directory)


def _gaps(sequences: list[Sequence], missing: Missing) -> list[str]:
    """What is not in the routing, a line for each cause."""
    cached = {s.problem_id: s.cached_tokens for s in sequences if s.cached_tokens}
    explained, unexplained = 0, {}
    for problem_id, gaps_G2 in missing.items():
        from_cache = np.clip(np.minimum(gaps_G2[:, 1], cached.get(problem_id, 0)) - gaps_G2[:, 0], 0, None).sum()
        explained += int(from_cache)
        others = int((gaps_G2[:, 1] - gaps_G2[:, 0]).sum() - from_cache)
        if others:
            unexplained[problem_id] = others
    gaps = []
    if cached:
        gaps.append(f"{explained} positions of {len(cached)} problems came from the prefix cache: {_named(cached)}")
    aborted = [s.problem_id for s in sequences if s.finish_reason == ABORTED]
    if aborted:
        gaps.append(f"{len(aborted)} problems were aborted and are incomplete: {_named(aborted)}")
    if unexplained:
        count = sum(unexplained.values())
        gaps.append(f"{count} positions of {len(unexplained)} problems were not captured: {_named(unexplained)}")
    return gaps


def _named(problems: list[int] | dict[int, Any]) -> str:
    ids = sorted(problems)
    more = f" and {len(ids) - NAMED_PROBLEMS} more" if len(ids) > NAMED_PROBLEMS else ""
    return "problem " + ", ".join(map(str, ids[:NAMED_PROBLEMS])) + more


def _tokens_table(sequences: list[Sequence]) -> pa.Table:
    lengths = np.array([sequence.tokens for sequence in sequences])
    decode = [np.arange(s.tokens) >= len(s.prompt_token_ids) for s in sequences]
    vocab_ids = [np.array(s.prompt_token_ids + s.output_token_ids, dtype=np.int32) for s in sequences]
    return pa.table(
        [
            np.repeat(np.array([sequence.problem_id for sequence in sequences], dtype=np.int32), lengths),
            np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
            np.concatenate(vocab_ids),
            pa.DictionaryArray.from_arrays(np.concatenate(decode).astype(np.int8), [PREFILL, DECODE]),
        ],
        schema=TOKENS_SCHEMA,
    )


def _problems_table(sequences: list[Sequence]) -> pa.Table:
    rows = [
        {name: getattr(s, name) for name in PROBLEMS_SCHEMA.names if hasattr(s, name)}
        | {"prompt_tokens": len(s.prompt_token_ids), "output_tokens": len(s.output_token_ids)}
        for s in sequences
    ]
    return pa.Table.from_pylist(rows, schema=PROBLEMS_SCHEMA)
