"""What a program may use is what the packages export: the examples and the documentation need nothing else."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator

import pytest
from support.doc_blocks import ROOT, blocks

PACKAGES = ("profiler", "analysis", "speculation", "vllm_patch")


def programs() -> Iterator[tuple[str, str]]:
    """Each program that a reader may copy: its name, and its text."""
    for path in sorted((ROOT / "examples").glob("*.py")):
        yield path.name, path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        yield path.name, "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for block in blocks():
        if block.is_python:
            yield f"{block.page}:{block.line}", block.text


def deep_imports(text: str) -> list[str]:
    """Modules inside our packages from which a program imports."""
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [
        name
        for node in found
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    ]
    return [name for name in names if name.partition(".")[0] in PACKAGES and "." in name]


@pytest.mark.parametrize(("name", "text"), list(programs()), ids=[name for name, _ in programs()])
def test_programs_use_what_is_exported(name: str, text: str) -> None:
    assert deep_imports(text) == []


def test_a_deep_import_is_found() -> None:
    assert deep_imports("from profiler.trace.reader import Trace\nimport analysis.analyze") == [
        "profiler.trace.reader",
        "analysis.analyze",
    ]
    assert deep_imports("from profiler import Trace\nimport vllm_patch") == []
