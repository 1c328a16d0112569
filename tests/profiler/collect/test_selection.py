"""Which problems are taken: numbers of them and budgets of tokens, spread over datasets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.collect.selection import Selection, describe, select, token_counter
from profiler.datasets.problems import Problem, read_problems, take_problems, take_tokens
from profiler.datasets.registry import DATASETS
from profiler.engines import Sampling
from profiler.errors import DatasetError
from profiler.models.resolve import demo_model_folder


def source(name: str, lengths: list[int], new_tokens: int = 2) -> Iterator[Problem]:
    """Problems whose prompts have so many characters, each a token."""
    for number, length in enumerate(lengths):
        yield Problem(dataset=name, source_key=str(number), prompt="x" * length, max_new_tokens=new_tokens)


def given_tokens(problems: list[Problem], name: str) -> int:
    return sum(min(len(p.prompt), p.max_prompt_tokens or 10**9) + p.max_new_tokens for p in problems if p.dataset == name)


def test_a_budget_is_spread_evenly() -> None:
    sources = {"a": source("a", [8] * 100), "b": source("b", [18] * 100)}
    problems = take_tokens(sources, 400, None, len)
    # Problems of 10 and of 20 tokens.
    assert [problem.dataset for problem in problems] == ["a"] * 20 + ["b"] * 10


def test_what_a_dataset_lacks_comes_from_the_others() -> None:
    sources = {"a": source("a", [8] * 3), "b": source("b", [8] * 100), "c": source("c", [8] * 100)}
    problems = take_tokens(sources, 300, None, len)
    assert [given_tokens(problems, name) for name in "abc"] == [30, 140, 140]


def test_small_budgets_leave_no_dataset_out() -> None:
    sources = {name: source(name, [90] * 9) for name in "abc"}
    assert [problem.dataset for problem in take_tokens(sources, 100, None, len)] == ["a", "b", "c"]


def test_prompts_lose_their_tail_to_stay_within_the_limit() -> None:
    problems = take_tokens({"a": source("a", [50, 5])}, 27, 20, len)
    assert [problem.max_prompt_tokens for problem in problems] == [18, 18]
    assert given_tokens(problems, "a") == 20 + 7
    with pytest.raises(DatasetError, match="a limit of 2 tokens per problem leaves no room for a prompt of a with its 2 new"):
        take_tokens({"a": source("a", [5])}, 10, 2, len)


def test_an_empty_dataset_is_named() -> None:
    with pytest.raises(DatasetError, match="b holds no problems"):
        take_tokens({"a": source("a", [8] * 9), "b": source("b", [])}, 50, None, len)


@given(
    lengths=st.dictionaries(st.sampled_from("abcd"), st.lists(st.integers(1, 40), min_size=1, max_size=60), min_size=1),
    target=st.integers(1, 2000),
)
def test_budgets_are_met_within_a_problem_for_each_dataset(lengths: dict[str, list[int]], target: int) -> None:
    problems = take_tokens({name: source(name, found) for name, found in lengths.items()}, target, 30, len)
    total = sum(given_tokens(problems, name) for name in lengths)
    available = sum(min(length, 28) + 2 for found in lengths.values() for length in found)
    assert min(target, available) <= total < target + 30 * len(lengths)
    # Those that still had problems gave the same, to a problem for every time that something was redistributed.
    open_ones = [
        given_tokens(problems, n) for n, found in lengths.items() if sum(p.dataset == n for p in problems) < len(found)
    ]
    assert not open_ones or max(open_ones) - min(open_ones) <= 30 * (1 + len(lengths))
    assert [p.dataset for p in problems] == sorted((p.dataset for p in problems), key=list(lengths).index)


def test_a_source_is_not_read_further_than_needed() -> None:
    read = 0

    def endless() -> Iterator[Problem]:
        nonlocal read
        while True:
            read += 1
            yield Problem(dataset="a", source_key=str(read), prompt="x" * 8, max_new_tokens=2)

    assert len(take_tokens({"a": endless()}, 100, None, len)) == 10
    assert len(take_problems({"a": endless()}, 7)) == 7
    assert read == 10 + 7


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_datasets_sorted_by_class_are_shuffled_in_a_fixed_way(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"test.{suffix}"
    rows = [{"text": f"review {number}", "label": int(number >= 500)} for number in range(1000)]
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    taken = take_problems({"imdb": read_problems(DATASETS["imdb"], data_files=path)}, 100)
    numbers = [int(problem.source_key) for problem in taken]
    assert [f"Review: review {number}\nSentiment:" for number in numbers] == [problem.prompt for problem in taken]
    assert len(set(numbers)) == 100
    # Of the first 100 rows all would be of one class.
    assert 30 < sum(number >= 500 for number in numbers) < 70
    again = take_problems({"imdb": read_problems(DATASETS["imdb"], data_files=path)}, 100)
    assert again == taken


def test_short_rows_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    texts = ["", " = Heading = ", "A paragraph. " * 30]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    problems = list(read_problems(DATASETS["wikitext-2"], data_files=path))
    assert [(p.source_key, p.max_new_tokens) for p in problems] == [("2", 1)]


def test_datasets_have_numbers_of_new_tokens_of_their_own() -> None:
    selection = Selection(datasets=("demo-math", "demo-code"), num_problems=4, sampling=Sampling())
    problems = select(selection, str(demo_model_folder()))
    assert describe(selection, problems)["recipe"]["max_new_tokens"] == 64
    one = Selection(datasets=("demo-math",), num_problems=4, target_tokens=99, sampling=Sampling(max_new_tokens=3))
    recipe = describe(one, select(one, str(demo_model_folder())))["recipe"]
    assert recipe == {"max_new_tokens": 3, "target_tokens": 99}


def test_tokens_are_counted_as_the_engine_does() -> None:
    from profiler.engines import EngineOptions
    from profiler.engines.transformers import TransformersEngine
    from profiler.models.resolve import resolve_model

    engine = TransformersEngine(resolve_model("demo"), EngineOptions())
    count = token_counter(str(demo_model_folder()))
    for text in ("", "Question: 1 + 1?", "def f(x):\n    return x\n"):
        assert count(text) == len(engine.encode(text))


@pytest.mark.parametrize(
    ("num_problems", "target_tokens", "text"), [(0, None, "num_problems 0"), (100, -5, "target_tokens -5")]
)
def test_numbers_below_one_are_refused(num_problems: int, target_tokens: int | None, text: str) -> None:
    with pytest.raises(DatasetError, match=f"{text}: expected 1 or more"):
        Selection(datasets=("demo-math",), num_problems=num_problems, target_tokens=target_tokens, sampling=Sampling())
