"""What the orchestrator makes of its containers' outcomes; and what the image holds."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages
from support.offline_modal import ROOT

pytest.importorskip("modal")

from modal_jobs import collect
from modal_jobs.image import PROJECT, files_to_ignore
from modal_jobs.shards import ShardReport
from profiler.plan.job import CollectJob

JOB = CollectJob(run_id="x", model="demo", datasets=[], image="none", shards=[0, 1, 2, 3])


def watched(*outcomes: ShardReport | BaseException) -> dict[int, str | None]:
    return {report.shard: report.error for report in collect._watch(outcomes, [0, 1, 2], JOB)}


def test_failures_keep_their_shards() -> None:
    found = watched(ShardReport(shard=2), RuntimeError("shard 0: OSError: no space left"), ShardReport(shard=1))
    assert found == {0: "OSError: no space left", 1: None, 2: None}


def test_containers_that_died_without_a_word_are_told_apart_in_the_end() -> None:
    found = watched(Exception("Runner terminated (exit code 137)"), ShardReport(shard=1), ShardReport(shard=0))
    assert found == {0: None, 1: None, 2: "Exception: Runner terminated (exit code 137)"}
    assert watched(ShardReport(shard=1)) == {
        1: None,
        0: "its container ended without a report",
        2: "its container ended without a report",
    }
    assert len(watched(*[Exception("x")] * 5)) == 3


def test_the_image_holds_all_packages() -> None:
    find = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    packages = find_packages(str(ROOT), include=find["include"])
    ours = {path.parent.relative_to(ROOT) for name in PROJECT for path in (ROOT / name).rglob("__init__.py")}
    assert {str(path).replace("/", ".") for path in ours} == set(packages)
    assert {"pyproject.toml", "README.md", "LICENSE", "specmoe.py"} <= PROJECT


def test_nothing_else_goes_into_the_image(tmp_path: Path) -> None:
    for name in (".venv", ".git", "traces", "!odd", "[a]", "a*b", "x?y", "#c", "back\\slash", " first", "profiler", "analysis"):
        (tmp_path / name / "__pycache__").mkdir(parents=True)
        (tmp_path / name / "file.py").touch()
        (tmp_path / name / "__pycache__" / "file.pyc").touch()
    (tmp_path / "README.md").touch()
    (tmp_path / "notes.md").touch()
    stays = files_to_ignore(tmp_path)
    assert stays.can_prune_directories()
    paths = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert {str(path) for path in paths if not stays(path)} == {"README.md", "profiler/file.py", "analysis/file.py"}
