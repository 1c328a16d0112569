"""Read problems (prompts built from the rows of a dataset) and select which of them to run.

Rows are streamed, so memory is that of the selected problems. Shuffled datasets also need memory for their row numbers and,
from a local Parquet file, for its columns.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from profiler.datasets.registry import Dataset
from profiler.errors import DatasetError, DatasetUsageError, UnreachableError, first_line

MAX_JSONL_LINE = 16 << 20
# Seed of the permutation of datasets that are sorted by class. Fixed, so that everybody gets the same first problems.
SHUFFLE_SEED = 0
ROWS_AT_A_TIME = 256
# The branch in which the hub keeps its own Parquet conversion of a dataset.
CONVERTED = "refs/convert/parquet"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A prompt and where it came from.

    Attributes:
        dataset: The name of its dataset.
        source_key: Identifies it within its dataset.
        prompt: Its text.
        max_new_tokens: Maximum of generated tokens.
        max_prompt_tokens: Truncate the prompt to so many tokens; None for no limit.
        unusable: Why its row gives no prompt, such as a missing value; None if it does.
    """

    dataset: str
    source_key: str
    prompt: str
    max_new_tokens: int
    max_prompt_tokens: int | None = None
    unusable: str | None = None


def read_problems(dataset: Dataset, *, data_files: Path | None = None, max_new_tokens: int | None = None) -> Iterator[Problem]:
    """Iterate over all problems, from `data_files` (.parquet, .jsonl) if given, otherwise embedded or from the hub.

    They are in the order of the file, or in a fixed shuffled order if the dataset is sorted by class.
    A row with a missing value, or one that is not text, becomes a problem without a prompt that says so.
    Raises `DatasetError` on an unreadable file, or if its first row lacks a column.
    """
    if data_files is not None:
        rows = _read_local(data_files, dataset)
    elif dataset.embedded:
        rows = _read_embedded(dataset)
    else:
        rows = _read_hub(dataset)
    for number, row in rows:
        unusable = next(filter(None, (_fault(row, column, dataset) for column in dataset.columns)), None)
        prompt = "" if unusable is not None else dataset.template.format(**row)
        if unusable is not None or len(prompt.strip()) >= dataset.min_characters:
            key = row.get(dataset.key) if dataset.key else None
            yield Problem(
                dataset=dataset.name,
                source_key=str(key) if key is not None and _is_text(str(key)) else str(number),
                prompt=prompt,
                max_new_tokens=max_new_tokens or dataset.new_tokens,
                unusable=unusable,
            )


def _fault(row: dict[str, Any], column: str, dataset: Dataset) -> str | None:
    """Why a value that a dataset needs cannot be used; None if it can."""
    if row.get(column) is None:
        return f"its column {column!r} is empty"
    if not _is_text(str(row[column]) if column == dataset.key else row[column]):
        return f"its column {column!r} is {str(row[column])[:40]!r}, expected text"
    return None


def typical_problems(dataset: Dataset, max_new_tokens: int | None = None) -> Iterator[Problem]:
    """As many problems as the dataset has rows, with blank prompts of its mean length, for estimates without the dataset."""
    for row in range(dataset.rows):
        yield Problem(
            dataset=dataset.name,
            source_key=str(row),
            prompt=" " * dataset.prompt_characters,
            max_new_tokens=max_new_tokens or dataset.new_tokens,
        )


def take_problems(sources: dict[str, Iterator[Problem]], num_problems: int) -> list[Problem]:
    """Select `num_problems` in total, divided evenly among the datasets; a dataset that has fewer contributes all that it has.

    Raises `DatasetError` if a dataset has none.
    """
    share, rest = divmod(num_problems, len(sources))
    taken = []
    for position, (name, problems) in enumerate(sources.items()):
        count = share + (position < rest)
        found = list(islice(problems, count))
        if count and not found:
            raise DatasetError(f"{name} holds no problems")
        taken += found
    return taken


