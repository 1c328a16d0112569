"""Evaluate predictors on held-out problems, compared with chance, the baselines and a shuffled control."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from threadpoolctl import threadpool_limits

from analysis.counts.answers import spread, window_of
from analysis.documents.evaluation import (
    CONTROL,
    BudgetPoint,
    Calibration,
    Coverage,
    Evaluation,
    Recipe,
    ReliabilityBin,
    Result,
)
from analysis.documents.token_results import SAMPLED_PROBLEMS, PredictedProblem
from profiler.errors import SpecmoeError, TraceError
from profiler.trace.reader import Trace
from profiler.trace.splits import all_digests, split_key
from speculation.data.history import History
from speculation.data.repeats import UNKNOWN_TOKEN
from speculation.data.routes import Routes, load_routes, route_digests
from speculation.data.tasks import Task, targets
from speculation.evaluation.metrics import ConfidenceCounts, ProblemSums, RankCounts, chance, definitions, true_ranks
from speculation.predictors.base import Predictor
from speculation.training.runs import Run, count_parameters, manifest_sha256, problems_sha256

# Bounds the memory of one chunk of predicted probabilities.
CHUNK_BYTES = 32 << 20
# Lower ends of the reported ranges of positions in the sequence.
POSITION_STARTS = (0, 16, 64, 256, 1024)
PHASES = ("prefill", "decode")
TIMED_TOKENS = 12


@dataclass(frozen=True)
class Groups:
    """A grouping of tokens: the names of the groups, and `group_T` `[T]`, the index of each token's group or -1 for none."""

    names: tuple[str, ...]
    group_T: npt.NDArray[np.int64]


def evaluate(
    run: Run,
    trace: Trace,
    *,
    part: str = "test",
    without: npt.NDArray[np.uint64] | None = None,
    seed: int = 0,
    with_baselines: bool = True,
    with_sample: bool = False,
) -> Evaluation:
    """Evaluate a run's predictor and its baselines on one part of a trace's split.

    The shuffled control scores the predictions against the routes of other, randomly chosen tokens at the same layer. It should
    fall to about popularity, or the evaluation leaks. It can stay above if the popular experts of these problems are others
    than in training, because it follows the load of these problems. For a trace without routing weights, metrics that depend on
    them, or on which expert is the strongest, are left out.

    Args:
        run: A trained run.
        trace: The trace to evaluate on.
        part: Part of the split by problem: `test`, `validation`, `train` or `all`.
        without: Leave out problems with these digests (see `route_digests`).
        seed: Random seed of the shuffled control.
        with_baselines: Also evaluate the run's baselines.
        with_sample: Also list what was predicted for some problems, token by token, for the report of `specmoe analyze`.

    Returns:
        Metrics by predictor and horizon, 0 to 1 (`results[name].metrics["h=1"]["recall@2"]`), with intervals over problems, and
        chance.

    Raises:
        TraceError: The trace's model has other sizes than the run's, or the trace does not say which of its problems the run
            was trained on, or all problems of the part are too short for the task.
        SpecmoeError: The run is of the task `reuse`, which predicts no experts that could be compared with those chosen.

    Example:
        >>> from pathlib import Path
        >>> from profiler import Trace
        >>> from speculation import evaluate, load_run
        >>> found = evaluate(load_run(Path("runs/counts")), Trace.open("traces/math"))
        >>> found.results["counts"].metrics["h=1"]
    """
    shape = run.predictor.shape
    if not shape.task.predicts_experts:
        raise SpecmoeError(
            f"{run.path} predicts when experts are used again, not which are chosen: to see what a cache gains by it, simulate "
            "one with this run as its policy"
        )
    check_run(run, trace)
    routes = load_routes(trace, part, router_inputs=run.predictor.takes_router_inputs, without=without)
    groups = token_groups(trace, routes)
    has_weights = trace.metadata.record.weights
    predictors = {name: baseline for name, baseline in run.baselines.items() if with_baselines and name != run.name}
    predictors[run.name] = run.predictor
    results = {
        name: evaluate_predictor(predictor, routes, groups, has_weights=has_weights) for name, predictor in predictors.items()
    }
    results[f"{run.name}, {CONTROL}"] = evaluate_predictor(
        run.predictor, shuffled(routes, seed), groups, routes, has_weights=has_weights
    )
    digests = route_digests(trace, routes)
    return Evaluation(
        run=run.path.name,
        predictor=run.name,
        task=str(shape.task),
        trace=trace.path.name,
        model=trace.metadata.model.id,
        split=f"by problem (hash of the {run.split})",
        part=part,
        problems=len(routes.problem_ids),
        trained_on=int(np.isin(digests, run.trained_on).sum()),
        early_stopping=problems_sha256(digests) == run.facts.validated_on,
        tokens=len(routes),
        has_weights=has_weights,
        definitions=definitions(shape.top_k, has_weights=has_weights),
        caveats=trace.caveats(),
        recipe=recipe(run),
        train_seconds=run.facts.train_seconds,
        chance=chance(shape.experts, shape.top_k, has_weights=has_weights),
        results=results,
        sample=predicted_sample(run.predictor, trace, routes, groups) if with_sample else [],
    )


