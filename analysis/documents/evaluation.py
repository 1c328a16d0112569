"""The document of `specmoe evaluate`: written by `--json`, printed as a table, shown in the report."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from analysis.documents.reading import read_document
from analysis.documents.token_results import SAMPLED_PROBLEMS, PredictedProblem
from profiler.errors import first_fault

# What a run has that was trained on a rented machine, and others if they were evaluated into it.
EVALUATION_FILE = "evaluation.json"
VERSION = 2
# What is always reported, next to recall@K and, where the strongest expert is known, top-1.
OTHER_METRICS = ("exact", "any")
# How the names of metrics begin that depend on which of a token's experts is the strongest.
OF_STRONGEST = ("top-1", "hit@")
# The m of `budget_table`, as multiples of K.
BUDGET_FACTORS = (1, 1.5, 2, 3, 4)
# The end of a control's name.
CONTROL = "shuffled control"

Metrics = dict[str, float]
"""Values by the metric's name (`recall@4`, `exact`, ...); empty where there was nothing to predict."""
_GROUPS = TypeAdapter(dict[str, Metrics])


class Coverage(BaseModel):
    """Predictions that are kept at a threshold of confidence: their share, and recall@K among them."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    threshold: float
    coverage: float
    recall_at_k: float = Field(alias="recall@K")


class BudgetPoint(BaseModel):
    """What the m most likely experts cover: of the K chosen ones, of the tokens with all K among them, of the routing weight.

    mass: None if the trace has no weights.
    """

    model_config = ConfigDict(extra="forbid")

    m: int = Field(ge=1)
    recall: float
    coverage: float
    mass: float | None


class ReliabilityBin(BaseModel):
    """Predicted probabilities of one bin: their mean, the frequency with which they came true, and their number."""

    model_config = ConfigDict(extra="forbid")

    predicted: float
    observed: float
    count: int


class Calibration(BaseModel):
    """Whether predicted probabilities are right. error: expected calibration error; bins: those that are not empty."""

    model_config = ConfigDict(extra="forbid")

    error: float
    bins: list[ReliabilityBin] = []


class Result(BaseModel):
    """One predictor: metrics by horizon (`h=1`, ...), 95 % intervals of some of them, metrics by layer `[L]` or null.

    budget and calibration: by horizon. Breakdowns by groups of tokens stand under `by_` and the name of the grouping (phase,
    position, dataset, and columns of the trace that are true or false): see `groupings`. bytes: of the stored arrays. Older
    files lack the fields that have a default.
    """

    model_config = ConfigDict(extra="allow")

    metrics: dict[str, Metrics]
    recall_at_k_name: str
    intervals: dict[str, dict[str, tuple[float, float]]]
    budget: dict[str, list[BudgetPoint]] = {}
    calibration: dict[str, Calibration] = {}
    by_target_layer: dict[str, list[Metrics | None]] = {}
    precision_by_coverage: list[Coverage] = []
    parameters: int | None = None
    bytes: int | None = None
    microseconds_per_prediction: float | None = None

    @model_validator(mode="after")
    def _has_metrics_of_groups(self) -> Result:
        needed = {self.recall_at_k_name, "exact"}
        for name, value in (self.model_extra or {}).items():
            if not name.startswith("by_"):
                continue
            try:
                groups = _GROUPS.validate_python(value)
            except ValidationError as error:
                raise ValueError(f"{name}: {first_fault(error)}") from error
            for group, metrics in groups.items():
                if metrics and (missing := needed - metrics.keys()):
                    raise ValueError(f"{name}: {group} lacks {min(missing)}")
        return self

    @property
    def groupings(self) -> dict[str, dict[str, Metrics]]:
        """Metrics of the nearest horizon by group, for each grouping by name."""
        found = {}
        for name, value in (self.model_extra or {}).items():
            if name.startswith("by_"):
                found[name.removeprefix("by_")] = cast("dict[str, Metrics]", value)
        return found


class Recipe(BaseModel):
    """How a run was trained: runs with equal recipes but for the seed differ in nothing else.

    options: the training options, without the seed. trained_on, validated_on: SHA-256 of the digests of the problems; the
    second is None without early stopping, or if unknown. trace_sha256: of the manifest of the trace that it was trained on;
    validation_sha256: of another trace for early stopping; None if there is none, or if unknown. A version of the software is
    not part of it.
    """

    model_config = ConfigDict(extra="forbid")

    seed: int
    options: dict[str, Any]
    trained_on: str
    validated_on: str | None
    trace_sha256: str | None = None
    validation_sha256: str | None = None


class Evaluation(BaseModel):
    """An evaluation: its data, chance, and the results of predictors by name. `predictor` is the run's own among them.

    trained_on: problems of these that the run was trained on; 0 if all are held out. early_stopping: whether training chose its
    last epoch by exactly these problems (known of newer runs only). train_seconds: None if unknown.
    has_weights: whether the trace has routing weights; without them, metrics that depend on weights, or on which expert is
    the strongest, are absent. recipe: None if unknown. sample: what the run's own predictor predicted at the nearest horizon
    for some problems, token by token; empty unless requested. Older files lack the fields that have a default.
    """

    version: int = VERSION
    run: str
    predictor: str = ""
    task: str
    trace: str
    model: str = ""
    split: str
    part: str
    problems: int
    trained_on: int = 0
    early_stopping: bool = False
    tokens: int
    has_weights: bool = True
    definitions: dict[str, str] = {}
    caveats: list[str] = []
    recipe: Recipe | None = None
    train_seconds: float | None = None
    chance: Metrics
    results: dict[str, Result]
    sample: list[PredictedProblem] = Field(default=[], max_length=SAMPLED_PROBLEMS)

    @model_validator(mode="before")
    @classmethod
    def _of_any_version(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        # The first documents did not state their version.
        version = data.get("version", 1)
        if isinstance(version, int) and version > VERSION:
            raise ValueError(f"version {version}: this release reads versions up to {VERSION}, update it")
        return _from_version_1(data) if version == 1 else data

    @model_validator(mode="after")
    def _can_be_shown(self) -> Evaluation:
        if all(name.endswith(CONTROL) for name in self.results):
            raise ValueError("results: expected those of at least one predictor")
        if self.predictor and self.predictor not in self.results:
            raise ValueError(f"results: those of the predictor {self.predictor!r} are missing")
        first, k_name = next(iter(self.results.values())), self.recall_at_k_name
        needed = {k_name, *OTHER_METRICS, *(("top-1",) if self.knows_strongest else ())}
        if missing := needed - self.chance.keys():
            raise ValueError(f"chance lacks {min(missing)}")
        if first.metrics.keys() != {f"h={hop}" for hop in range(1, max(1, len(first.metrics)) + 1)}:
            raise ValueError(f"results: metrics of {', '.join(first.metrics) or 'nothing'}, expected of h=1, h=2, ...")
        for name, result in self.results.items():
            if (result.recall_at_k_name, result.metrics.keys()) != (k_name, first.metrics.keys()):
                raise ValueError(f"results: {name} has another K, or other horizons, than {next(iter(self.results))}")
            for horizon, metrics in result.metrics.items():
                # There may be nothing so far ahead.
                if (metrics or horizon == "h=1") and (missing := needed - metrics.keys()):
                    raise ValueError(f"results: {name} lacks {min(missing)} for {horizon}")
                if metrics and k_name not in result.intervals.get(horizon, {}):
                    raise ValueError(f"results: {name} lacks intervals of {k_name} for {horizon}")
        for horizon in first.metrics:
            sizes = {tuple(point.m for point in result.budget.get(horizon, [])) for result in self.results.values()}
            if len(sizes - {()}) > 1:
                raise ValueError(f"results: budget curves for {horizon} with different m, expected the same of all predictors")
        return self

    @property
    def held_out(self) -> str:
        """Whether the problems were held out, in words."""
        if self.trained_on:
            return f"not held out (the run was trained on {self.trained_on} of these problems)"
        if self.early_stopping:
            return "not trained on, but the last epoch of training was chosen by these problems"
        return "held out"

    @property
    def knows_strongest(self) -> bool:
        """Whether it is known which of a token's experts is the strongest: with weights, or if there is only one."""
        return self.has_weights or self.recall_at_k_name == "recall@1"

    @property
    def recall_at_k_name(self) -> str:
        """`recall@4` for a model with four experts per token."""
        return next(iter(self.results.values())).recall_at_k_name

    @property
    def mass_at_k_name(self) -> str:
        """`mass@4` for a model with four experts per token; without weights, no result has this metric."""
        return self.recall_at_k_name.replace("recall", "mass")

    def to_json(self) -> str:
        """The file's content."""
        return self.model_dump_json(indent=1, by_alias=True) + "\n"


