"""Datasets: prompts from rows, local files, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from profiler.datasets.problems import Problem, read_problems, take_problems
from profiler.datasets.registry import DATASETS, DEMO_DATASETS, Dataset, find_dataset
from profiler.errors import DatasetError


def load_problems(dataset: Dataset, count: int, *, data_files: Path | None = None) -> list[Problem]:
    return take_problems({dataset.name: read_problems(dataset, data_files=data_files)}, count)


def test_gsm8k_rows_become_questions(tmp_path: Path) -> None:
    path = tmp_path / "test.parquet"
    pq.write_table(pa.table({"question": ["1+1?", "2+2?", "3+3?"], "answer": ["2", "4", "6"]}), path)
    problems = load_problems(DATASETS["gsm8k"], 2, data_files=path)
    assert [p.prompt for p in problems] == ["Question: 1+1?\nAnswer:", "Question: 2+2?\nAnswer:"]
    assert [p.source_key for p in problems] == ["0", "1"]


def test_jsonl_and_keys(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({"task_id": "HumanEval/7", "prompt": "def f():\n", "test": "x"}) + "\n")
    assert load_problems(DATASETS["humaneval"], 5, data_files=path)[0].source_key == "HumanEval/7"


def test_braces_in_a_problem_are_text(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({"question": "{0.__class__} {x}"}) + "\n")
    assert load_problems(DATASETS["gsm8k"], 1, data_files=path)[0].prompt == "Question: {0.__class__} {x}\nAnswer:"


def test_unknown_dataset_lists_what_exists() -> None:
    with pytest.raises(DatasetError, match="expected one of humaneval, gsm8k, imdb, yelp"):
        find_dataset("gsm9k")


def test_bad_files_are_named(tmp_path: Path) -> None:
    gsm8k = DATASETS["gsm8k"]
    with pytest.raises(DatasetError, match=r"absent\.parquet: no such file"):
        load_problems(gsm8k, 1, data_files=tmp_path / "absent.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DatasetError, match="not readable Parquet"):
        load_problems(gsm8k, 1, data_files=tmp_path / "broken.parquet")
    (tmp_path / "rows.csv").write_text("question\n1+1?\n")
    with pytest.raises(DatasetError, match=r"ending in \.parquet or \.jsonl"):
        load_problems(gsm8k, 1, data_files=tmp_path / "rows.csv")
    (tmp_path / "broken.jsonl").write_text('{"question": "1?"}\n{"ques\n')
    with pytest.raises(DatasetError, match="line 2 is not JSON"):
        load_problems(gsm8k, 2, data_files=tmp_path / "broken.jsonl")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(DatasetError, match="lacks column 'question', which gsm8k needs; it has text"):
        load_problems(gsm8k, 1, data_files=tmp_path / "other.parquet")
    with pytest.raises(DatasetError, match="a folder, expected a file"):
        load_problems(gsm8k, 1, data_files=tmp_path)


@pytest.mark.parametrize(
    ("suffix", "value", "reason"),
    [
        ("parquet", None, "its column 'prompt' is empty"),
        ("jsonl", None, "its column 'prompt' is empty"),
        ("jsonl", 5, "its column 'prompt' is '5', expected text"),
        ("jsonl", ["def f()"], "its column 'prompt' is \"['def f()']\", expected text"),
        ("jsonl", "a\ud800b", "its column 'prompt' is 'a\\ud800b', expected text"),
    ],
)
def test_a_row_without_a_prompt_is_a_problem_that_says_so(tmp_path: Path, suffix: str, value: object, reason: str) -> None:
    path = tmp_path / f"problems.{suffix}"
    rows = [{"task_id": "a", "prompt": value}, {"task_id": "b", "prompt": "def g():"}, {"prompt": "def h():"}]
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    problems = load_problems(DATASETS["humaneval"], 3, data_files=path)
    assert [problem.unusable for problem in problems] == [reason, None, "its column 'task_id' is empty"]
    assert [problem.source_key for problem in problems] == ["a", "b", "2"]
    assert [problem.prompt for problem in problems] == ["", "def g():", ""]


def test_without_a_network_the_hub_says_how_to_go_on() -> None:
    with pytest.raises(DatasetError, match="use a local data file"):
        load_problems(DATASETS["gsm8k"], 1)


@pytest.mark.parametrize("name", DEMO_DATASETS)
def test_embedded_prompts(name: str) -> None:
    problems = load_problems(DATASETS[name], 1000)
    assert len(problems) == 40
    assert len({p.prompt for p in problems}) == 40
