"""What router inputs are worth to a predictor, up to four layers ahead, and how many bytes of them buy how much recall.

    python -m benchmarks.router_inputs --out DIR [--seeds 3] [--only NAME ...]

Samples texts from the embedded demo model with vLLM on this machine (`sample_prompts`), trains predictors on routes,
on router inputs and on both, and evaluates them on the generated tokens of test prompts: all domains and each of them, also
after training on one domain only, and with reduced router inputs (`reduced_inputs`). Everything in DIR is kept, so
an interrupted call can be repeated. Writes DIR/router-inputs.csv with a row for each run, layers ahead and domain,
DIR/tables.md, and DIR/router-inputs.html with the plot. Trains for hours of one core; --seeds 1 takes a third.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.router_inputs.reduced_inputs import Kind, Reducer, Reduction, without_routes
from benchmarks.router_inputs.sample_prompts import add_arguments
from benchmarks.router_inputs.sampled_texts import Texts, load_texts
from benchmarks.router_inputs.tables import write_results
from profiler.errors import SpecmoeError
from profiler.trace.reader import Trace
from profiler.trace.writer import write_text
from speculation.data.routes import Routes, router_inputs_of
from speculation.data.tasks import Shape, targets
from speculation.evaluation.evaluate import predictions, shuffled
from speculation.evaluation.metrics import true_ranks
from speculation.predictors.base import Predictor
from speculation.predictors.options import TrainingOptions
from speculation.predictors.registry import find_predictor
from speculation.training.runs import count_parameters

Sees = Literal["routes", "inputs", "both"]
ALL = "all"
HORIZON = 4
LOGITS: tuple[Kind, ...] = ("gates", "learned")
# Of every network, by default. Their own numbers of epochs are for other amounts of data, and take hours.
EPOCHS = 2
# Larger batches than the predictors' own, which are for a twentieth of these tokens.
OPTIONS: dict[str, dict[str, Any]] = {
    "mlp": {"batch_tokens": 512, "learning_rate": 3e-3},
    "pre-attention": {"batch_tokens": 512, "learning_rate": 1e-2},
}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One training and its evaluation.

    sees: what the predictor is given. reduction: of the router inputs; None for all of them. trained_on: a domain, or all.
    epochs: of a network.
    """

    predictor: str
    sees: Sees
    reduction: Reduction | None = None
    trained_on: str = ALL
    seed: int = 0
    epochs: int = EPOCHS

    @property
    def name(self) -> str:
        """A name for its file."""
        reduction = "" if self.reduction is None else f"-{self.reduction.label}"
        return f"{self.predictor}-{self.sees}{reduction}-{self.trained_on}-{self.seed}"

    @property
    def options(self) -> TrainingOptions:
        """How it is trained."""
        defaults = find_predictor(self.predictor).defaults
        is_choice = self.predictor == "mlp" and self.sees != "routes"
        given: dict[str, Any] = {"seed": self.seed, "epochs": self.epochs, "router_inputs": is_choice}
        return replace(defaults, **given, **OPTIONS.get(self.predictor, {}))


def experiments(width: int, shape: Shape, domains: list[str], seeds: int, epochs: int = EPOCHS) -> Iterator[Experiment]:
    """All experiments, those that matter most first.

    width: D, the numbers of a router input.
    """
    for name in ("popularity", "previous-token", "conditional-counts"):
        yield Experiment(predictor=name, sees="routes")
    yield Experiment(predictor="next-gate", sees="inputs")
    main: list[tuple[str, Sees]] = [
        ("pre-attention", "inputs"),
        ("mlp", "routes"),
        ("mlp", "both"),
        ("mlp", "inputs"),
    ]
    transfer: list[tuple[str, Sees]] = [("mlp", "both"), ("mlp", "inputs"), ("mlp", "routes")]
    reduced = [each for each in reductions(width, shape) if each.numbers <= width]
    groups: list[list[Experiment]] = [
        [Experiment(predictor=name, sees=sees) for name, sees in main],
        [Experiment(predictor=name, sees="routes") for name in ("recommended-small", "recommended")],
        [Experiment(predictor="mlp", sees="both", reduction=each) for each in reduced],
        [Experiment(predictor=name, sees=sees, trained_on=domain) for domain in domains for name, sees in transfer],
    ]
    # Everything once, then the other seeds.
    for group in groups:
        yield from (replace(each, epochs=epochs) for each in group)
    for group in groups:
        yield from (replace(each, epochs=epochs, seed=seed) for seed in range(1, seeds) for each in group)


