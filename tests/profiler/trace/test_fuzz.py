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
from support.fuzz import READERS

TESTS = Path(__file__).parents[2]
INPUTS = int(os.environ.get("SPECMOE_FUZZ_INPUTS", "1000"))


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=540, env=environment)


@pytest.mark.fuzz
def test_mutated_inputs_are_read_or_refused() -> None:
    readers = list(READERS)
    assert len(readers) >= 20
    # A process for each core, and not one for each reader, since each imports for a second.
    processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    shares = [readers[first::processes] for first in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        running = pool.map(lambda names: run("-m", "support.fuzz", *names, "--inputs", str(INPUTS)), shares)
        for names, done in zip(shares, running, strict=True):
            assert done.returncode == 0, f"exit {done.returncode}: {done.stdout}{done.stderr}"
            assert [line.partition(":")[0] for line in done.stdout.splitlines() if f": {INPUTS:,} inputs" in line] == names


def test_a_reader_that_breaks_is_found_out(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(
        "import sys\n"
        "from support import fuzz, samples\n"
        "def broken(source, out):\n    assert source.read_bytes()[:1] == b'{'\n"
        "fuzz.READERS['broken'] = fuzz.Reader(samples.make_olmoe, broken)\n"
        "sys.exit(0 if fuzz.fuzz('broken', 300, 0) else 1)\n"
    )
    done = run(str(script), TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert "AssertionError" in done.stderr
    assert "broke" in done.stdout
    assert list((tmp_path / "specmoe-fuzz").iterdir())
