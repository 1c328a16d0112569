"""What `specmoe evaluate --json` wrote, read for tables and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, model_validator

from analysis.documents.reading import read_document

# What a run has that was trained on a rented machine, and others if they were evaluated into it.
EVALUATION_FILE = "evaluation.json"
OTHER_METRICS = ("top-1", "exact", "any")
# The end of a control's name.
CONTROL = "shuffled control"


class Result(BaseModel):
    """One predictor: metrics by horizon (`h=1`, ...), 95 % intervals of some of them, metrics by layer `[L]` or null."""

    metrics: dict[str, dict[str, float]]
    recall_at_k_name: str
    intervals: dict[str, dict[str, tuple[float, float]]]
    by_target_layer: dict[str, list[dict[str, float] | None]] = {}


class Evaluation(BaseModel):
    """An evaluation: its data, chance, and the results of predictors by name."""

    run: str
    task: str
    trace: str
    split: str
    part: str
    problems: int
    tokens: int
    chance: dict[str, float]
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


def read_evaluation(path: Path) -> Evaluation:
    """An evaluation's file, or that of a run's folder. Raises `TraceError` if it is none."""
    return read_document(path, Evaluation, EVALUATION_FILE, "specmoe evaluate RUN --trace T --json FILE")


def as_evaluation(document: dict[str, Any]) -> Evaluation:
    """An evaluation from the document itself. Raises pydantic's `ValidationError`."""
    return Evaluation.model_validate(document)


def table(evaluation: Evaluation, horizon: int = 1) -> list[dict[str, str]]:
    """The evaluation as rows of text, chance first; recall@K with its 95 % interval over problems."""
    k_name = next(iter(evaluation.results.values())).recall_at_k_name
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