def read_evaluation(path: Path) -> Evaluation:
    """An evaluation's file, or that of a run's folder. Raises `TraceError` if the file is not an evaluation."""
    return read_document(path, Evaluation, EVALUATION_FILE, "specmoe evaluate RUN --trace T --json FILE")


def _from_version_1(data: dict[str, Any]) -> dict[str, Any]:
    """A document of version 1 as one of version 2. Without weights, it had metrics that depended on the order of its source."""
    results = copy.deepcopy(data.get("results"))
    if not isinstance(results, dict) or not all(isinstance(result, dict) for result in results.values()):
        return data
    for result in results.values():
        error = result.pop("calibration_error", None)
        if error is not None:
            result["calibration"] = {"h=1": {"error": error}}
    caveats = data.get("caveats")
    has_weights = not (isinstance(caveats, list) and any(str(line).startswith("no weights were recorded") for line in caveats))
    data = data | {"version": VERSION, "has_weights": has_weights, "results": results}
    has_one = any(result.get("recall_at_k_name") == "recall@1" for result in results.values())
    return data if has_weights or has_one else _without_order(data)


def _without_order(value: Any) -> Any:
    """JSON without the entries, at any depth, whose names are of metrics of the strongest expert."""
    if isinstance(value, dict):
        return {name: _without_order(each) for name, each in value.items() if not name.startswith(OF_STRONGEST)}
    return [_without_order(each) for each in value] if isinstance(value, list) else value


