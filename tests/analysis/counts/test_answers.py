"""A sample of a trace's problems, token by token: which ones, which of their tokens, and with what."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.traces import write_synthetic_trace

from analysis.counts.answers import read_answers, spread, window_of
from analysis.counts.survey import Choice
from profiler.importers import import_trace
from profiler.importers.rows import ImportOptions
from profiler.trace.reader import Trace
from profiler.trace.splits import problem_digests


def test_each_domain_has_its_turn() -> None:
    assert spread([0, 1, 2, 3, 4, 5], list("aaabba"), 4) == [0, 3, 1, 4]
    assert spread([0, 1], ["a", "a"], 9) == [0, 1]
    assert spread([], [], 3) == []


@pytest.mark.parametrize(
    ("prompt", "answer", "size", "expected"),
    [
        (2, 3, 8, slice(0, 5)),  # all of it
        (6, 6, 8, slice(4, 12)),  # a quarter of the window before the answer
        (10, 2, 8, slice(4, 12)),  # a short answer leaves room for more of the prompt
        (1, 20, 8, slice(0, 8)),
        (20, 0, 8, slice(0, 8)),  # no answer: from the start
    ],
)
def test_the_window_begins_before_the_answer(prompt: int, answer: int, size: int, expected: slice) -> None:
    assert window_of(np.arange(prompt + answer) >= prompt, size) == expected


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Seven problems of 10 tokens in two datasets, whose token ids are their positions."""
    random = np.random.default_rng(0)
    problems = [(random.random((10, 3, 8)).argsort(-1)[..., :2], np.tile([0.75, 0.25], (10, 3, 1))) for _ in range(7)]
    return write_synthetic_trace(
        tmp_path_factory.mktemp("answers") / "trace",
        problems,
        8,
        datasets=["code"] * 5 + ["math"] * 2,
        vocab_ids=[100 * n + np.arange(11) for n in range(7)],
        prompt_tokens=4,
    )


def test_answers_are_those_of_the_trace(trace: Trace) -> None:
    answers = read_answers(trace, limit=4, window=8)
    assert [(answer.problem_id, answer.domain) for answer in answers] == [(0, "code"), (5, "math"), (1, "code"), (6, "math")]
    answer = answers[1]
    expected = trace.arrays(5)
    # From two tokens before the fifth, which is the first generated one.
    assert answer.token_ids_T.tolist() == list(range(2, 10))
    assert answer.keys == [500 + n for n in range(2, 10)]
    assert answer.is_decode_T.tolist() == [False] * 2 + [True] * 6
    np.testing.assert_array_equal(answer.expert_ids_TLK, expected.expert_ids_TLK[2:])
    assert expected.weights_TLK is not None
    np.testing.assert_array_equal(answer.weights_TLK, expected.weights_TLK[2:])
    assert (answer.recorded, answer.prompt, answer.margins_TL) == (10, "prompt 5", None)


def test_chosen_problems_come_first_and_left_out_ones_never(trace: Trace) -> None:
    digests = problem_digests(trace)
    first = [digests[problem] for problem in (4, 6)]
    found = read_answers(trace, first=first, limit=3)
    assert [answer.problem_id for answer in found] == [4, 6, 0]
    assert [answer.digest for answer in found][:2] == first
    # Digests of problems that the trace does not have.
    assert [answer.problem_id for answer in read_answers(trace, first=[1, 2], limit=1)] == [0]
    assert {answer.domain for answer in read_answers(trace, Choice(by="source_key"))} == set("0123456")


def test_without_weights_the_order_of_experts_is_that_of_their_numbers(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(
        "\n".join(
            f'{{"problem_id": 0, "layer": {layer}, "token_id": {token}, "expert_ids": [{5 - token}, {token}]}}'
            for token in range(3)
            for layer in range(2)
        )
    )
    trace = import_trace(source, tmp_path / "trace", options=ImportOptions(num_experts=8, command=("specmoe",)))
    (answer,) = read_answers(trace)
    assert answer.weights_TLK is None
    assert answer.expert_ids_TLK[:, 0].tolist() == [[0, 5], [1, 4], [2, 3]]
    assert answer.keys == [None] * 3
