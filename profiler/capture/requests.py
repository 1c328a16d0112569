"""What a run stores next to its rows: its requests, the problems it planned, and those it completed."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from profiler.capture.sealing import Source, run_folder
from profiler.errors import TraceError, first_fault

REQUESTS_FILE, PLANNED_FILE, COMPLETIONS_FILE = "requests.jsonl", "planned.jsonl", "completions.jsonl"
SKIPPED_FILE = "skipped.jsonl"
ABORTED = "abort"

Count = Annotated[int, Field(ge=0, lt=2**31)]
"""A number that fits the tables' int32."""


class _JsonLine:
    """A record that is one JSON line in a file of a run. A line with unknown fields is rejected."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    @classmethod
    @cache
    def parser(cls) -> TypeAdapter[Any]:
        """What reads such lines. It takes milliseconds to build."""
        return TypeAdapter(cls)

    def to_json(self) -> str:
        """The record as JSON, without a line break."""
        return json.dumps(vars(self), separators=(",", ":"))


@dataclass(frozen=True)
class CapturedRequest(_JsonLine):
    """A request as the engine's worker saw it.

    number: the request's number in this run, which its captured rows carry as problem id. label: the problem id that the client
    gave. cached_tokens: prompt tokens taken from the prefix cache.
    """

    number: Count
    request_id: str
    label: int | str | None
    prompt_token_ids: list[Count]
    cached_tokens: Count


def read_requests(run: Path) -> list[CapturedRequest]:
    """The requests in a run's folder, in the order in which they started. Raises `TraceError` on an invalid line."""
    return list(iterate_requests(run))


def iterate_requests(run: Path) -> Iterator[CapturedRequest]:
    """As `read_requests`, one in memory at a time."""
    return _records(run / REQUESTS_FILE, CapturedRequest)


def problem_ids(requests: list[CapturedRequest]) -> dict[int, int]:
    """Map request numbers to problem ids: the client's label if it is a number not yet taken, else the smallest free id."""
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
    """A problem that a run has planned: one line of `planned.jsonl`, written before the engine starts on it."""

    problem_id: Count
    dataset: str
    source_key: str
    prompt: str
    prompt_token_ids: list[Count]
    truncated_tokens: Count

    def sequence(self, source: Source | None, request: CapturedRequest | None = None) -> Sequence:
        """The problem as a sequence that was started and not finished."""
        cached = 0 if request is None else request.cached_tokens
        return Sequence(
            **vars(self), captured_as=source, output="", output_token_ids=[], cached_tokens=cached, finish_reason=ABORTED
        )


@dataclass(frozen=True, kw_only=True)
class CompletedProblem(_JsonLine):
    """A problem that a run finished: one line of `completions.jsonl`, written as soon as it finishes."""

    problem_id: Count
    output: str
    output_token_ids: list[Count]
    cached_tokens: Count
    finish_reason: str


@dataclass(frozen=True, kw_only=True)
class SkippedProblem(_JsonLine):
    """A problem that cannot be run, and why: one line of `skipped.jsonl`."""

    problem_id: Count
    reason: str


def read_skipped(run: Path) -> list[SkippedProblem]:
    """The problems that a run skipped. Raises `TraceError` on an invalid line."""
    return list(_records(run / SKIPPED_FILE, SkippedProblem))


def read_planned(run: Path) -> list[PlannedProblem]:
    """The problems that a run planned. Raises `TraceError` on an invalid line."""
    return list(_records(run / PLANNED_FILE, PlannedProblem))


def read_completed(directory: Path, run: int) -> dict[int, Sequence]:
    """The problems that run number `run` of the trace `directory` finished. Raises `TraceError` on an invalid line."""
    folder = run_folder(directory, run)
    planned = {problem.problem_id: problem for problem in read_planned(folder)}
    requests = {request.label: request for request in read_requests(folder)}
    completed = {}
    for completion in _records(folder / COMPLETIONS_FILE, CompletedProblem):
        problem_id = completion.problem_id
        if problem_id not in planned:
            raise TraceError(f"{folder / COMPLETIONS_FILE}: problem {problem_id} is not in {PLANNED_FILE}")
        source = (run, requests[problem_id].number) if problem_id in requests else None
        completed[problem_id] = replace(planned[problem_id].sequence(source), **vars(completion))
    return completed


def free_ids(taken: Container[int]) -> Iterator[int]:
    """Whole numbers from 0 that are not in `taken`, up to the largest int32."""
    return (number for number in range(2**31) if number not in taken)


_Record = TypeVar("_Record", bound=_JsonLine)


def _records(path: Path, kind: type[_Record]) -> Iterator[_Record]:
    """Parse JSON lines as `kind`. A last line without a line break was cut off by a kill and is left out."""
    if not path.is_file():
        return
    parser: TypeAdapter[_Record] = kind.parser()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break
            try:
                record = parser.validate_json(line, strict=True)
            except ValidationError as error:
                raise TraceError(f"{path}, line {number}: {first_fault(error)}") from error
            yield record


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """One problem that was run: its prompt and output tokens, and its entries in the trace's tables.

    captured_as: the run that captured it, and its request number in that run; None if no step routed it.
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
        """N: the number of tokens, prompt and output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)
