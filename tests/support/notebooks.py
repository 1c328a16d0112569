"""Notebooks without Jupyter: their cells are run in order, and what they print is compared with what is stored."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cell:
    """A code cell. printed: the stored output of `print`. shown: the MIME types of what its last line is."""

    number: int
    source: str
    printed: str
    shown: list[str]


def code_cells(path: Path) -> list[Cell]:
    """The code cells of a notebook, in order, with their stored outputs."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = []
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            outputs = cell["outputs"]
            printed = "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")
            shown = [kind for output in outputs for kind in output.get("data", {})]
            found.append(Cell(number, "".join(cell["source"]), printed, shown))
    return found


def run_cell(cell: Cell, names: dict[str, Any], where: str) -> tuple[str, Any]:
    """Run a cell in the namespace `names`. Returns what it prints, and the value of its last line if that is an expression."""
    body = ast.parse(cell.source, where).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), where, "exec"), names)
        value = eval(compile(ast.Expression(last.value), where, "eval"), names) if isinstance(last, ast.Expr) else None
    return printed.getvalue(), value


def without_numbers(text: str) -> str:
    """Text with `0` for every number, and single spaces: last digits differ from processor to processor."""
    return " ".join(re.sub(r"\d+(\.\d+)?", "0", text).split())
