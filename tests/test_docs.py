"""The documentation builds without a broken link, and its reference has every public name, with a docstring."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("profiler", "analysis", "speculation", "vllm_patch")


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


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if page != "index.md" and f"({page})" not in index] == []