def table(evaluation: Evaluation, horizon: int = 1) -> list[dict[str, str]]:
    """The evaluation as rows of text, chance first; recall@K with its 95 % interval over problems.

    top-1 is left out if the strongest expert is unknown.
    """
    k_name = evaluation.recall_at_k_name
    columns = (k_name, *(("top-1",) if evaluation.knows_strongest else ()), *OTHER_METRICS)
    rows = [{"predictor": "chance"} | {name: f"{evaluation.chance[name]:.3f}" for name in columns}]
    for name, result in evaluation.results.items():
        metrics = result.metrics[f"h={horizon}"]
        if not metrics:
            # Nothing so far ahead in these tokens.
            continue
        row = {"predictor": name} | {column: f"{metrics[column]:.3f}" for column in columns}
        low, high = result.intervals[f"h={horizon}"][k_name]
        row[k_name] += f" ({low:.3f}-{high:.3f})"
        rows.append(row)
    return rows


def budget_table(evaluation: Evaluation, horizon: int = 1) -> list[dict[str, str]]:
    """What the m most likely experts cover, as rows of text: recall@m for some m from K up (columns `@m`), mass@K, mass@2K.

    ECE: the expected calibration error. Empty if an older release wrote the evaluation. Columns of weights are left out if the
    trace has none.
    """
    key = f"h={horizon}"
    own = evaluation.results[evaluation.predictor].budget.get(key) if evaluation.predictor in evaluation.results else None
    if not own:
        return []
    top_k, experts = own[0].m, own[-1].m
    multiples = {round(top_k * factor) for factor in BUDGET_FACTORS}
    shown = [point.m for point in own if point.m in multiples and point.m < experts]
    masses = [m for m in shown if m in {top_k, 2 * top_k}] if evaluation.has_weights else []
    by_chance = {f"{what}@{m}": f"{m / experts:.3f}" for what, numbers in (("", shown), ("mass", masses)) for m in numbers}
    rows = [{"predictor": "chance"} | by_chance | {"ECE": "-"}]
    for name, result in evaluation.results.items():
        points = {point.m: point for point in result.budget.get(key, [])}
        if not points:
            continue
        row = {"predictor": CONTROL if name.endswith(CONTROL) else name}
        row |= {f"@{m}": f"{points[m].recall:.3f}" for m in shown}
        row |= {f"mass@{m}": _shown(points[m].mass) for m in masses}
        calibration = result.calibration.get(key)
        rows.append(row | {"ECE": _shown(None if calibration is None else calibration.error)})
    return rows


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
