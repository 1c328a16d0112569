"""Judge predictors on problems that they were not trained on, beside chance, the baselines and a shuffled control."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.errors import TraceError
from profiler.reader import Trace
from profiler.splits import split_key
from speculation.metrics import DEFINITIONS, ConfidenceCounts, RankCounts, chance, true_ranks
from speculation.predictors import Predictor, Shape
from speculation.routes import Routes, load_routes
from speculation.runs import Run, count_parameters, manifest_sha256

TOKENS_PER_CHUNK = 2048
# Lower ends of the reported ranges of positions in the sequence.
POSITION_STARTS = (0, 16, 64, 256, 1024)
BOOTSTRAPS = 1000
TIMED_PREDICTIONS = 200


@dataclass(frozen=True)
class Evaluation:
    """One predictor's results: `metrics` by horizon (`h=1`, ...), and breakdowns, as plain values for JSON."""

    name: str
    metrics: dict[str, dict[str, float]]
    details: dict[str, Any]


def evaluate(run: Run, trace: Trace, *, part: str = "test", seed: int = 0) -> dict[str, Any]:
    """Evaluate the run's predictor and its baselines on one part of the split of `trace`.

    The shuffled control scores the predictor against the routes of other, randomly chosen tokens at the same layer: it
    must fall to popularity or below, or the evaluation leaks. Raises `TraceError` if the trace's model has another shape,
    or if it cannot be told which of its problems the run was trained on.
    """
    shape = run.predictor.shape
    _check_split(run, trace)
    if Shape.of(trace.metadata.model, shape.horizon) != shape:
        raise TraceError(f"{trace.path}: its model has another number of layers, experts or top-k than {run.path} ({shape})")
    routes = load_routes(trace, part)
    predictors = {name: baseline for name, baseline in run.baselines.items() if name != run.name}
    predictors[run.name] = run.predictor
    evaluations = [_judge(name, predictor, routes) for name, predictor in predictors.items()]
    evaluations.append(_judge(f"{run.name}, shuffled control", run.predictor, _shuffled_targets(routes, seed), routes))
    by_chance = chance(shape.experts, shape.top_k)
    return {
        "run": run.path.name,
        "predictor": run.name,
        "task": run.task,
        "trace": trace.path.name,
        "model": trace.metadata.model.id,
        "split": f"by problem (hash of the {run.split})",
        "part": part,
        "problems": routes.num_problems,
        "tokens": len(routes),
        "definitions": DEFINITIONS,
        "caveats": trace.caveats(),
        "chance": by_chance,
        "results": {evaluation.name: {"metrics": evaluation.metrics, **evaluation.details} for evaluation in evaluations},
    }


def _check_split(run: Run, trace: Trace) -> None:
    """Sides must be comparable: prompts are, everywhere; numbers of problems are within one trace only."""
    if split_key(trace) != run.split:
        raise TraceError(
            f"{run.path} was trained on a split by {run.split}, and {trace.path} can only be split by {split_key(trace)}: "
            "training problems could not be told apart"
        )
    if run.split in {"problem id", "source key"} and manifest_sha256(trace) != run.trace_sha256:
        raise TraceError(f"{trace.path} has no prompts and is not the trace that {run.path} was trained on: expected that one")


