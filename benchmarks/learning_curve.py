"""Learning curve: how much a predictor gains by more training problems.

    python -m benchmarks.learning_curve TRACE --predictor NAME ... --out DIR [--share 25 --share 100] [--on OTHER]

Trains each predictor on a share of the training problems of TRACE and evaluates it on the test part, or on all problems of
OTHER that TRACE does not have. Smaller shares are subsets of larger ones: the problems whose hashes are lowest. The validation
part, by which networks stop early, is the same for all shares. Finished runs in DIR are kept, so an interrupted call can be
repeated. Writes DIR/learning_curve.csv: for each share the predictor, and the baselines fitted on the same problems.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.studies import (
    add_arguments,
    digests_of,
    first_by_hash,
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
from profiler.trace.reader import Trace
from speculation.data.tasks import Task
from speculation.predictors.options import TrainingOptions

SHARES = (25, 50, 100)


def learning_curve(
    trace: Trace,
    predictors: dict[str, TrainingOptions],
    out: Path,
    *,
    shares: tuple[int, ...] = SHARES,
    other: Trace | None = None,
    task: Task = Task.NEXT_LAYER,
) -> list[dict[str, Any]]:
    """Train on each share (percent) of the training problems and evaluate on the same unseen problems; writes the CSV file.

    Args:
        trace: The trace to train on.
        predictors: Training options by the predictor's name.
        out: Folder for the runs and `learning_curve.csv`.
        shares: Percent of the training problems, each 1 to 100.
        other: Evaluate on this trace. None: on the test part of `trace`.
        task: What the predictors predict.

    Returns:
        A row per share, predictor and baseline; see `result_rows`. A baseline is listed once per share.
    """
    train_on, validate_on = (digests_of(trace, part=part) for part in ("train", "validation"))
    where, part, unseen = unseen_problems(trace, other)
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for name, options in predictors.items():
        for share in sorted(shares):
            run = trained(
                trace,
                name,
                out / "runs" / f"{name}-{share}",
                task=task,
                options=options,
                train_on=first_by_hash(train_on, share / 100),
                validate_on=validate_on,
            )
            for row in result_rows(held_out(run, where, part, unseen), run, {"share": share}):
                if row["predictor"] == name or (share, row["predictor"]) not in rows:
                    rows[share, row["predictor"]] = row
            print(f"{name}, {share} %: done{without_early_stopping(run)}", flush=True)
            write_rows(list(rows.values()), out / "learning_curve.csv")
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument(
        "--share", type=int, action="append", choices=range(1, 101), metavar="PERCENT", help="default: 25, 50, 100"
    )
    arguments = parser.parse_args()
    settings = study_settings(arguments)
    rows = learning_curve(**settings, shares=tuple(arguments.share or SHARES))
    k_name = f"recall@{settings['trace'].metadata.model.top_k}"
    shares = sorted({row["share"] for row in rows})
    by_cell = {(row["predictor"], row["share"]): row for row in rows}
    print(heading(rows, k_name) + "\n")
    names = list(dict.fromkeys(row["predictor"] for row in rows))
    header = ["predictor", *(f"{share} %: {by_cell[names[0], share]['train_problems']} problems" for share in shares)]
    print(markdown(header, ([name, *(shown(by_cell[name, share], k_name) for share in shares)] for name in names)))


if __name__ == "__main__":
    main()