def take_tokens(
    sources: dict[str, Iterator[Problem]],
    target_tokens: int,
    max_tokens_per_problem: int | None,
    count_tokens: Callable[[str], int],
) -> list[Problem]:
    """Select problems with `target_tokens` in total, divided evenly among the datasets, in the order of the datasets.

    A problem counts the tokens of its prompt and the most that it may generate. Prompts are truncated at the end to stay within
    `max_tokens_per_problem`. Each dataset contributes problems until it reaches its share, which it exceeds by less than one
    problem. What a dataset lacks is divided among the others. Raises `DatasetError` if a dataset has none.
    """
    taken: dict[str, list[Problem]] = {name: [] for name in sources}
    open_sources, left = dict(sources), target_tokens
    while left > 0 and open_sources:
        # All datasets of a round get the same share, even if the first ones exceeded theirs a little.
        share = -(-left // len(open_sources))
        for name, problems in list(open_sources.items()):
            given = 0
            while given < share:
                problem = next(problems, None)
                if problem is None:
                    if not taken[name]:
                        raise DatasetError(f"{name} holds no problems")
                    del open_sources[name]
                    break
                problem, tokens = within(problem, max_tokens_per_problem, count_tokens)
                taken[name].append(problem)
                given += tokens
            left -= given
    return [problem for problems in taken.values() for problem in problems]


def within(problem: Problem, limit: int | None, count_tokens: Callable[[str], int]) -> tuple[Problem, int]:
    """The problem with its prompt truncated to stay within the limit, and its number of tokens, prompt and output."""
    tokens = count_tokens(problem.prompt)
    if limit is not None:
        room = limit - problem.max_new_tokens
        if room < 1:
            raise DatasetError(
                f"a limit of {limit} tokens per problem leaves no room for a prompt of {problem.dataset} with its "
                f"{problem.max_new_tokens} new tokens: raise the limit, or lower the number of new tokens"
            )
        problem = replace(problem, max_prompt_tokens=room)
        tokens = min(tokens, room)
    return problem, tokens + problem.max_new_tokens


def _order(dataset: Dataset, rows: int) -> Iterator[list[int]]:
    """Row numbers in the order in which rows are taken, some at a time."""
    order_R = np.random.default_rng(SHUFFLE_SEED).permutation(rows) if dataset.sorted_by_class else np.arange(rows)
    for start in range(0, rows, ROWS_AT_A_TIME):
        yield order_R[start : start + ROWS_AT_A_TIME].tolist()


def _read_embedded(dataset: Dataset) -> Iterator[tuple[int, dict[str, Any]]]:
    text = resources.files("profiler").joinpath("demo", "prompts", f"{dataset.name}.jsonl").read_text(encoding="utf-8")
    return enumerate(json.loads(line) for line in text.splitlines())


def _read_local(path: Path, dataset: Dataset) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        raise DatasetError(f"data file {path}: {'a folder, expected a file' if path.is_dir() else 'no such file'}")
    if path.suffix == ".parquet":
        return _read_parquet(path, dataset)
    if path.suffix in {".jsonl", ".ndjson"}:
        return _read_json_lines(path, dataset)
    raise DatasetUsageError(f"data file {path}: expected a name ending in .parquet or .jsonl")


def _read_parquet(path: Path, dataset: Dataset) -> Iterator[tuple[int, dict[str, Any]]]:
    columns = list(dict.fromkeys(dataset.columns))
    try:
        file = pq.ParquetFile(path)
        _check_columns(file.schema_arrow.names, dataset, path)
        if dataset.sorted_by_class:
            # Reading rows in random order would decode a row group for each: hold the columns in memory instead.
            table = file.read(columns)
            for numbers in _order(dataset, table.num_rows):
                yield from zip(numbers, table.take(numbers).to_pylist(), strict=True)
            return
        first = 0
        for batch in file.iter_batches(batch_size=ROWS_AT_A_TIME, columns=columns):
            yield from enumerate(batch.to_pylist(), start=first)
            first += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"data file {path} is not readable Parquet: {first_line(error)}") from error


def _read_json_lines(path: Path, dataset: Dataset) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        starts = [0]
        if dataset.sorted_by_class:
            starts += [file.tell() for _ in iter(lambda: file.readline(MAX_JSONL_LINE), b"")]
            numbers = [number for some in _order(dataset, len(starts) - 1) for number in some]
            lines = ((number, _line_at(file, starts[number])) for number in numbers)
        else:
            lines = ((number, line) for number, line in enumerate(iter(lambda: file.readline(MAX_JSONL_LINE), b"")))
        first: int | None = None
        for number, line in lines:
            if not line.strip():
                continue
            first = number if first is None else first
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DatasetError(f"data file {path}, line {number + 1} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DatasetError(f"data file {path}, line {number + 1}: expected an object with columns")
            if number == first:
                _check_columns(list(row), dataset, path)
            yield number, row


def _line_at(file: Any, start: int) -> bytes:
    file.seek(start)
    line: bytes = file.readline(MAX_JSONL_LINE)
    return line


def _is_text(value: Any) -> bool:
    """Whether the value is a string that can be encoded as UTF-8 (JSON can escape lone surrogates)."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _check_columns(present: list[str], dataset: Dataset, path: Path) -> None:
    for column in dataset.columns:
        if column not in present:
            raise DatasetError(
                f"data file {path} lacks column {column!r}, which {dataset.name} needs; it has {', '.join(present)}"
            )


def _read_hub(dataset: Dataset) -> Iterator[tuple[int, dict[str, Any]]]:
    # Imported late: it takes a second, and only hub datasets need it.
    import datasets as hub

    # Hide the client's messages about retries: the final error is reported.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    # Only datasets that must be shuffled are downloaded completely, into a file of Arrow data that stays on disk.
    streaming = not dataset.sorted_by_class
    try:
        try:
            rows = hub.load_dataset(dataset.hub_id, dataset.config, split=dataset.split, streaming=streaming)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            # The dataset is defined by code, which is not run: load the hub's own Parquet conversion.
            rows = hub.load_dataset(
                dataset.hub_id, dataset.config, split=dataset.split, revision=CONVERTED, streaming=streaming
            )
    except Exception as error:  # the library's errors share no base class: connection, missing repository, bad file
        reason = first_line(error)
        raise UnreachableError(
            f"cannot load {dataset.hub_id} from the Hugging Face hub ({reason}); without a network, use a local data file"
        ) from error
    if rows.column_names is not None:
        _check_columns(list(rows.column_names), dataset, Path(str(dataset.hub_id)))
    columns = list(dict.fromkeys(dataset.columns))
    if streaming:
        try:
            yield from enumerate({name: row.get(name) for name in columns} for row in rows)
        except Exception as error:  # as above, during a download
            raise UnreachableError(f"{dataset.hub_id}: the hub stopped sending rows ({first_line(error)})") from error
        return
    for numbers in _order(dataset, len(rows)):
        some = rows[numbers]
        for at, number in enumerate(numbers):
            yield number, {name: some[name][at] for name in columns}
