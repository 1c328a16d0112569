"""The documentation builds without a broken link, and its reference has every public name, command, option and document."""

from __future__ import annotations

import html
import importlib
import json
import os
import re
import subprocess
import sys
import types
from functools import cached_property
from pathlib import Path

import pytest
import typer

from analysis import __all__ as public_of_analysis
from docs.hooks.reference import DOCUMENTS, commands, document

ROOT = Path(__file__).parents[1]
PACKAGES = ("profiler", "analysis", "speculation", "vllm_patch")
FACTS = ("Date", "Machine", "Command", "Data", "Not run")
FOLDERS = (*PACKAGES, "modal_jobs", "benchmarks", "examples", "tests")
# The changelog names pages as they were called at the time.
TEXTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "specmoe.py", "install.py", "mkdocs.yml", "pyproject.toml")),
    *sorted(
        path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".md", ".json", ".ipynb", ".j2", ".js"} and "docs/" in path.read_text(encoding="utf-8")
    ),
]


def pages() -> list[str]:
    """Every page, as a path in `docs/`."""
    return sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_every_public_name(package: str, site: Path) -> None:
    page = (site / "reference" / package / "index.html").read_text()
    names = importlib.import_module(package).__all__
    assert names
    assert [name for name in names if f'id="{package}.{name}"' not in page] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_described(package: str) -> None:
    module = importlib.import_module(package)
    for name in module.__all__:
        public = getattr(module, name)
        assert public.__doc__, name
        kinds = (types.FunctionType, property, classmethod, staticmethod, cached_property)
        members = {member: value for member, value in vars(public).items() if isinstance(value, kinds)}
        undescribed = [member for member, value in members.items() if not member.startswith("_") and not value.__doc__]
        assert undescribed == [], name


def test_the_reference_has_every_command_and_option(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / "reference" / "cli" / "index.html").read_text())
    page = " ".join(html.unescape(text).split())
    found = commands()
    assert {"specmoe collect", "specmoe generate", "python -m vllm_patch check"} <= found.keys()
    for name, command in found.items():
        context = typer.Context(command)
        records = [record for parameter in command.params if (record := parameter.get_help_record(context))]
        missing = [record for record in records if " ".join(f"{record[0]} {record[1]}".split()) not in page]
        assert missing == [], name


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_reference_has_every_document(name: str, site: Path) -> None:
    schema = json.loads((site / "reference" / "schemas" / f"{name}.json").read_text())
    assert set(schema["properties"]) == set(document(name).model_fields)
    page = (site / "reference" / "documents" / "index.html").read_text()
    for part, definition in schema.get("$defs", {}).items():
        assert f'id="{name}-{part}"' in page
        assert [field for field in definition.get("properties", {}) if f"<code>{field}</code>" not in page] == []


def test_every_document_that_the_package_reads_is_in_the_reference() -> None:
    named = " ".join(read for *_, read in DOCUMENTS.values())
    assert [name for name in public_of_analysis if name.startswith("read_") and f"`analysis.{name}`" not in named] == []


@pytest.mark.parametrize("page", [*(f"docs/{page}" for page in pages()), "README.md", "CONTRIBUTING.md"])
def test_lists_and_tables_are_shown_as_such(page: str) -> None:
    """Markdown takes a list or a table that follows a line of text for more text."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    item = r"(?:[-*] |\d+\. )"
    assert re.findall(rf"^(?!{item}|  |\n).+\n{item}.*$", text, re.MULTILINE) == []
    assert re.findall(r"^(?!\|).+\n\|.*$", text, re.MULTILINE) == []


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    assert [page for page in pages() if page != "index.md" and f"({page})" not in index] == []


@pytest.mark.parametrize("page", [page for page in pages() if page.startswith("results/")])
def test_a_page_of_results_says_where_they_are_from(page: str) -> None:
    head = re.split(r"\n\n", (ROOT / "docs" / page).read_text())[1:4]
    table = next(block for block in head if block.startswith("| Date |"))
    facts = dict(re.findall(r"^\| ([\w ]+?)(?: and split)? \| (.+) \|$", table, re.MULTILINE))
    assert tuple(facts) == FACTS
    assert "split" in next(line for line in table.splitlines() if line.startswith("| Data"))
    assert re.match(r"20\d\d-\d\d-\d\d", facts["Date"])


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_a_file_says_of_the_documentation_exists(file: Path) -> None:
    """Links of Markdown files outside the documentation, and paths in messages, docstrings and comments."""
    text = file.read_text(encoding="utf-8")
    named = re.findall(r"\bdocs/[\w./-]*\.(?:md|csv|svg|json|png)\b", text)
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", text) if file.suffix == ".md" else []
    assert [path for path in [*named, *linked] if not (ROOT / path).exists()] == []
