"""Every reader against 1,000 mutated inputs: no crash, no hang, no more than 1 GiB.

SPECMOE_FUZZ_INPUTS sets another number; `make test-all` takes 10,000.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[2] / "support" / "fuzz.py"
INPUTS = int(os.environ.get("SPECMOE_FUZZ_INPUTS", "1000"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(FUZZ), *arguments], capture_output=True, text=True, timeout=540)


@pytest.mark.fuzz
def test_mutated_inputs_are_read_or_refused() -> None:
    readers = run("--list").stdout.split()
    assert len(readers) >= 20
    # Two processes, and not one for each reader, since each imports for a second.
    halves = readers[::2], readers[1::2]
    with ThreadPoolExecutor(2) as pool:
        for names, done in zip(halves, pool.map(lambda names: run(*names, "--inputs", str(INPUTS)), halves), strict=True):
            assert done.returncode == 0, f"exit {done.returncode}: {done.stdout}{done.stderr}"
            assert [line.partition(":")[0] for line in done.stdout.splitlines() if f": {INPUTS:,} inputs" in line] == names


def test_a_reader_that_breaks_is_found_out(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(FUZZ.parent)!r}); import fuzz\n"
        "def broken(source, out):\n    assert source.read_bytes()[:1] == b'{'\n"
        "fuzz.READERS['broken'] = fuzz.Reader(fuzz.make_olmoe, broken)\n"
        "sys.exit(0 if fuzz.fuzz('broken', 300, 0) else 1)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env={"TMPDIR": str(tmp_path)})
    assert done.returncode == 1
    assert "AssertionError" in done.stderr
    assert "broke" in done.stdout
    assert list((tmp_path / "specmoe-fuzz").iterdir())
