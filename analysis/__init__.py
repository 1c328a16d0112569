"""Statistics of routing: mergeable counts (`counts`), pure functions of them (`statistics`), and the HTML report (`report`).

`count_trace` reads a trace once and counts everything; `compute_statistics` also computes the statistics from these counts.
Modules are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.counts.counting import TraceCounts, count_trace
    from analysis.documents.curves import CacheCurves, read_curves
    from analysis.documents.evaluation import Evaluation, read_evaluation
    from analysis.documents.fit_report import Fit, read_fit
    from analysis.documents.schemas import document_schemas
    from analysis.documents.simulation import Simulation, read_simulation
    from analysis.documents.statistics import StatisticsDocument, read_statistics
    from analysis.statistics.agreement import Agreement, prompt_agreement
    from analysis.statistics.compute import Statistics, compute_statistics

__all__ = [
    "Agreement",
    "CacheCurves",
    "Evaluation",
    "Fit",
    "Simulation",
    "Statistics",
    "StatisticsDocument",
    "TraceCounts",
    "compute_statistics",
    "count_trace",
    "document_schemas",
    "prompt_agreement",
    "read_curves",
    "read_evaluation",
    "read_fit",
    "read_simulation",
    "read_statistics",
]

_MODULES = {
    "TraceCounts": "counts.counting",
    "count_trace": "counts.counting",
    "CacheCurves": "documents.curves",
    "read_curves": "documents.curves",
    "Evaluation": "documents.evaluation",
    "read_evaluation": "documents.evaluation",
    "Fit": "documents.fit_report",
    "read_fit": "documents.fit_report",
    "document_schemas": "documents.schemas",
    "Simulation": "documents.simulation",
    "read_simulation": "documents.simulation",
    "StatisticsDocument": "documents.statistics",
    "read_statistics": "documents.statistics",
    "Agreement": "statistics.agreement",
    "prompt_agreement": "statistics.agreement",
    "Statistics": "statistics.compute",
    "compute_statistics": "statistics.compute",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"analysis.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'analysis' has no attribute {name!r}")
