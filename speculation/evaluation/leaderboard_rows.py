"""The rows of a leaderboard: several runs next to each other, and means over the seeds of runs that differ in nothing else."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from analysis.documents.evaluation import CONTROL, Evaluation, Result
from profiler.errors import SpecmoeError


@dataclass(frozen=True, kw_only=True)
class LeaderboardRow:
    """A predictor at a horizon.

    Attributes:
        run: Name of the run, or of the baseline.
        predictor: Name of the predictor.
        horizon: h, how far ahead it predicts.
        recall: recall@K.
        low, high: The 95 % interval of `recall`.
        mass: mass@K; None if the trace has no weights, or in evaluations by older releases.
        top_1: Share of predictions whose first expert is the strongest true one; None if the strongest expert is unknown.
        exact: Share of predictions whose top K are the true set.
        calibration_error: Expected calibration error of the predicted probabilities; None if an older release left it out.
        without_looping: recall@K on problems whose output does not loop, if the trace has that column; for h = 1 only.
        control: recall@K of the predictor's shuffled control; None for baselines.
        parameters: Learned numbers.
        bytes: Size of the stored arrays.
        microseconds_per_prediction: Time of one prediction for one token at one layer.
        train_seconds: Training time; None for baselines, or if unknown.
    """

    run: str
    predictor: str
    horizon: int
    recall: float
    low: float
    high: float
    mass: float | None
    top_1: float | None
    exact: float
    calibration_error: float | None
    without_looping: float | None
    control: float | None
    parameters: int | None
    bytes: int | None
    microseconds_per_prediction: float | None
    train_seconds: float | None


@dataclass(frozen=True, kw_only=True)
class SeedSummary:
    """Runs that differ in their seed only, at a horizon.

    Attributes:
        predictor: Name of the predictor.
        horizon: h, how far ahead it predicts.
        runs: Names of the runs, one per seed.
        seeds: Their seeds, ascending.
        metrics: By name (recall@K, mass@K, top-1, exact, calibration error): the mean over the runs, the lowest, the highest.
    """

    predictor: str
    horizon: int
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    metrics: dict[str, tuple[float, float, float]]


# Fields that must be equal for two evaluations to be comparable.
COMPARED = ("task", "trace", "model", "split", "part", "problems", "tokens", "has_weights", "chance")
LOOPING = "looping"


def leaderboard_rows(documents: list[Evaluation]) -> list[LeaderboardRow]:
    """List a row per predictor and horizon, by horizon, best recall first. Baselines are listed as `labeled_results` says.

    Raises:
        SpecmoeError: There are no evaluations, they differ in task or data, or two rows would have the same name.
    """
    if not documents:
        raise SpecmoeError("a leaderboard needs at least one run")
    for document in documents:
        for name in COMPARED:
            own, first = getattr(document, name), getattr(documents[0], name)
            if own != first:
                raise SpecmoeError(
                    f"{document.run} was evaluated with {name} {own!r}, {documents[0].run} with {first!r}: expected the same"
                )
    results = list(labeled_results(documents))
    labels = [label for _, _, label, _ in results]
    for label in labels:
        if labels.count(label) > 1:
            raise SpecmoeError(f"two rows of the leaderboard would be called {label!r}: rename a run's folder")
    rows: dict[tuple[str, int], LeaderboardRow] = {}
    for document, name, label, result in results:
        if name.endswith(CONTROL):
            continue
        own = name == document.predictor
        control = document.results.get(f"{name}, {CONTROL}")
        for horizon, metrics in result.metrics.items():
            number = int(horizon.removeprefix("h="))
            # A horizon has no metrics if no token has another one that far ahead.
            if metrics:
                rows[label, number] = _row(document, result, label, number, control if own else None, own)
    return sorted(rows.values(), key=lambda row: (row.horizon, -row.recall))


def labeled_results(documents: list[Evaluation]) -> Iterator[tuple[Evaluation, str, str, Result]]:
    """All results: the evaluation, the predictor's name in it, the name that rows have, and the result.

    Rows of a run are called like the run. A baseline is listed once for all evaluations in which it has the same metrics. If it
    has others in some, because their runs were trained on other problems or predict further ahead, each of them is listed, with
    the name of its run: "popularity of RUN".
    """
    baselines = _distinct_baselines(documents)
    for number, document in enumerate(documents):
        for name, result in document.results.items():
            if name.removesuffix(f", {CONTROL}") == document.predictor:
                yield document, name, document.run + name.removeprefix(document.predictor), result
            elif number in baselines[name]:
                yield document, name, name if len(baselines[name]) == 1 else f"{name} of {document.run}", result


def _distinct_baselines(documents: list[Evaluation]) -> dict[str, dict[int, Result]]:
    """The results of each baseline that differ from each other: by the baseline's name, and the number of the evaluation.

    A run that is called like the baseline, and is the same predictor, stands for it.
    """
    found: dict[str, dict[int, Result]] = defaultdict(dict)
    runs = [number for number, document in enumerate(documents) if document.run == document.predictor]
    for number in runs:
        found[documents[number].run][number] = documents[number].results[documents[number].predictor]
    for number, document in enumerate(documents):
        for name, result in document.results.items():
            is_own = name.removesuffix(f", {CONTROL}") == document.predictor
            if is_own or any(_covers(each, result) for each in found[name].values()):
                continue
            covered = [other for other, each in found[name].items() if other not in runs and _covers(result, each)]
            for other in covered:
                del found[name][other]
            found[name][number] = result
    return found


def _covers(one: Result, other: Result) -> bool:
    """Whether one result has the metrics of the other at all of the other's horizons, and maybe at more."""
    return all(one.metrics.get(horizon) == metrics for horizon, metrics in other.metrics.items())


