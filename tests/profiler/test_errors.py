"""Without the extras: a trace is read, every command explains itself, and what is missing is named in one line."""

from __future__ import annotations

import ast
import pickle
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from support.traces import MakeProblems, MakeTrace

from profiler import errors
from profiler.errors import EXTRAS, NothingToRunError, SpecmoeError, first_line, missing_extra
from profiler.trace.reader import Trace

BLOCKED = sorted({package for packages in EXTRAS.values() for package in packages})
PROGRAM = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
import specmoe
specmoe.main()
"""


@pytest.fixture
def trace(make_trace: MakeTrace, random_problems: MakeProblems) -> Trace:
    return make_trace(random_problems(count=3, tokens=5, layers=2, num_experts=4, top_k=2), 4)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_trace_is_inspected_without_any_extra(trace: Trace) -> None:
    done = run("inspect", trace.path, "--verify")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.rstrip().endswith("complete")


@pytest.mark.parametrize("command", ["collect", "convert", "analyze", "train", "evaluate", "simulate", "replay", "models"])
def test_every_command_explains_itself_without_any_extra(command: str) -> None:
    done = run(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage:" in done.stdout


@pytest.mark.parametrize(("command", "extra"), [("analyze", "analysis"), ("train", "train")])
def test_a_missing_extra_is_named_in_one_line(command: str, extra: str, trace: Trace, tmp_path: Path) -> None:
    done = run(command, trace.path, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"pip install 'speculative-moe[{extra}]'" in done.stderr


@pytest.mark.parametrize("package", ["profiler", "vllm_patch", "analysis", "speculation", "modal_jobs"])
def test_no_message_says_1_problems(package: str) -> None:
    """Numbers before these nouns are written by `counted`."""
    nouns = re.compile(r" ((more|other|training|validation) )?(problems|MoE layers|epochs|seeds|samples)\b")
    found = []
    for path in (Path(__file__).parents[2] / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for number, text in pairwise(node.values) if isinstance(node, ast.JoinedStr) else ():
                follows = str(text.value) if isinstance(text, ast.Constant) else ""
                if nouns.match(follows) and isinstance(number, ast.FormattedValue) and "name" not in ast.unparse(number):
                    found.append(f"{path.name}: {ast.unparse(number)}{follows[:20]}")
    assert found == []


def test_a_package_that_no_extra_brings() -> None:
    assert missing_extra(ModuleNotFoundError("No module named 'nothing'", name="nothing.else")) == (
        "the Python package nothing is not installed: No module named 'nothing'"
    )


@pytest.mark.parametrize(("text", "line"), [("", "ValueError"), ("  \n ", "ValueError"), ("one\ntwo", "one")])
def test_an_error_has_a_first_line(text: str, line: str) -> None:
    assert first_line(ValueError(text)) == line


ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SpecmoeError)]


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: str(kind.__name__))
def test_an_error_reaches_another_process(kind: type[SpecmoeError]) -> None:
    error = NothingToRunError(3, ["too long", "other"]) if kind is NothingToRunError else kind("a reason")
    copied = pickle.loads(pickle.dumps(error))
    assert (type(copied), str(copied), vars(copied)) == (kind, str(error), vars(error))