def reductions(width: int, shape: Shape) -> Iterator[Reduction]:
    """The reductions that are compared, for router inputs of `width` numbers, and the control."""
    experts = shape.experts
    yield Reduction(kind="shuffled", numbers=width)
    yield Reduction(kind="pca", numbers=16)
    yield Reduction(kind="learned", numbers=experts)
    yield Reduction(kind="learned", numbers=experts, bits=8)
    yield Reduction(kind="pca", numbers=32)
    yield Reduction(kind="gates", numbers=experts)
    yield Reduction(numbers=width, every=2)
    yield Reduction(kind="pca", numbers=8)
    yield Reduction(numbers=width, bits=8)
    yield Reduction(kind="pca", numbers=64)
    yield Reduction(kind="random", numbers=16)
    yield Reduction(kind="pca", numbers=16, bits=8)
    yield Reduction(numbers=width, every=4)
    yield Reduction(kind="random", numbers=32)
    yield from (Reduction(kind=kind, numbers=experts, bits=4) for kind in LOGITS)
    yield from (Reduction(kind=kind, numbers=experts * shape.horizon) for kind in LOGITS)
    yield from (Reduction(kind="random", numbers=size) for size in (8, 64))
    yield from (Reduction(kind="pca", numbers=size, bits=8) for size in (8, 32, 64))
    yield Reduction(kind="gates", numbers=experts, bits=8)


@dataclass(frozen=True)
class Score:
    """Sums over the generated tokens of each of P problems, for each of H layers ahead.

    problems_P: the problems' ids. examples_HP: the number of predictions. found_HP: of their true experts, those among the
    top K. exact_HP: predictions whose top K are the true set. control_HP: found experts of the shuffled control.
    """

    problems_P: npt.NDArray[np.int32]
    examples_HP: npt.NDArray[np.int64]
    found_HP: npt.NDArray[np.int64]
    exact_HP: npt.NDArray[np.int64]
    control_HP: npt.NDArray[np.int64]


def score(predictor: Predictor, seen: Routes, truth: Routes) -> Score:
    """Evaluate a predictor on the generated tokens of `truth`; prompts are its context only.

    The control compares the same predictions with the experts of other tokens, permuted at every layer.

    seen: what the predictor is given of the same tokens.
    """
    shape = predictor.shape
    control = shuffled(truth, seed=0)
    problems_P, problem_T = np.unique(truth.problem_ids_T, return_inverse=True)
    examples, found, exact, wrong = (np.zeros((shape.horizon, len(problems_P)), dtype=np.int64) for _ in range(4))
    for tokens_T, probabilities_TLHE in predictions(predictor, seen):
        for hop in range(1, shape.horizon + 1):
            true, other = (targets(routes, shape, tokens_T, hop) for routes in (truth, control))
            token_N, layer_N = np.nonzero(true.is_valid_TL & truth.is_decode_T[tokens_T, None])
            scores_NE = probabilities_TLHE[token_N, layer_N, hop - 1]
            problem_N = problem_T[tokens_T[token_N]]
            is_found_NK, is_wrong_NK = (
                true_ranks(scores_NE, each.ids_TLK[token_N, layer_N]) < shape.top_k for each in (true, other)
            )
            for sums, values_N in (
                (examples, np.ones(len(problem_N))),
                (found, is_found_NK.sum(1)),
                (exact, is_found_NK.all(1)),
                (wrong, is_wrong_NK.sum(1)),
            ):
                sums[hop - 1] += np.bincount(problem_N, values_N, len(problems_P)).astype(np.int64)
    return Score(problems_P, examples, found, exact, wrong)


