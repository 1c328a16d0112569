"""The document of `specmoe evaluate`: written by `--json`, printed as a table, shown in the report."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from analysis.documents.reading import read_document

# What a run has that was trained on a rented machine, and others if they were evaluated into it.
EVALUATION_FILE = "evaluation.json"
OTHER_METRICS = ("top-1", "exact", "any")
# The end of a control's name.
CONTROL = "shuffled control"

Metrics = dict[str, float]
"""Values by the metric's name (`recall@4`, `exact`, ...); empty where there was nothing to predict."""


class Coverage(BaseModel):
    """Predictions that are kept at a threshold of confidence: their share, and recall@K among them."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    threshold: float
    coverage: float
    recall_at_k: float = Field(alias="recall@K")


class Result(BaseModel):
    """One predictor: metrics by horizon (`h=1`, ...), 95 % intervals of some of them, metrics by layer `[L]` or null.

    Breakdowns by groups of tokens stand under `by_` and the name of the grouping (phase, position, dataset, and columns of the
    trace that are true or false): see `groupings`. bytes: of the stored arrays. Older files lack the last fields.
    """

    model_config = ConfigDict(extra="allow")

    metrics: dict[str, Metrics]
    recall_at_k_name: str
    intervals: dict[str, dict[str, tuple[float, float]]]
    by_target_layer: dict[str, list[Metrics | None]] = {}
    calibration_error: float | None = None
    precision_by_coverage: list[Coverage] = []
    parameters: int | None = None
    bytes: int | None = None
    microseconds_per_prediction: float | None = None

    @property
    def groupings(self) -> dict[str, dict[str, Metrics]]:
        """Metrics of the nearest horizon by group, for each grouping by name."""
        found = {}
        for name, value in (self.model_extra or {}).items():
            if name.startswith("by_"):
                found[name.removeprefix("by_")] = cast("dict[str, Metrics]", value)
        return found


class Evaluation(BaseModel):
    """An evaluation: its data, chance, and the results of predictors by name. `predictor` is the run's own among them.

    trained_on: problems of these that the run was trained on; 0 if all are held out. train_seconds: None if unknown.
    Older files lack the fields that have a default.
    """

    version: int = 1
    run: str
    predictor: str = ""
    task: str
    trace: str
    model: str = ""
    split: str
    part: str
    problems: int
    trained_on: int = 0
    tokens: int
    definitions: dict[str, str] = {}
    caveats: list[str] = []
    train_seconds: float | None = None
    chance: Metrics
    results: dict[str, Result]

    @model_validator(mode="after")
    def _can_be_shown(self) -> Evaluation:
        if all(name.endswith(CONTROL) for name in self.results):
            raise ValueError("it has no results of predictors")
        for name, result in self.results.items():
            needed = {result.recall_at_k_name, *OTHER_METRICS}
            if missing := needed - self.chance.keys():
                raise ValueError(f"chance lacks {min(missing)}")
            if missing := needed - result.metrics.get("h=1", {}).keys():
                raise ValueError(f"{name} lacks {min(missing)} for h=1")
            if any(result.recall_at_k_name not in result.intervals.get(horizon, {}) for horizon in result.metrics):
                raise ValueError(f"{name} lacks intervals of {result.recall_at_k_name}")
        return self

    @property
    def recall_at_k_name(self) -> str:
        """`recall@4` for a model with four experts per token."""
        return next(iter(self.results.values())).recall_at_k_name

    def to_json(self) -> str:
        """The file's content."""
        return self.model_dump_json(indent=1, by_alias=True) + "\n"


def read_evaluation(path: Path) -> Evaluation:
    """An evaluation's file, or that of a run's folder. Raises `TraceError` if the file is not an evaluation."""
    return read_document(path, Evaluation, EVALUATION_FILE, "specmoe evaluate RUN --trace T --json FILE")


def table(evaluation: Evaluation, horizon: int = 1) -> list[dict[str, str]]:
    """The evaluation as rows of text, chance first; recall@K with its 95 % interval over problems."""
    k_name = evaluation.recall_at_k_name
    columns = (k_name, *OTHER_METRICS)
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
