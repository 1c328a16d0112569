"""A program: started by a recording server, it finishes that server's traces and outlives it.

Standard input says what to do, a line `["open", DIRECTORY]` or `["close", DIRECTORY]` at a time; its end means that the server
is gone. Small, for it runs as long as the server: each trace is finished in a process of its own, at low priority.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable

NICENESS = 10


def seal(lines: Iterable[str]) -> None:
    """Finish each trace when it is closed, and at the end of `lines` what is open."""
    waiting: list[str] = []
    for line in lines:
        # A server that is killed while it writes a line leaves a piece of one.
        if not line.endswith("\n"):
            break
        what, directory = json.loads(line)
        if what == "open":
            waiting.append(directory)
        else:
            waiting.remove(directory)
            _finish(directory)
    for directory in waiting:
        _finish(directory)


def _finish(directory: str) -> None:
    # What goes wrong stands on standard error, the server's log; the other traces are finished all the same.
    subprocess.run(
        [sys.executable, "-m", "vllm_patch", "finish", directory],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=False,
    )


def main() -> None:
    """Leave the server's tree of processes, its session and its priority, then serve."""
    if os.fork():
        os._exit(0)
    os.setsid()
    os.nice(NICENESS)
    seal(sys.stdin)


if __name__ == "__main__":
    main()
