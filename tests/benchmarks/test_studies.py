"""Learning curves and transfer matrices: nested subsets, nothing evaluated that was trained on, and runs that are kept."""

from __future__ import annotations

import csv
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.traces import MakeTrace

from benchmarks.learning_curve import learning_curve
from benchmarks.studies import Digests, digests_of, first_by_hash, held_out, trained, unseen_problems
from benchmarks.transfer import ALL, by_dataset, transfer_matrix
from profiler.errors import SpecmoeError
from profiler.trace.reader import Trace
from profiler.trace.splits import part_of
from speculation.data.tasks import Task
from speculation.predictors.options import TrainingOptions
from speculation.training.runs import CONFIG_FILE, load_run

OPTIONS = TrainingOptions(epochs=1, batch_tokens=64, width=8)


def two_domains(make_trace: MakeTrace, name: str = "two", prompts: str = "prompt") -> Trace:
    """80 problems of two datasets, in each of which an expert is followed by another one; 4 prompts are in both datasets."""
    random = np.random.default_rng(0)
    problems, datasets, texts = [], [], []
    for number in range(80):
        step, dataset = (1, "plus one") if number % 2 else (3, "plus three")
        first = random.integers(0, 8, 12)
        strongest = (first[:, None] + step * np.arange(3)) % 8
        problems.append((np.stack([strongest, (strongest + 4) % 8], -1), np.tile([0.7, 0.3], (12, 3, 1))))
        datasets.append(dataset)
        texts.append(f"{prompts} {number - 1 if number in {1, 3, 5, 7} else number}")
    return make_trace(problems, 8, name=name, prompts=texts, datasets=datasets)


def test_subsets_are_nested_and_their_problems_are_training_problems(make_trace: MakeTrace) -> None:
    trace = two_domains(make_trace)
    train = digests_of(trace, part="train")
    everything = digests_of(trace)
    assert set(train.tolist()) < set(everything.tolist())
    shares = [set(first_by_hash(train, share).tolist()) for share in (0.01, 0.25, 0.5, 0.99, 1)]
    assert [len(each) for each in shares] == [1, *(int(np.ceil(share * len(train))) for share in (0.25, 0.5, 0.99)), len(train)]
    for smaller, larger in pairwise(shares):
        assert smaller <= larger
    prompts = set(trace.problems.column("prompt").to_pylist())
    assert sum(part_of(prompt) == "train" for prompt in prompts) == len(train)


def test_a_learning_curve(make_trace: MakeTrace, tmp_path: Path) -> None:
    trace = two_domains(make_trace)
    predictors = {"token-identity": OPTIONS, "mlp": OPTIONS}
    rows = learning_curve(trace, predictors, tmp_path, shares=(100, 25))
    train = digests_of(trace, part="train")
    names = {"popularity", "previous-token", "conditional-counts", "token-identity", "mlp"}
    assert {(row["share"], row["predictor"]) for row in rows} == {(share, name) for share in (25, 100) for name in names}
    assert len({(row["problems"], row["tokens"]) for row in rows}) == 1
    for row in rows:
        # A prompt that two problems have is one problem of the subset.
        assert row["train_problems"] >= int(np.ceil(len(train) * row["share"] / 100))
        assert row["low"] <= row["recall@2"] <= row["high"]
        assert (row["control"] is not None) == (row["predictor"] in predictors)
    small, large = (set(load_run(tmp_path / "runs" / f"mlp-{share}").trained_on.tolist()) for share in (25, 100))
    assert small < large == set(train.tolist())
    assert len(small) == int(np.ceil(len(train) / 4))
    # The same problems for early stopping, whatever the share.
    assert len({load_run(tmp_path / "runs" / f"mlp-{share}").facts.validated_on for share in (25, 100)}) == 1
    with (tmp_path / "learning_curve.csv").open(newline="") as file:
        assert [row["predictor"] for row in csv.DictReader(file)] == [row["predictor"] for row in rows]


def test_finished_runs_are_kept_and_others_refused(make_trace: MakeTrace, tmp_path: Path) -> None:
    trace = two_domains(make_trace)
    predictors = {"popularity": OPTIONS}
    first = learning_curve(trace, predictors, tmp_path, shares=(50, 100))
    kept = tmp_path / "runs" / "popularity-50" / CONFIG_FILE
    before = kept.stat().st_mtime_ns
    # As if it had been interrupted before its first checkpoint.
    (tmp_path / "runs" / "popularity-100" / CONFIG_FILE).unlink()
    again = learning_curve(trace, predictors, tmp_path, shares=(50, 100))
    assert kept.stat().st_mtime_ns == before
    assert [row["recall@2"] for row in first] == [row["recall@2"] for row in again]
    for changed in (replace(OPTIONS, seed=1), replace(OPTIONS, epochs=2)):
        with pytest.raises(SpecmoeError, match="is a finished run, and its training options differ"):
            learning_curve(trace, {"popularity": changed}, tmp_path, shares=(50,))
    train, validation = (digests_of(trace, part=part) for part in ("train", "validation"))
    settings: dict[str, Any] = {"task": Task.NEXT_LAYER, "options": OPTIONS, "train_on": train}
    trained(trace, "mlp", tmp_path / "mlp", validate_on=validation, **settings)
    trained(trace, "mlp", tmp_path / "mlp", validate_on=validation, **settings)
    for other in (validation[:0], validation[1:]):
        with pytest.raises(SpecmoeError, match="its validation problems differ"):
            trained(trace, "mlp", tmp_path / "mlp", validate_on=other, **settings)


