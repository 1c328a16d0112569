"""Our own JSON document: the report, and a table for each layer. For programs that read none of the engines' formats."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from profiler.exporters.content import Content
from profiler.exporters.report import ExportReport
from profiler.exporters.table import LayerTable, tables
from profiler.trace.writer import write_text

NAME = "json"
ABOUT = "our own document: the report, and for each layer tokens, shares, weights, ranks, and kept experts"
SCOPE = "either"
SUFFIX = ".json"
UNVERIFIED = "no engine reads this format"


class ExpertTable(BaseModel):
    """The document of `specmoe export --to json`."""

    model_config = ConfigDict(extra="forbid")

    version: int = 1
    report: ExportReport
    layers: list[LayerTable]

    def to_json(self) -> str:
        """The file's content."""
        return self.model_dump_json(indent=1) + "\n"


def write(content: Content, out: Path) -> list[str]:
    """Write the document."""
    write_text(out, ExpertTable(report=content.report, layers=tables(content)).to_json())
    return []
