"""numba must not run code that was compiled from an older version of a file that the function calls into."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from speculation.offload.numba_recompiling import recompile_after

CALLER = """
import numba
from speculation.offload.numba_recompiling import recompile_after
from called import value

recompile_after(__file__, "called")

@numba.njit(cache=True)
def run():
    return value()

print(run())
"""
CALLED = """
import numba

@numba.njit(cache=True)
def value():
    return {number}
"""


def test_a_change_in_a_called_file_is_seen(tmp_path: Path) -> None:
    (tmp_path / "caller.py").write_text(CALLER)
    found = []
    for number in (1, 2):
        (tmp_path / "called.py").write_text(CALLED.format(number=number))
        # Newer than the caller; by a second, because numba does not see less than some hundred nanoseconds.
        os.utime(tmp_path / "called.py", (2e9 + number, 2e9 + number))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "PYTHONDONTWRITEBYTECODE": "1"}
        environment["NUMBA_CACHE_DIR"] = str(tmp_path / "cache")
        done = subprocess.run(
            [sys.executable, str(tmp_path / "caller.py")], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found.append(int(done.stdout))
    assert found == [1, 2]


def test_only_an_older_file_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = tmp_path / "own.py", tmp_path / "other.py"
    for path, time in ((own, 5), (other, 3)):
        path.write_text("")
        os.utime(path, ns=(time, time))
    called = ModuleType("package.other")
    called.__file__ = str(other)
    monkeypatch.setitem(sys.modules, "package.other", called)
    recompile_after(str(own), "package.other")
    assert own.stat().st_mtime_ns == 5
    os.utime(other, ns=(9, 9))
    recompile_after(str(own), "package.other")
    assert own.stat().st_mtime_ns == 9
