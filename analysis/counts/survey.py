"""A first pass over a trace's tables for what must be known before counting: the datasets and the most common tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from profiler.errors import TraceError, printable
from profiler.trace.reader import Trace
from profiler.trace.schema import PROBLEMS_FILE, TOKENS_FILE, ModelMetadata
from profiler.trace.untrusted.parquet_files import open_parquet, stream_table

# Stands for all domains together, and for all phases together.
ALL = "all"
ALL_PROBLEMS = "all problems"
LONGEST_NAME = 60
OTHER_DATASETS = "other datasets"
MAX_DATASETS = 16
ROWS_AT_A_TIME = 1 << 16
# Larger than any vocabulary in use; of an untrusted table with more distinct tokens, the rarest are dropped.
MAX_DISTINCT_TOKENS = 1 << 20
# Limit on the tables by token, which take two counters for each layer, expert, fold and token.
VOCABULARY_BYTES = 64 << 20
MAX_VOCABULARY = 8192

TokenKey = int | str
"""A vocabulary id, or a token's text if the trace has no ids."""


@dataclass
class Survey:
    """Number of problems by dataset, and of tokens by vocabulary id or text. Surveys of parts of a trace can be merged."""

    problems: Counter[str] = field(default_factory=Counter)
    tokens: Counter[TokenKey] = field(default_factory=Counter)

    def merge(self, other: Self) -> None:
        """Add the survey of another part."""
        self.problems.update(other.problems)
        self.tokens.update(other.tokens)


@dataclass(frozen=True)
class Choice:
    """Which problems are analyzed, and how they are grouped into domains. Both fields name columns of `problems.parquet`.

    by: text column whose values are the domains. without: boolean column; problems where it is true are left out.
    """

    by: str = "dataset"
    without: str | None = None


EVERYTHING = Choice()


@dataclass(frozen=True)
class Axes:
    """What the rows and columns of the count tables stand for.

    datasets: names, or values of another column of `problems.parquet` (`Choice.by`); of more than MAX_DATASETS the smallest
    are merged into one. vocabulary: the most common tokens, which have a row each in tables by token; all others share one more
    row. hops: longest distance between layers.
    """

    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    hops: int
    has_weights: bool
    datasets: tuple[str, ...]
    vocabulary: tuple[TokenKey, ...]
    choice: Choice = EVERYTHING

    @property
    def layers(self) -> int:
        """Number of MoE layers."""
        return len(self.moe_layers)

    @property
    def knows_strongest(self) -> bool:
        """Whether it is known which of a token's experts is the strongest: with weights, or if there is only one."""
        return self.has_weights or self.top_k == 1