def test_a_transfer_matrix(make_trace: MakeTrace, tmp_path: Path) -> None:
    trace = two_domains(make_trace)
    rows = transfer_matrix(trace, {"token-identity": OPTIONS}, tmp_path, min_problems=2)
    cells = {(row["trained_on"], row["evaluated_on"]): row for row in rows if row["predictor"] == "conditional-counts"}
    names = ["plus one", "plus three"]
    assert cells.keys() == {(source, target) for source in [*names, ALL] for target in names}
    for (source, target), row in cells.items():
        # The rule of one dataset predicts nothing in the other; a mixture of the two predicts a part of each.
        low, high = (0.9, 1.0) if source == target else (0.1, 0.95) if source == ALL else (0.0, 0.1)
        assert low <= row["recall@2"] <= high, (source, target, row)
        assert row["high"] >= row["recall@2"] >= row["low"]
    # All were trained on as many distinct prompts, so that rows differ in the data only.
    runs = [load_run(tmp_path / "runs" / f"token-identity-{source}") for source in [*names, ALL]]
    assert len({len(run.trained_on) for run in runs}) == 1
    test = digests_of(trace, part="test")
    for source, run in zip([*names, ALL], runs, strict=True):
        assert not np.isin(run.trained_on, test).any()
        own = by_dataset(trace, None, "train")
        allowed = np.concatenate([own[name] for name in ([source] if source in own else own)])
        assert np.isin(run.trained_on, allowed).all()


def test_training_without_early_stopping_is_said(
    make_trace: MakeTrace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where no prompt of one of the datasets falls into the validation part."""
    found = by_dataset

    def without_some(of: Trace, groups: dict[str, list[str]] | None, part: str) -> dict[str, Digests]:
        digests = found(of, groups, part)
        return digests | {"plus one": digests["plus one"][:0]} if part == "validation" else digests

    monkeypatch.setattr("benchmarks.transfer.by_dataset", without_some)
    rows = transfer_matrix(two_domains(make_trace), {"mlp": OPTIONS}, tmp_path, min_problems=2)
    lines = capsys.readouterr().out.splitlines()
    remarks = [line for line in lines if "without early stopping (1 epoch)" in line]
    assert [line.split(":")[0] for line in remarks] == ["mlp, trained on plus one"]
    assert {row["trained_on"]: row["validation_problems"] > 0 for row in rows} == {
        "plus one": False, "plus three": True, ALL: True
    }  # fmt: skip


def test_a_prompt_of_two_datasets_is_of_one_only(make_trace: MakeTrace) -> None:
    trace = two_domains(make_trace)
    for part in ("train", "validation", "test", "all"):
        found = by_dataset(trace, None, part)
        assert not np.intersect1d(found["plus one"], found["plus three"]).size
        assert np.array_equal(np.union1d(found["plus one"], found["plus three"]), digests_of(trace, part=part))
    grouped = by_dataset(trace, {"both": ["plus one", "plus three"]}, "train")
    assert np.array_equal(grouped["both"], digests_of(trace, part="train"))


@pytest.mark.parametrize(
    ("groups", "message"),
    [({"a": ["plus one", "minus"]}, "dataset 'minus' is not in"), ({"a": ["plus one"], "b": ["plus one"]}, "or in two groups")],
)
def test_groups_that_do_not_fit_are_named(groups: dict[str, list[str]], message: str, make_trace: MakeTrace) -> None:
    with pytest.raises(SpecmoeError, match=message):
        by_dataset(two_domains(make_trace), groups, "train")


def test_datasets_that_are_too_small_are_left_out(
    make_trace: MakeTrace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SpecmoeError, match="0 datasets have 60 problems to train and to evaluate on"):
        transfer_matrix(two_domains(make_trace), {"popularity": OPTIONS}, tmp_path, min_problems=60)
    assert "plus three is left out: " in capsys.readouterr().out


def test_problems_of_both_traces_are_not_evaluated_on(make_trace: MakeTrace, tmp_path: Path) -> None:
    trace = two_domains(make_trace)
    with pytest.raises(SpecmoeError, match=r"all problems of .* are also in"):
        unseen_problems(trace, two_domains(make_trace, "same"))
    other = two_domains(make_trace, "other", "another prompt")
    where, part, unseen = unseen_problems(trace, other)
    assert (where, part, len(unseen)) == (other, "all", 76)
    assert not np.intersect1d(unseen, digests_of(trace)).size
    # Even if asked to.
    train = digests_of(trace, part="train")
    run = trained(
        trace, "popularity", tmp_path / "run", task=Task.NEXT_LAYER, options=OPTIONS, train_on=train, validate_on=train[:0]
    )
    assert run.facts.validated_on is None
    with pytest.raises(SpecmoeError, match=r"was trained on 5 of 5 problems to evaluate on"):
        held_out(run, trace, "all", train[:5])
