"""Converted traces are split by the content of their problems, where the source has it: copies of a prompt are never parted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from profiler.errors import TraceError
from profiler.importers import import_trace
from profiler.importers.rows import ImportOptions
from profiler.trace.reader import Trace
from profiler.trace.splits import problem_digests, split_key
from speculation.evaluation.evaluate import evaluate
from speculation.training.fit import train

PROMPTS = [["The", " cat"], ["The", " dog"], ["The cat"], ["Th", "e cat"], ["The", " cat", "."]]


def beyond(folder: Path, prompts: list[list[str]], first: int = 0) -> Trace:
    """A folder of MoE-Beyond's files, one for each prompt, with random experts."""
    source = folder.with_name(f"{folder.name}-source")
    source.mkdir()
    random = np.random.default_rng(first)
    for number, tokens in enumerate(prompts, start=first):
        rows = [f'{layer},0,"{text}","{random.permutation(8)[:2].tolist()}"' for layer in (1, 2) for text in tokens]
        text = "\r\n".join(["Layer ID,Batch Number,Token,Activated Expert IDs", *rows])
        (source / f"prompt_{number}_data.csv").write_text(text + "\r\n", newline="")
    return import_trace(source, folder)


def olmoe(folder: Path, sequences: list[list[int]]) -> Trace:
    random = np.random.default_rng(0)
    lines = [{"input_ids": ids, "exp_ids": random.random((len(ids), 8, 2)).argsort(1)[:, :2].tolist()} for ids in sequences]
    source = folder.with_suffix(".jsonl")
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return import_trace(source, folder)


def test_the_same_tokens_have_the_same_digest_in_every_trace_and_others_do_not(tmp_path: Path) -> None:
    first, second = beyond(tmp_path / "a", PROMPTS), beyond(tmp_path / "b", PROMPTS[::-1], first=70)
    assert split_key(first) == split_key(second) == "content_sha256"
    digests = list(problem_digests(first).values())
    assert len(set(digests)) == len(PROMPTS)
    assert digests == list(problem_digests(second).values())[::-1]


def test_vocabulary_ids_are_content_too(tmp_path: Path) -> None:
    trace = olmoe(tmp_path / "a", [[5, 6], [6, 5], [5, 6], [5, 6, 6], [1541]])
    a, b, c, d, e = problem_digests(trace).values()
    assert split_key(trace) == "content_sha256"
    assert a == c
    assert len({a, b, d, e}) == 4


@pytest.mark.parametrize("column", ["vocab_id", "text"])
@pytest.mark.parametrize("named", [True, False])
def test_tokens_are_content_whether_the_source_names_their_problems_or_not(tmp_path: Path, column: str, named: bool) -> None:
    """Problems 0 and 2 have the same prompt and different outputs; the table of problems, if any, has only some of them."""
    tokens = [[5, 6, 1], [6, 5, 1], [5, 6, 2]]
    places = [(problem, token) for problem in range(3) for token in range(3)]
    keys = {"problem_id": [problem for problem, _ in places], "token_id": [token for _, token in places]}
    values = [tokens[problem][token] for problem, token in places]
    source = tmp_path / "source"
    source.mkdir()
    pq.write_table(pa.table(keys | {"layer": [0] * 9, "expert_ids": [[0, 1]] * 9}), source / "routing.parquet")
    phases = ["decode" if token == 2 else "prefill" for _, token in places]
    content = {column: values if column == "vocab_id" else list(map(str, values))}
    pq.write_table(pa.table(keys | {"phase": phases} | content), source / "tokens.parquet")
    if named:
        pq.write_table(pa.table({"problem_id": [1], "dataset": ["d"]}), source / "problems.parquet")
    trace = import_trace(source, tmp_path / "t")
    a, b, c = problem_digests(trace).values()
    assert split_key(trace) == "content_sha256"
    assert a == c != b
    assert trace.problems.column("dataset").to_pylist() == ["unknown", "d" if named else "unknown", "unknown"]


def test_without_content_the_source_key_is_all_there_is(tmp_path: Path) -> None:
    row = {"dataset": "d", "problem_id": 0, "layer": 0, "token_idx": 0, "experts": [1, 0], "gating_probs": [0.6, 0.4]}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    assert split_key(import_trace(tmp_path / "in.jsonl", tmp_path / "t")) == "source key"


def test_a_run_is_evaluated_on_another_folder_of_the_same_source(tmp_path: Path) -> None:
    """Seven prompts of the second folder are copies of training prompts, and are recognized by their tokens."""
    prompts = [[f"token {n}", "and", f"{n % 7}"] for n in range(40)]
    training = beyond(tmp_path / "train", prompts)
    test = beyond(tmp_path / "test", [*prompts[:7], *([f"other {n}", "word"] for n in range(13))], first=1000)
    run = train(training, "popularity", tmp_path / "run", validation=test)
    facts = json.loads((run.path / "metrics.json").read_text())
    assert (facts["train_problems"], facts["validation_problems"], facts["shared_problems"]) == (40, 13, 7)
    everything = evaluate(run, test, part="all")
    assert (everything.problems, everything.trained_on) == (20, 7)
    # Split by content, a run of one folder is never evaluated on its training prompts in the other one.
    split = train(training, "popularity", tmp_path / "split")
    assert evaluate(split, test, part="test").trained_on == 0


def test_a_run_on_tokens_is_not_comparable_with_names(tmp_path: Path) -> None:
    run = train(beyond(tmp_path / "a", [[f"{n}", "x"] for n in range(20)]), "popularity", tmp_path / "run")
    rows = [
        {"dataset": "d", "problem_id": n, "layer": layer, "token_idx": 0, "experts": [7, 0], "gating_probs": [0.6, 0.4]}
        for n in range(20)
        for layer in (1, 2)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TraceError, match=r"was trained on a split by content_sha256, and .* can only be split by source key"):
        evaluate(run, import_trace(tmp_path / "in.jsonl", tmp_path / "t"))


def test_numbers_of_experts_that_were_inferred_differ_with_a_reason(tmp_path: Path) -> None:
    run = train(beyond(tmp_path / "a", [[f"{n}", "x"] for n in range(20)]), "popularity", tmp_path / "run")
    assert run.predictor.shape.experts == 8
    small = tmp_path / "small-source"
    small.mkdir()
    rows = "".join(f'{layer},0,x,"[0, 3]"\r\n' for layer in (1, 2))
    (small / "prompt_0_data.csv").write_text("Layer ID,Batch Number,Token,Activated Expert IDs\r\n" + rows, newline="")
    with pytest.raises(
        TraceError, match=r"top-2 of 4 experts, but .* of 8 experts; its number of experts was inferred: convert"
    ):
        evaluate(run, import_trace(small, tmp_path / "b"), part="all")
    again = import_trace(small, tmp_path / "c", options=ImportOptions(num_experts=8))
    assert evaluate(run, again, part="all").tokens == 1