def _judge(name: str, predictor: Predictor, truth: Routes, seen: Routes | None = None) -> Evaluation:
    """seen: what the predictor is shown, if that differs from the truth (the shuffled control)."""
    shape = predictor.shape
    by_layer = [[RankCounts(shape.experts, shape.top_k) for _ in range(shape.layers)] for _ in range(shape.horizon)]
    by_phase = {"prefill": RankCounts(shape.experts, shape.top_k), "decode": RankCounts(shape.experts, shape.top_k)}
    by_position = [RankCounts(shape.experts, shape.top_k) for _ in POSITION_STARTS]
    confidence = ConfidenceCounts()
    problem_ids, problem_T = np.unique(truth.problem_ids_T, return_inverse=True)
    hits_HP = np.zeros((shape.horizon, len(problem_ids)))
    examples_HP = np.zeros((shape.horizon, len(problem_ids)))
    for start in range(0, len(truth), TOKENS_PER_CHUNK):
        tokens = slice(start, min(start + TOKENS_PER_CHUNK, len(truth)))
        probabilities_TLHE = predictor.probabilities(seen or truth, tokens)
        position_T = np.searchsorted(POSITION_STARTS, truth.token_ids_T[tokens], side="right") - 1
        is_decode_T = truth.is_decode_T[tokens]
        for hop in range(1, shape.horizon + 1):
            for layer in range(shape.layers - hop):
                true_TK = truth.expert_ids_TLK[tokens, layer + hop]
                scores_TE = probabilities_TLHE[:, layer, hop - 1]
                ranks_TK = true_ranks(scores_TE, true_TK)
                by_layer[hop - 1][layer + hop].add(ranks_TK)
                hits_T = (ranks_TK < shape.top_k).mean(1)
                hits_HP[hop - 1] += np.bincount(problem_T[tokens], hits_T, len(problem_ids))
                examples_HP[hop - 1] += np.bincount(problem_T[tokens], minlength=len(problem_ids))
                if hop == 1:
                    confidence.add(scores_TE, true_TK, ranks_TK)
                    by_phase["prefill"].add(ranks_TK[~is_decode_T])
                    by_phase["decode"].add(ranks_TK[is_decode_T])
                    for bucket, counts in enumerate(by_position):
                        counts.add(ranks_TK[position_T == bucket])
    metrics, per_layer, intervals = {}, {}, {}
    for hop, layers in enumerate(by_layer, start=1):
        total = RankCounts(shape.experts, shape.top_k)
        for counts in layers:
            total.merge(counts)
        metrics[f"h={hop}"] = total.metrics()
        per_layer[f"h={hop}"] = [counts.metrics() or None for counts in layers]
        intervals[f"h={hop}"] = _bootstrap(hits_HP[hop - 1], examples_HP[hop - 1])
    details = {
        "recall_at_k_name": f"recall@{shape.top_k}",
        "interval_over_problems": intervals,
        "by_target_layer": per_layer,
        "by_phase": {phase: counts.metrics() for phase, counts in by_phase.items()},
        "by_position": {f"from {first}": c.metrics() for first, c in zip(POSITION_STARTS, by_position, strict=True)},
        "calibration_error": confidence.calibration_error(),
        "precision_by_coverage": confidence.precision_by_coverage(),
        "parameters": count_parameters(predictor.arrays()),
        "bytes": int(sum(array.nbytes for array in predictor.arrays().values())),
        "microseconds_per_token": _microseconds_per_token(predictor, seen or truth),
    }
    return Evaluation(name, metrics, details)


def _bootstrap(hits_P: npt.NDArray[np.float64], examples_P: npt.NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of recall@K, resampling problems with replacement."""
    drawn = np.random.default_rng(0).integers(len(hits_P), size=(BOOTSTRAPS, len(hits_P)))
    recalls = hits_P[drawn].sum(1) / examples_P[drawn].sum(1)
    low, high = np.quantile(recalls, [0.025, 0.975])
    return float(low), float(high)


def _microseconds_per_token(predictor: Predictor, routes: Routes) -> float:
    """Median time to predict all layers and horizons of one token, one token at a time, on this machine."""
    times = []
    for token in range(min(TIMED_PREDICTIONS, len(routes))):
        began = time.perf_counter()
        predictor.probabilities(routes, slice(token, token + 1))
        times.append(time.perf_counter() - began)
    return round(float(np.median(times)) * 1e6, 1)


def _shuffled_targets(routes: Routes, seed: int) -> Routes:
    """The same tokens with, layer by layer, the routes of other tokens."""
    random = np.random.default_rng(seed)
    ids_TLK = np.stack(
        [routes.expert_ids_TLK[random.permutation(len(routes)), layer] for layer in range(routes.expert_ids_TLK.shape[1])],
        axis=1,
    )
    return Routes(**{**vars(routes), "expert_ids_TLK": ids_TLK})
