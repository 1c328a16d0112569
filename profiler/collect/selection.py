"""Select the problems of a collection: a number of problems or of tokens, spread evenly over datasets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiler.datasets.problems import (
    SHUFFLE_SEED,
    Problem,
    read_problems,
    take_problems,
    take_tokens,
    typical_problems,
    within,
)
from profiler.datasets.registry import Dataset, find_dataset
from profiler.engines import Sampling
from profiler.errors import DatasetError, DatasetUsageError, ModelError, first_line
from profiler.trace.schema import DatasetMetadata

CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which problems to take, and how their outputs are sampled.

    num_problems: total over all datasets. target_tokens: total tokens, prompt and output, instead of a number of problems.
    max_tokens_per_problem: limit on prompt and output; longer prompts lose their tail. data_files: a local file to read instead
    of the hub; allowed with one dataset only.
    Raises `DatasetError` on numbers below 1.
    """

    datasets: tuple[str, ...]
    num_problems: int = 100
    target_tokens: int | None = None
    max_tokens_per_problem: int | None = None
    data_files: Path | None = None
    sampling: Sampling

    def __post_init__(self) -> None:
        numbers = {
            "num_problems": self.num_problems,
            "target_tokens": self.target_tokens,
            "max_tokens_per_problem": self.max_tokens_per_problem,
            "max_new_tokens": self.sampling.max_new_tokens,
        }
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise DatasetUsageError(f"{name} {value}: expected 1 or more")


def select(selection: Selection, location: str, revision: str | None = None) -> list[Problem]:
    """The selected problems, dataset by dataset.

    location, revision: of the model whose tokenizer counts the tokens, if the selection limits tokens.
    Raises `DatasetError` if a dataset is unknown, named twice, unreadable or empty, or if no row has a prompt; `ModelError` if
    tokens must be counted and the tokenizer cannot be loaded.
    """
    if selection.data_files is not None and len(selection.datasets) > 1:
        raise DatasetUsageError("data_files can be given for one dataset only")
    if len(set(selection.datasets)) < len(selection.datasets):
        raise DatasetUsageError(f"{','.join(selection.datasets)} names a dataset twice")
    datasets = [find_dataset(name) for name in selection.datasets]
    sources = {
        dataset.name: read_problems(dataset, data_files=selection.data_files, max_new_tokens=selection.sampling.max_new_tokens)
        for dataset in datasets
    }
    problems = _take(selection, sources, lambda: token_counter(location, revision))
    if all(problem.unusable is not None for problem in problems):
        # Known before an engine starts.
        first = problems[0]
        raise DatasetError(f"no problem can be run; the first, {first.dataset} {first.source_key}: {first.unusable}")
    return problems


def guess(selection: Selection) -> list[Problem]:
    """Like `select`, without the hub or a tokenizer.

    Problems of hub datasets are blanks of typical length; a token counts as four characters.
    """

    def source(dataset: Dataset) -> Iterator[Problem]:
        if dataset.embedded or selection.data_files is not None:
            return read_problems(dataset, data_files=selection.data_files, max_new_tokens=selection.sampling.max_new_tokens)
        return typical_problems(dataset, selection.sampling.max_new_tokens)

    def count_tokens(text: str) -> int:
        return len(text) // CHARACTERS_PER_TOKEN + 1

    return _take(selection, {name: source(find_dataset(name)) for name in selection.datasets}, lambda: count_tokens)


def _take(
    selection: Selection, sources: dict[str, Iterator[Problem]], counter: Callable[[], Callable[[str], int]]
) -> list[Problem]:
    if selection.target_tokens is None and selection.max_tokens_per_problem is None:
        return take_problems(sources, selection.num_problems)
    count_tokens = counter()
    if selection.target_tokens is None:
        problems = take_problems(sources, selection.num_problems)
        return [within(problem, selection.max_tokens_per_problem, count_tokens)[0] for problem in problems]
    return take_tokens(sources, selection.target_tokens, selection.max_tokens_per_problem, count_tokens)


def describe(selection: Selection, problems: list[Problem]) -> dict[str, Any]:
    """The arguments of a `Collection` that describe its problems: `problems` by id, `datasets`, `sampling`, `recipe`."""
    counts = Counter(problem.dataset for problem in problems)
    from_file = selection.data_files is not None
    new_tokens = {problem.dataset: problem.max_new_tokens for problem in problems}
    recipe = {
        "max_new_tokens": new_tokens if len(set(new_tokens.values())) > 1 else next(iter(new_tokens.values())),
        "target_tokens": selection.target_tokens,
        "max_tokens_per_problem": selection.max_tokens_per_problem,
    }
    return {
        "problems": dict(enumerate(problems)),
        "datasets": [
            DatasetMetadata(
                name=dataset.name,
                hub_id=None if from_file else dataset.hub_id,
                config=None if from_file else dataset.config,
                split=None if from_file else dataset.split,
                data_files=selection.data_files.name if selection.data_files is not None else None,
                prompt_template=dataset.template,
                shuffle_seed=SHUFFLE_SEED if dataset.sorted_by_class else None,
                problems=counts[dataset.name],
            )
            for dataset in map(find_dataset, selection.datasets)
        ],
        "sampling": selection.sampling,
        "recipe": {name: value for name, value in recipe.items() if value is not None},
    }


def token_counter(location: str, revision: str | None = None) -> Callable[[str], int]:
    """A function that counts the tokens of a text as the engine will. Raises `ModelError` if the tokenizer cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(location, revision=None if Path(location).is_dir() else revision)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the tokenizer of {location}: {first_line(error)}") from error
    return lambda text: len(tokenizer(text)["input_ids"])