def predicted_sample(predictor: Predictor, trace: Trace, routes: Routes, groups: dict[str, Groups]) -> list[PredictedProblem]:
    """The K most probable experts of each token at the nearest horizon, for some problems of every dataset.

    Of a long problem, these are the tokens that the report shows. groups: of `token_groups`.
    """
    shape = predictor.shape
    digests = all_digests(trace)
    chosen = routes.of_problems(np.isin(routes.problem_ids_T, sampled_problems(routes, groups)))
    ids_TLK = np.zeros((len(chosen), shape.layers, shape.top_k), dtype=np.int64)
    is_known_TL = np.zeros((len(chosen), shape.layers), dtype=np.bool_)
    for tokens_T, probabilities_TLHE in predictions(predictor, chosen):
        true = targets(chosen, shape, tokens_T, 1)
        token_N, layer_N = np.nonzero(true.is_valid_TL)
        best_NK = np.argsort(-probabilities_TLHE[token_N, layer_N, 0], axis=1, kind="stable")[:, : shape.top_k]
        at = true.tokens_T[token_N], shape.target_layers(1)[layer_N]
        ids_TLK[at], is_known_TL[at] = best_NK, True
    found = []
    for problem in chosen.problem_ids.tolist():
        rows_T = np.flatnonzero(chosen.problem_ids_T == problem)
        shown_T = rows_T[window_of(chosen.is_decode_T[rows_T])]
        found.append(PredictedProblem.of(digests[problem], chosen.token_ids_T[shown_T], ids_TLK[shown_T], is_known_TL[shown_T]))
    return found


def sampled_problems(routes: Routes, groups: dict[str, Groups]) -> list[int]:
    """The problems whose results are listed token by token, some of every dataset."""
    ids_P, first_P = np.unique(routes.problem_ids_T, return_index=True)
    datasets = groups.get("dataset")
    names = [""] * len(ids_P) if datasets is None else [datasets.names[code] for code in datasets.group_T[first_P]]
    return spread(ids_P.tolist(), names, SAMPLED_PROBLEMS)


def recipe(run: Run) -> Recipe:
    """How a run was trained, without what every run has of its own."""
    options = {name: value for name, value in run.options.items() if name != "seed"}
    return Recipe(
        seed=run.options["seed"],
        options=options,
        trained_on=problems_sha256(run.trained_on),
        validated_on=run.facts.validated_on,
        trace_sha256=run.trace_sha256,
        validation_sha256=run.facts.validation_sha256,
    )


def check_run(run: Run, trace: Trace) -> None:
    """Check that a run can be evaluated on a trace.

    Splits by prompt are comparable between traces. Splits by problem id or source key are comparable only within one trace.

    Raises:
        TraceError: The trace's model has other sizes than the run's, or their splits are not comparable.
    """
    shape = run.predictor.shape
    shape.check(trace.metadata, trace.path, run.path)
    if split_key(trace) != run.split:
        raise TraceError(
            f"{run.path} was trained on a split by {run.split}, and {trace.path} can only be split by {split_key(trace)}: "
            "which of its problems are training problems is unknown"
        )
    if run.split in {"problem id", "source key"} and manifest_sha256(trace) != run.trace_sha256:
        raise TraceError(f"{trace.path} has no prompts and is not the trace that {run.path} was trained on: use that one")


