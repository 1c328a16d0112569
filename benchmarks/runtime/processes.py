"""A process for each row, with a limit of its memory and nothing of the model in the page cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from benchmarks.runtime.rows import Case, Measured

# Names the control group that the process of a row joins.
GROUP = "SPECMOE_BENCHMARK_GROUP"


def in_process(case: Case, model: Path, prompts: list[str], memory_gb: float | None) -> Measured:
    """Run a row in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.runtime", "--child", json.dumps(asdict(case)), str(model), json.dumps(prompts)]
    with memory_limit(memory_gb) as group:
        environment = os.environ | ({GROUP: str(group)} if group else {})
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        why = "it was killed, which the limit of memory does" if done.returncode == -9 else done.stderr[-2000:]
        raise SystemExit(f"{case.name} failed: {why}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def drop_from_page_cache(folder: Path) -> None:
    """Make reads of a folder's files go to the disk."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def memory_limit(gigabytes: float | None) -> Iterator[Path | None]:
    """A control group whose processes may use so much memory, page cache included; version 1 or 2."""
    if gigabytes is None:
        yield None
        return
    root = Path("/sys/fs/cgroup")
    is_second = (root / "cgroup.controllers").is_file()
    group = (root if is_second else root / "memory") / f"specmoe-benchmark-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.max" if is_second else "memory.limit_in_bytes")).write_text(str(int(gigabytes * 1e9)))
        yield group
    finally:
        for _ in range(50):
            try:
                group.rmdir()
                break
            except OSError:
                # Its last process is still ending.
                time.sleep(0.1)
