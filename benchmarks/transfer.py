"""Transfer matrix: train a predictor on one dataset of a trace, evaluate it on each of them.

    python -m benchmarks.transfer TRACE --predictor NAME ... --out DIR [--group mmlu=mmlu_test,mmlu_dev ...] [--on OTHER]

Trains each predictor on the training problems of one dataset and evaluates it on the test problems of every dataset, or on
those problems of OTHER that TRACE does not have. All runs train on the same number of problems, that of the smallest dataset,
so that rows differ in what they were trained on and not in how much; the row "all" takes as many from all datasets together.
Networks stop early by the validation problems of the datasets that they train on; where there are none, they train all epochs,
which is printed, and `validation_problems` of transfer.csv is 0. Baselines are fitted on the same problems.
Datasets with fewer than --min-problems problems to train on or to evaluate on are left out, and named. Finished runs in DIR are
kept, so an interrupted call can be repeated. Writes DIR/transfer.csv.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies import (
    Digests,
    add_arguments,
    digests_of,
    heading,
    held_out,
    markdown,
    result_rows,
    shown,
    study_settings,
    trained,
    unseen_problems,
    without_early_stopping,
    write_rows,
)
from profiler.errors import SpecmoeError, counted
from profiler.trace.reader import Trace
from speculation.data.tasks import Task
from speculation.predictors.options import TrainingOptions

ALL = "all"
MIN_PROBLEMS = 10


def transfer_matrix(
    trace: Trace,
    predictors: dict[str, TrainingOptions],
    out: Path,
    *,
    groups: dict[str, list[str]] | None = None,
    min_problems: int = MIN_PROBLEMS,
    other: Trace | None = None,
    task: Task = Task.NEXT_LAYER,
) -> list[dict[str, Any]]:
    """Train on each dataset and evaluate on each; writes the CSV file.

    Args:
        trace: The trace to train on.
        predictors: Training options by the predictor's name.
        out: Folder for the runs and `transfer.csv`.
        groups: Datasets to treat as one, by the name to show. None: every dataset by itself.
        min_problems: Leave out datasets with fewer problems to train or to evaluate on.
        other: Evaluate on this trace. None: on the test part of `trace`.
        task: What the predictors predict.

    Returns:
        A row per dataset trained on, dataset evaluated on, and predictor or baseline; see `result_rows`.

    Raises:
        SpecmoeError: Fewer than two datasets have enough problems, or the traces do not say which dataset a problem is of.
    """
    where, part, unseen = unseen_problems(trace, other)
    train_on, validate_on = (by_dataset(trace, groups, name) for name in ("train", "validation"))
    evaluate_on = {name: np.intersect1d(each, unseen) for name, each in by_dataset(where, groups, part).items()}
    names = [name for name in train_on if min(len(train_on[name]), len(evaluate_on.get(name, ()))) >= min_problems]
    for name in sorted((train_on.keys() | evaluate_on.keys()) - set(names)):
        sizes = len(train_on.get(name, ())), len(evaluate_on.get(name, ()))
        print(f"{name} is left out: {counted(sizes[0], 'problem')} to train on, {sizes[1]} to evaluate on")
    if len(names) < 2:
        raise SpecmoeError(
            f"{counted(len(names), 'dataset')} have {min_problems} problems to train and to evaluate on: expected at least two"
        )
    smallest = min(len(train_on[name]) for name in names)
    chosen = {name: train_on[name][:smallest] for name in names}
    chosen[ALL] = np.unique(np.concatenate([train_on[name] for name in names]))[:smallest]
    validated = {name: validate_on.get(name, np.empty(0, np.uint64)) for name in names}
    validated[ALL] = np.unique(np.concatenate(list(validated.values())))
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for name, options in predictors.items():
        for source, problems in chosen.items():
            folder = out / "runs" / f"{name}-{source.replace('/', '_')}"
            run = trained(trace, name, folder, task=task, options=options, train_on=problems, validate_on=validated[source])
            for target in names:
                facts = {"trained_on": source, "evaluated_on": target}
                for row in result_rows(held_out(run, where, part, evaluate_on[target]), run, facts):
                    if row["predictor"] == name or (row["predictor"], source, target) not in rows:
                        rows[row["predictor"], source, target] = row
            print(f"{name}, trained on {source}: done{without_early_stopping(run)}", flush=True)
            write_rows(list(rows.values()), out / "transfer.csv")
    return list(rows.values())


def by_dataset(trace: Trace, groups: dict[str, list[str]] | None, part: str) -> dict[str, Digests]:
    """The digests of the problems of each dataset, or of each group of datasets, in one part of the split.

    A prompt that several of them have is counted in the first, so that none is trained on as one and evaluated as another.

    Raises `SpecmoeError` if a dataset of a group is not in the trace or in two groups, or the trace has no table of problems.
    """
    if not trace.has_problems:
        raise SpecmoeError(f"{trace.path} has no table of problems, which names their datasets")
    ids: dict[str, list[int]] = defaultdict(list)
    for problem_id, dataset in zip(
        *(trace.problems.column(name).to_pylist() for name in ("problem_id", "dataset")), strict=True
    ):
        ids[dataset].append(problem_id)
    if groups is not None:
        listed = [dataset for group in groups.values() for dataset in group]
        wrong = [dataset for dataset in listed if dataset not in ids or listed.count(dataset) > 1]
        if wrong:
            raise SpecmoeError(
                f"dataset {wrong[0]!r} is not in {trace.path}, or in two groups; it has {', '.join(sorted(ids))}"
            )
        ids = defaultdict(
            list, {name: [number for dataset in group for number in ids[dataset]] for name, group in groups.items()}
        )
    found: dict[str, Digests] = {}
    taken: Digests = np.empty(0, dtype=np.uint64)
    for name in sorted(ids):
        found[name] = np.setdiff1d(digests_of(trace, ids[name], part), taken)
        taken = np.union1d(taken, found[name])
    return found


def _group(text: str) -> tuple[str, list[str]]:
    name, found, datasets = text.partition("=")
    if not found or not name or name == ALL:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=DATASET,DATASET with another name than {ALL!r}")
    return name, datasets.split(",")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument(
        "--group", type=_group, action="append", metavar="NAME=A,B", help="treat these datasets as one; repeatable"
    )
    parser.add_argument("--min-problems", type=int, default=MIN_PROBLEMS, help=f"default: {MIN_PROBLEMS}")
    arguments = parser.parse_args()
    settings = study_settings(arguments)
    rows = transfer_matrix(
        **settings, groups=dict(arguments.group) if arguments.group else None, min_problems=arguments.min_problems
    )
    k_name = f"recall@{settings['trace'].metadata.model.top_k}"
    print(heading(rows, k_name))
    targets, sources = (list(dict.fromkeys(row[name] for row in rows)) for name in ("evaluated_on", "trained_on"))
    cells = {(row["predictor"], row["trained_on"], row["evaluated_on"]): row for row in rows}
    for name in dict.fromkeys(row["predictor"] for row in rows):
        header = [f"{name}: trained on", *(f"on {target}" for target in targets)]
        body = ([source, *(shown(cells[name, source, target], k_name) for target in targets)] for source in sources)
        print(f"\n{markdown(header, body)}")


if __name__ == "__main__":
    main()