def run(experiment: Experiment, texts: Texts, shape: Shape) -> dict[str, Any]:
    """Train and evaluate; returns what `tables` reads."""
    domain = None if experiment.trained_on == ALL else experiment.trained_on
    train, validation, test = texts.of("train", domain), texts.of("validation", domain), texts.of("test")
    seen = [train, validation, test]
    if experiment.reduction is not None:
        reducer = Reducer.fit(experiment.reduction, train, validation)
        seen = [reducer.routes(each) for each in seen]
    if experiment.sees == "inputs":
        seen = [without_routes(each) for each in seen]
    predictor = find_predictor(experiment.predictor)(shape)
    began = time.process_time()
    history = predictor.fit(seen[0], seen[1], experiment.options, lambda done, total, entry: None)
    seconds = time.process_time() - began
    found = score(predictor, seen[2], test)
    width = router_inputs_of(test, experiment.name).hidden_TLD.shape[2]
    whole = Reduction(numbers=0 if experiment.sees == "routes" else width)
    return {
        "predictor": experiment.predictor,
        "sees": experiment.sees,
        "reduction": "" if experiment.reduction is None else experiment.reduction.label,
        "kind": "whole" if experiment.reduction is None else experiment.reduction.kind,
        "bytes": (experiment.reduction or whole).bytes_per_layer,
        "trained_on": experiment.trained_on,
        "seed": experiment.seed,
        "train_problems": len(train.problem_ids),
        "train_tokens": int(train.is_decode_T.sum()),
        "train_seconds": round(seconds, 1),
        "epochs": len(history),
        "parameters": count_parameters(predictor.arrays()),
        "top_k": shape.top_k,
        "chance": shape.top_k / shape.experts,
        "domains": texts.domain_P[found.problems_P].tolist(),
        "examples": found.examples_HP.tolist(),
        "found": found.found_HP.tolist(),
        "exact": found.exact_HP.tolist(),
        "control": found.control_HP.tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for traces and results; finished ones are kept")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of every network (default: 3)")
    add_arguments(parser)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"of every network (default: {EPOCHS})")
    parser.add_argument("--only", action="append", metavar="TEXT", help="run experiments whose name begins so; repeatable")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    texts_of = {name: getattr(arguments, name) for name in ("texts", "new_tokens", "prompts")}
    keep_settings(arguments.out, texts_of | {"epochs": arguments.epochs})
    folder = arguments.out / "traces"
    given = [text for name, value in texts_of.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    subprocess.run([sys.executable, "-m", "benchmarks.router_inputs.sample_prompts", "--out", str(folder), *given], check=True)
    traces = [Trace.open(folder / f"seed-{seed}") for seed in range(arguments.texts)]
    texts = load_texts(traces)
    shape = Shape.of(traces[0].metadata.model, HORIZON)
    print(describe(texts), flush=True)
    run_all(texts, shape, arguments.out, seeds=arguments.seeds, epochs=arguments.epochs, only=tuple(arguments.only or ()))
    print((arguments.out / "tables.md").read_text(encoding="utf-8"))


def run_all(texts: Texts, shape: Shape, out: Path, *, seeds: int, epochs: int = EPOCHS, only: tuple[str, ...] = ()) -> None:
    """Run the experiments that have no result in `out` yet, and write the tables of all that have one.

    only: beginnings of the names of experiments to run; all if there are none.
    """
    width = router_inputs_of(texts.routes, "benchmarks.router_inputs").hidden_TLD.shape[2]
    results = out / "results"
    results.mkdir(exist_ok=True)
    for experiment in experiments(width, shape, texts.domains, seeds, epochs):
        file = results / f"{experiment.name}.json"
        if file.exists() or (only and not experiment.name.startswith(only)):
            continue
        began = time.monotonic()
        write_text(file, json.dumps(run(experiment, texts, shape)) + "\n")
        print(f"{experiment.name}: {time.monotonic() - began:.0f} s", flush=True)
    write_results([json.loads(file.read_text(encoding="utf-8")) for file in sorted(results.glob("*.json"))], out)


def keep_settings(out: Path, settings: dict[str, int]) -> None:
    """Write the settings of texts and trainings into `out`. Raises `SpecmoeError` if its traces and results are of others."""
    file = out / "settings.json"
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != settings:
        raise SpecmoeError(f"{file} names other settings than {settings}: choose another folder for --out")
    out.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(settings) + "\n")


def describe(texts: Texts) -> str:
    """One line for each part: prompts, texts and generated tokens; and how many near duplicates were left out."""
    lines = []
    for part in ("train", "validation", "test"):
        routes = texts.of(part)
        by_domain = ", ".join(f"{domain} {int(texts.of(part, domain).is_decode_T.sum()):,}" for domain in texts.domains)
        lines.append(
            f"{part}: {len(routes.problem_ids)} prompts, {len(np.unique(routes.first_T))} texts, "
            f"{int(routes.is_decode_T.sum()):,} generated tokens ({by_domain}), {len(routes):,} with those of prompts"
        )
    return "\n".join([*lines, f"{texts.dropped} near duplicates were left out"])
