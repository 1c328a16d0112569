"""Users' own scripts, which vLLM's processes import again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import warm

from profiler.engines.vllm import is_installed

pytestmark = [pytest.mark.engine, pytest.mark.skipif(not is_installed(), reason="vLLM is not installed")]

SCRIPT = 'from profiler import TraceCollector\nTraceCollector("demo").start()\n'


def test_a_script_from_standard_input_is_told_to_be_a_file() -> None:
    done = subprocess.run([sys.executable, "-"], input=SCRIPT, capture_output=True, text=True)
    assert "EngineError: vLLM's processes import your script again, but <stdin> is not a file" in done.stderr


def test_a_script_without_a_guard_is_told_of_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = warm.run(str(script), timeout=200, warm_children=True)
    assert done.returncode == 1
    assert "put what starts the collection under if __name__ == '__main__'" in done.stderr.splitlines()[-1]


def test_a_script_that_imports_numba_is_told_where_to(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import numba\n" + SCRIPT)
    done = warm.run(str(script), timeout=200, environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    if done.returncode == 0:
        pytest.skip("this vLLM starts nevertheless")
    assert "import numba, analysis and speculation in functions or under" in done.stderr.splitlines()[-1]
