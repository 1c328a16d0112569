"""Datasets by name: where they live, which columns they need, and how a problem becomes a prompt."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from profiler.errors import DatasetError

MAX_JSONL_LINE = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One entry of the registry.

    template: `str.format` text over column names; the columns that it names must exist.
    key: column that identifies a row in its source, or None to use the row's number.
    embedded: the problems ship with this package (`profiler/demo/prompts/`), so no hub is involved.
    """

    name: str
    description: str
    template: str
    key: str | None = None
    hub_id: str | None = None
    config: str | None = None
    split: str | None = None
    embedded: bool = False

    @property
    def columns(self) -> list[str]:
        """Columns that the prompt and the key are made of."""
        names = [name for _, name, _, _ in string.Formatter().parse(self.template) if name]
        return [*names, *([self.key] if self.key else [])]


@dataclass(frozen=True)
class Problem:
    """A prompt and where it came from. `source_key` identifies it inside its dataset."""

    dataset: str
    source_key: str
    prompt: str


DATASETS: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            name="gsm8k",
            description="grade-school arithmetic word problems",
            template="Question: {question}\nAnswer:",
            hub_id="openai/gsm8k",
            config="main",
            split="test",
        ),
        Dataset(
            name="humaneval",
            description="Python functions to complete",
            template="{prompt}",
            key="task_id",
            hub_id="openai/openai_humaneval",
            split="test",
        ),
        Dataset(
            name="imdb",
            description="film reviews",
            template="Review: {text}\nSentiment:",
            hub_id="stanfordnlp/imdb",
            split="test",
        ),
        Dataset(
            name="demo-math",
            description="arithmetic word problems, shipped with this package",
            template="Question: {text}\nAnswer:",
            embedded=True,
        ),
        Dataset(
            name="demo-code",
            description="Python functions to complete, shipped with this package",
            template="{text}",
            embedded=True,
        ),
        Dataset(
            name="demo-reviews",
            description="short reviews, shipped with this package",
            template="Review: {text}\nSentiment:",
            embedded=True,
        ),
    )
}

DEMO_DATASETS = tuple(name for name, dataset in DATASETS.items() if dataset.embedded)


def find_dataset(name: str) -> Dataset:
    """The registry's entry. Raises `DatasetError` listing what exists."""
    if name not in DATASETS:
        raise DatasetError(f"unknown dataset {name!r}: expected one of {', '.join(DATASETS)}")
    return DATASETS[name]


def load_problems(dataset: Dataset, count: int, *, data_files: Path | None = None) -> list[Problem]:
    """The first `count` problems, from `data_files` (.parquet, .jsonl) if given, else embedded or from the hub.

    Fewer are returned if the dataset holds fewer. Raises `DatasetError` on an unreadable file or a missing column.
    """
    if data_files is not None:
        rows = _read_local(data_files, dataset)
    elif dataset.embedded:
        rows = _read_embedded(dataset)
    else:
        rows = _read_hub(dataset)
    problems: list[Problem] = []
    for number, row in enumerate(rows):
        if len(problems) == count:
            break
        for column in dataset.columns:
            if row.get(column) is None:
                where = data_files or dataset.hub_id
                raise DatasetError(f"{where}, row {number}: column {column!r} is empty, and {dataset.name} needs it")
        for column in dataset.columns:
            if column != dataset.key and not _is_text(row[column]):
                where = data_files or dataset.hub_id
                raise DatasetError(f"{where}, row {number}: column {column!r} is {str(row[column])[:40]!r}, expected text")
        key = str(row[dataset.key]) if dataset.key else str(number)
        problems.append(Problem(dataset.name, key, dataset.template.format(**row)))
    if not problems:
        raise DatasetError(f"{data_files or dataset.name} holds no problems")
    return problems


def _read_embedded(dataset: Dataset) -> Iterator[dict[str, Any]]:
    text = resources.files("profiler").joinpath("demo", "prompts", f"{dataset.name}.jsonl").read_text(encoding="utf-8")
    return (json.loads(line) for line in text.splitlines())


def _read_local(path: Path, dataset: Dataset) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise DatasetError(f"data file {path}: no such file")
    if path.suffix == ".parquet":
        return _read_parquet(path, dataset)
    if path.suffix in {".jsonl", ".ndjson"}:
        return _read_json_lines(path, dataset)
    raise DatasetError(f"data file {path}: expected a name ending in .parquet or .jsonl")


def _read_parquet(path: Path, dataset: Dataset) -> Iterator[dict[str, Any]]:
    try:
        file = pq.ParquetFile(path)
        _check_columns(file.schema_arrow.names, dataset, path)
        columns = list(dict.fromkeys(dataset.columns))
        batches = file.iter_batches(batch_size=256, columns=columns)
        # The first batch is decoded here, so that a corrupt file fails before an engine has been started.
        first = next(batches, None)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"data file {path} is not readable Parquet: {str(error).splitlines()[0]}") from error

    def rows() -> Iterator[dict[str, Any]]:
        if first is not None:
            yield from first.to_pylist()
        try:
            for batch in batches:
                yield from batch.to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise DatasetError(f"data file {path} is not readable Parquet: {str(error).splitlines()[0]}") from error

    return rows()


def _read_json_lines(path: Path, dataset: Dataset) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_JSONL_LINE), b""), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DatasetError(f"data file {path}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DatasetError(f"data file {path}, line {number}: expected an object with columns")
            _check_columns(list(row), dataset, path)
            yield row


def _is_text(value: Any) -> bool:
    """A string that can be written as UTF-8 (JSON can spell lone surrogates)."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _check_columns(present: list[str], dataset: Dataset, path: Path) -> None:
    for column in dataset.columns:
        if column not in present:
            raise DatasetError(
                f"data file {path} lacks column {column!r}, which {dataset.name} needs; it has {', '.join(present)}"
            )


def _read_hub(dataset: Dataset) -> Iterator[dict[str, Any]]:
    # Imported late: it takes a second, and only hub datasets need it.
    import datasets as hub

    try:
        rows = hub.load_dataset(dataset.hub_id, dataset.config, split=dataset.split)
    except Exception as error:  # its failures share no base class: connection, missing repository, bad file
        reason = str(error).splitlines()[0]
        raise DatasetError(
            f"cannot load {dataset.hub_id} from the Hugging Face hub ({reason}); without a network use --data-files FILE"
        ) from error
    _check_columns(list(rows.column_names), dataset, Path(str(dataset.hub_id)))
    return iter(rows)