def _row(document: Evaluation, result: Result, label: str, horizon: int, control: Result | None, own: bool) -> LeaderboardRow:
    k_name, key = result.recall_at_k_name, f"h={horizon}"
    metrics = result.metrics[key]
    low, high = result.intervals[key][k_name]
    without_looping = result.groupings.get(LOOPING, {}).get("false", {}) if horizon == 1 else {}
    control_metrics = control.metrics.get(key) if control is not None else None
    return LeaderboardRow(
        run=label,
        predictor=document.predictor if own else label,
        horizon=horizon,
        recall=metrics[k_name],
        low=low,
        high=high,
        mass=metrics.get(document.mass_at_k_name),
        top_1=metrics.get("top-1"),
        exact=metrics["exact"],
        calibration_error=result.calibration[key].error if key in result.calibration else None,
        without_looping=without_looping.get(k_name),
        control=control_metrics[k_name] if control_metrics else None,
        parameters=result.parameters,
        bytes=result.bytes,
        microseconds_per_prediction=result.microseconds_per_prediction,
        train_seconds=document.train_seconds if own else None,
    )


def seed_summaries(documents: list[Evaluation]) -> list[SeedSummary]:
    """Mean and spread of runs that differ in their seed only, for each predictor of which there are two seeds or more.

    Such runs have the same predictor, trace, training problems, problems for early stopping, and options but for the seed. Of
    several runs with the same seed, the first counts.
    """
    alike: dict[str, dict[int, Evaluation]] = defaultdict(dict)
    for document in documents:
        if document.recipe is not None:
            recipe = document.recipe.model_dump(exclude={"seed"})
            horizons = len(document.results[document.predictor].metrics)
            alike[json.dumps([document.predictor, horizons, recipe], sort_keys=True)].setdefault(document.recipe.seed, document)
    summaries = []
    for by_seed in alike.values():
        if len(by_seed) < 2:
            continue
        seeds = sorted(by_seed)
        for horizon in by_seed[seeds[0]].results[by_seed[seeds[0]].predictor].metrics:
            rows = [_summarized(by_seed[seed], horizon) for seed in seeds]
            if not all(rows):
                continue
            values = {name: [row[name] for row in rows] for name in rows[0] if all(name in row for row in rows)}
            summaries.append(
                SeedSummary(
                    predictor=by_seed[seeds[0]].predictor,
                    horizon=int(horizon.removeprefix("h=")),
                    runs=tuple(by_seed[seed].run for seed in seeds),
                    seeds=tuple(seeds),
                    metrics={name: (sum(each) / len(each), min(each), max(each)) for name, each in values.items()},
                )
            )
    return sorted(summaries, key=lambda each: (each.horizon, -next(iter(each.metrics.values()))[0]))


def _summarized(document: Evaluation, horizon: str) -> dict[str, float]:
    """The metrics of a run that are summarized over seeds, recall@K first; empty if there was nothing to predict."""
    result = document.results[document.predictor]
    names = (document.recall_at_k_name, document.mass_at_k_name, "top-1", "exact")
    found = {name: result.metrics[horizon][name] for name in names if name in result.metrics[horizon]}
    if found and horizon in result.calibration:
        found["calibration error"] = result.calibration[horizon].error
    return found