def survey_trace(trace: Trace, choice: Choice = EVERYTHING) -> Survey:
    """Survey a trace's tables in bounded memory. Raises `TraceError` if they are broken or lack a column of `choice`."""
    survey = Survey()
    if trace.has_problems:
        for _, names in chosen_problems(trace, choice):
            survey.problems.update(name for name in names if name is not None)
    elif choice != EVERYTHING:
        raise TraceError(f"{trace.path} has no problems.parquet to choose problems by")
    else:
        survey.problems[ALL_PROBLEMS] = 1
    if trace.has_tokens:
        identity = token_identity(trace)
        if identity is not None:
            for table in stream_table(trace.path / TOKENS_FILE, pa.schema([identity]), ROWS_AT_A_TIME):
                for entry in pc.value_counts(table.column(0).combine_chunks()).to_pylist():
                    if entry["values"] is not None:
                        survey.tokens[entry["values"]] += entry["counts"]
                if len(survey.tokens) > MAX_DISTINCT_TOKENS:
                    survey.tokens = Counter(dict(survey.tokens.most_common(MAX_DISTINCT_TOKENS // 2)))
    return survey


def make_axes(survey: Survey, model: ModelMetadata, *, hops: int, has_weights: bool, choice: Choice = EVERYTHING) -> Axes:
    """The axes of the tables for a model and the survey of its trace."""
    names = [name for name, _ in sorted(survey.problems.items(), key=lambda item: (-item[1], item[0]))]
    datasets = (*sorted(names[: MAX_DATASETS - 1]), OTHER_DATASETS) if len(names) > MAX_DATASETS else tuple(sorted(names))
    room = VOCABULARY_BYTES // (2 * 2 * 4 * len(model.moe_layers) * model.num_experts)
    # Ties are broken by the token itself, so that the result does not depend on the order of reading.
    commonest = sorted(survey.tokens.items(), key=lambda item: (-item[1], str(item[0])))[: min(room, MAX_VOCABULARY)]
    return Axes(
        moe_layers=tuple(model.moe_layers),
        num_experts=model.num_experts,
        top_k=model.top_k,
        hops=hops,
        has_weights=has_weights,
        datasets=datasets,
        vocabulary=tuple(key for key, _ in commonest),
        choice=choice,
    )


def token_identity(trace: Trace) -> pa.Field | None:
    """The column of `tokens.parquet` that identifies tokens: `vocab_id`, else `text`; None if neither has values."""
    path = trace.path / TOKENS_FILE
    with open_parquet(path) as file:
        names = file.schema_arrow.names
    for candidate in (pa.field("vocab_id", pa.int32()), pa.field("text", pa.string())):
        if candidate.name in names and _has_values(trace, candidate):
            return candidate
    return None


def _has_values(trace: Trace, column: pa.Field) -> bool:
    tables: Iterator[Any] = stream_table(trace.path / TOKENS_FILE, pa.schema([column]), ROWS_AT_A_TIME)
    return any(table.column(0).null_count < table.num_rows for table in tables)


def dataset_indices(trace: Trace, axes: Axes) -> tuple[Any, Any]:
    """Problem ids, ascending, and the index of each problem's domain in `axes.datasets`, -1 if it is left out; both `[P]`.

    Empty for a trace without `problems.parquet`.
    """
    place = {name: index for index, name in enumerate(axes.datasets)}
    ids, indices = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    if trace.has_problems:
        for problem_ids, names in chosen_problems(trace, axes.choice):
            ids.append(problem_ids)
            places = [-1 if name is None else place.get(name, len(axes.datasets) - 1) for name in names]
            indices.append(np.array(places, dtype=np.int32))
    all_ids = np.concatenate(ids)
    if (np.diff(all_ids) <= 0).any():
        raise TraceError(f"{trace.path / PROBLEMS_FILE} is not sorted by problem_id")
    return all_ids, np.concatenate(indices)


def _domain(name: str | None) -> str:
    """A domain's name for display: shortened to fit a line, and distinct from ALL."""
    if name is None:
        return "unknown"
    shown = printable(name[: LONGEST_NAME - 1] + "…" if len(name) > LONGEST_NAME else name)
    return f"{shown} (dataset)" if shown == ALL else shown


def chosen_problems(trace: Trace, choice: Choice) -> Iterator[tuple[Any, list[str | None]]]:
    """Problem ids `[P]` and their domains (None for problems that are left out), in batches."""
    fields = [("problem_id", pa.int32()), (choice.by, pa.string())]
    if choice.without is not None:
        fields.append((choice.without, pa.bool_()))
    if len({name for name, _ in fields}) < len(fields):
        raise TraceError(f"{trace.path / PROBLEMS_FILE}: expected two columns besides problem_id to choose problems by")
    for table in stream_table(trace.path / PROBLEMS_FILE, pa.schema(fields), ROWS_AT_A_TIME):
        names: list[str | None] = [_domain(name) for name in table.column(1).to_pylist()]
        if choice.without is not None:
            left_out = table.column(2).to_pylist()
            names = [None if out else name for name, out in zip(names, left_out, strict=True)]
        yield table.column(0).to_numpy().astype(np.int64), names