def token_groups(trace: Trace, routes: Routes) -> dict[str, Groups]:
    """Group tokens by phase, position, dataset, and every boolean column of `problems.parquet`, such as `looping`."""
    position_T = np.searchsorted(POSITION_STARTS, routes.token_ids_T, side="right") - 1
    groups = {
        "phase": Groups(PHASES, routes.is_decode_T.astype(np.int64)),
        "position": Groups(tuple(f"from {first}" for first in POSITION_STARTS), position_T),
    }
    if not trace.has_problems:
        return groups
    problems = trace.problems
    ids_P = problems.column("problem_id").to_numpy()
    order_P = np.argsort(ids_P, kind="stable")
    row_T = order_P[np.minimum(np.searchsorted(ids_P, routes.problem_ids_T, sorter=order_P), len(ids_P) - 1)]
    is_known_T = ids_P[row_T] == routes.problem_ids_T
    columns = ["dataset", *(field.name for field in problems.schema if pa.types.is_boolean(field.type))]
    for name in columns:
        coded = problems.column(name).cast(pa.string()).combine_chunks().dictionary_encode()
        code_P = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        groups[name] = Groups(tuple(coded.dictionary.to_pylist()), np.where(is_known_T, code_P[row_T], -1))
    return groups


def evaluate_predictor(
    predictor: Predictor, truth: Routes, groups: dict[str, Groups], seen: Routes | None = None, *, has_weights: bool = True
) -> Result:
    """Compute all metrics of one predictor by horizon (`h=1`, ...), and its breakdowns.

    Args:
        predictor: A fitted predictor.
        truth: Routes to predict.
        groups: Groupings of the tokens of `truth`, by name.
        seen: Routes that the predictor conditions on. Default: `truth`. For the shuffled control, they differ.
        has_weights: Whether the routing weights of `truth` were recorded, so that metrics may depend on them.

    Raises:
        SpecmoeError: A predicted probability is not finite.
        TraceError: There is nothing to predict at some horizon: all problems are too short.
    """
    shape, seen = predictor.shape, seen or truth
    experts, top_k, hops = shape.experts, shape.top_k, range(1, shape.horizon + 1)
    by_layer = {hop: RankCounts(experts, top_k, shape.layers, has_weights=has_weights) for hop in hops}
    by_group = {name: RankCounts(experts, top_k, len(each.names), has_weights=has_weights) for name, each in groups.items()}
    confidence = {hop: ConfidenceCounts() for hop in hops}
    problem_T = np.unique(truth.problem_ids_T, return_inverse=True)[1]
    sums = {hop: ProblemSums(top_k, int(problem_T.max()) + 1, has_weights=has_weights) for hop in hops}
    for tokens_T, probabilities_TLHE in predictions(predictor, seen):
        for hop in hops:
            true = targets(truth, shape, tokens_T, hop)
            token_N, layer_N = np.nonzero(true.is_valid_TL)
            scores_NE = probabilities_TLHE[token_N, layer_N, hop - 1]
            if not np.isfinite(scores_NE).all():
                raise SpecmoeError(
                    f"{predictor.name} predicts NaN or infinity: its training diverged, or its inputs differ from training"
                )
            true_NK, target_N, target_layer_N = (
                true.ids_TLK[token_N, layer_N], true.tokens_T[token_N], shape.target_layers(hop)[layer_N]
            )  # fmt: skip
            weights_NK = truth.weights_TLK[target_N, target_layer_N] if has_weights else None
            ranks_NK = true_ranks(scores_NE, true_NK)
            by_layer[hop].add(ranks_NK, weights_NK, target_layer_N)
            sums[hop].add(ranks_NK, weights_NK, problem_T[tokens_T[token_N]])
            confidence[hop].add(scores_NE, true_NK, ranks_NK)
            if hop == 1:
                for name, group in groups.items():
                    group_N = group.group_T[target_N]
                    in_N = group_N >= 0
                    by_group[name].add(ranks_NK[in_N], None if weights_NK is None else weights_NK[in_N], group_N[in_N])
    for hop, counts in by_layer.items():
        if not counts.metrics():
            raise TraceError(
                f"no problem of this part has a token {hop} after another one, so {shape.task} has nothing to predict there: "
                "choose a smaller horizon, or a trace of longer problems"
            )
    arrays = predictor.arrays()
    breakdowns = {
        f"by_{name}": {each: by_group[name].metrics(number) for number, each in enumerate(group.names)}
        for name, group in groups.items()
    }
    return Result(
        metrics={f"h={hop}": counts.metrics() for hop, counts in by_layer.items()},
        recall_at_k_name=f"recall@{top_k}",
        intervals={f"h={hop}": each.intervals() for hop, each in sums.items()},
        budget={f"h={hop}": [BudgetPoint.model_validate(p) for p in counts.budget()] for hop, counts in by_layer.items()},
        calibration={f"h={hop}": _calibration(each) for hop, each in confidence.items()},
        by_target_layer={
            f"h={hop}": [counts.metrics(layer) or None for layer in range(shape.layers)] for hop, counts in by_layer.items()
        },
        precision_by_coverage=[Coverage.model_validate(each) for each in confidence[1].precision_by_coverage()],
        parameters=count_parameters(arrays),
        bytes=int(sum(array.nbytes for array in arrays.values())),
        microseconds_per_prediction=microseconds_per_prediction(predictor, truth),
        **breakdowns,
    )


