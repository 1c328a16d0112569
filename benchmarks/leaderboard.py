"""Train every predictor on one trace, evaluate them on another, and write the leaderboard.

    python -m benchmarks.leaderboard TRACE --validation OTHER --out DIR [--only NAME ...]

Finished runs in DIR are kept, so an interrupted call can be continued. Training of the larger networks is shortened (SHORT) to
about five minutes each on two cores, far less than they need. The whole benchmark takes more than an hour.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis.documents.evaluation import Evaluation
from profiler.trace.reader import Trace
from profiler.trace.schema import HIDDEN_FOLDER
from speculation.data.tasks import Task
from speculation.evaluation.evaluate import evaluate
from speculation.evaluation.leaderboard import write_leaderboard
from speculation.predictors.registry import predictor_classes
from speculation.training.fit import train

SHORT: dict[str, dict[str, Any]] = {
    "mlp": {"epochs": 3},
    "interlayer-lstm": {"epochs": 1},
    "ensemble": {"epochs": 2},
    "hierarchical": {"epochs": 1},
    "attention-graph": {"epochs": 1, "epoch_tokens": 70_000},
    "hybrid": {"epochs": 2},
    "transformer": {"epochs": 1, "epoch_tokens": 35_000},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--validation", type=Path, required=True, help="another trace, for early stopping and evaluation")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", action="append", choices=list(predictor_classes()))
    arguments = parser.parse_args()
    trace, validation = Trace.open(arguments.trace), Trace.open(arguments.validation)
    arguments.out.mkdir(parents=True, exist_ok=True)
    documents: list[Evaluation] = []
    evaluated: set[Any] = set()
    for name, cls in predictor_classes().items():
        if Task.NEXT_LAYER not in cls.tasks or (arguments.only and name not in arguments.only):
            continue
        if cls.needs_router_inputs and not (trace.path / HIDDEN_FOLDER).is_dir():
            print(f"{name}: skipped, because {trace.path.name} has no router inputs")
            continue
        began = time.perf_counter()
        out = arguments.out / name
        options = replace(cls.defaults, **SHORT.get(name, {}))
        run = train(trace, name, out, validation=validation, options=options, resume=out.exists())
        documents.append(evaluate(run, validation, part="all", with_baselines=run.baselines_from not in evaluated))
        evaluated.add(run.baselines_from)
        write_leaderboard(documents, arguments.out)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    print((arguments.out / "leaderboard.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
