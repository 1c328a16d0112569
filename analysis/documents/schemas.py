"""All documents that commands write, with their JSON schemas: for a reference, or for validation in other languages."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel


@dataclass(frozen=True)
class DocumentKind:
    """A document. module, model: where its type is; command: what writes it; reader: what reads it, if `analysis` has it.

    file: where in the command's folder it is; empty if the command names the file.
    """

    module: str
    model: str
    command: str
    reader: str = ""
    file: str = ""

    @property
    def type(self) -> type[BaseModel]:
        """The document's type."""
        found: type[BaseModel] = getattr(importlib.import_module(f"analysis.documents.{self.module}"), self.model)
        return found


KINDS: dict[str, DocumentKind] = {
    "statistics": DocumentKind(
        "statistics", "StatisticsDocument", "specmoe analyze TRACE --out DIR", "read_statistics", "statistics.json"
    ),
    "comparison": DocumentKind(
        "statistics", "ComparisonDocument", "specmoe analyze TRACE TRACE --out DIR", file="statistics.json"
    ),
    "evaluation": DocumentKind("evaluation", "Evaluation", "specmoe evaluate RUN --trace TRACE --json FILE", "read_evaluation"),
    "simulation": DocumentKind(
        "simulation", "Simulation", "specmoe simulate TRACE --out DIR", "read_simulation", "simulation.json"
    ),
    "curve": DocumentKind("curves", "CacheCurves", "specmoe curve TRACE --out DIR", "read_curves", "curve.json"),
    "fit": DocumentKind("fit_report", "Fit", "specmoe fit MODEL --json FILE", "read_fit"),
    "replay": DocumentKind("replay", "ReplayResult", "specmoe replay TRACE --json FILE"),
    "generation": DocumentKind("generation", "GenerationRun", "specmoe generate MODEL --json FILE"),
}
"""The documents by name."""


def document_schemas() -> dict[str, dict[str, Any]]:
    """The JSON schema (draft 2020-12) of every document, by its name in `KINDS`.

    Descriptions are the docstrings of the types. `python -m analysis.documents.schemas` prints them.

    Example:
        >>> document_schemas()["curve"]["properties"]["num_experts"]
        {'title': 'Num Experts', 'type': 'integer'}
    """
    return {name: kind.type.model_json_schema() for name, kind in KINDS.items()}


if __name__ == "__main__":
    print(json.dumps(document_schemas(), indent=1))