def _calibration(counts: ConfidenceCounts) -> Calibration:
    bins = [ReliabilityBin.model_validate(each) for each in counts.reliability()]
    return Calibration(error=counts.calibration_error(), bins=bins)


def predictions(predictor: Predictor, routes: Routes) -> Iterable[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Predict chunk by chunk: yields the indices of tokens `[T]` and their probabilities `[T, L, H, E]`."""
    shape = predictor.shape
    size = max(1, CHUNK_BYTES // (4 * shape.layers * shape.horizon * shape.experts))
    for start in range(0, len(routes), size):
        tokens = slice(start, min(start + size, len(routes)))
        yield np.arange(tokens.start, tokens.stop), predictor.probabilities(routes, tokens)


def microseconds_per_prediction(predictor: Predictor, routes: Routes) -> float:
    """Time of one prediction for one token at one layer, in microseconds: batch size 1, on one CPU thread or on the GPU.

    It is a mean over the first tokens of the longest unbroken sequence, without the first one, if there are others. It covers
    `predict` and the history's `begin`. For tasks that predict all layers at once, the time of a call is divided by L.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            return round(1e6 * _seconds_per_prediction(predictor, routes), 1)
    finally:
        torch.set_num_threads(threads)


def _seconds_per_prediction(predictor: Predictor, routes: Routes) -> float:
    shape = predictor.shape
    first = int(routes.first_T[np.argmax(np.arange(len(routes)) - routes.first_T)])
    history = History(shape, int(routes.token_ids_T[first]))
    before_first_layer = shape.task in {Task.WHOLE_PATH, Task.REUSE}
    predicted, seconds = 0, 0.0
    for token in range(first, min(first + TIMED_TOKENS, len(routes))):
        if routes.first_T[token] != first:
            break
        began = time.perf_counter()
        key = int(routes.token_keys_T[token])
        history.begin(None if key == UNKNOWN_TOKEN else key, is_decode=bool(routes.is_decode_T[token]))
        took = time.perf_counter() - began
        for layer in range(shape.layers):
            if before_first_layer and layer == 0:
                took += _time_of(predictor, history)
            router_input = None if routes.router is None else routes.router.hidden_TLD[token, layer]
            history.add(routes.expert_ids_TLK[token, layer], routes.weights_TLK[token, layer], router_input)
            can_predict = layer < shape.layers - 1 if shape.task == Task.NEXT_LAYER else layer == shape.layers - 1
            if can_predict and not before_first_layer:
                took += _time_of(predictor, history)
        is_only = token + 1 == len(routes) or routes.first_T[token + 1] != first
        if token > first or is_only:
            predicted += shape.layers - (shape.task == Task.NEXT_LAYER)
            seconds += took
    return seconds / max(predicted, 1)


def _time_of(predictor: Predictor, history: History) -> float:
    began = time.perf_counter()
    predictor.predict(history)
    return time.perf_counter() - began


def shuffled(routes: Routes, seed: int) -> Routes:
    """The same tokens with the experts of other tokens and their weights, permuted separately at every layer."""
    random = np.random.default_rng(seed)
    orders = [random.permutation(len(routes)) for _ in range(routes.expert_ids_TLK.shape[1])]
    ids_TLK, weights_TLK = (
        np.stack([array_TLK[order_T, layer] for layer, order_T in enumerate(orders)], axis=1)
        for array_TLK in (routes.expert_ids_TLK, routes.weights_TLK)
    )
    return replace(routes, expert_ids_TLK=ids_TLK, weights_TLK=weights_TLK)
