"""A program that seals the traces of a recording server. The server starts it, and it outlives the server.

It reads one command per line from standard input: `["open", DIRECTORY]` or `["close", DIRECTORY]`. End of input means that the
server has exited. The program runs as long as the server, so it stays small: each trace is sealed in a separate process, at low
priority.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable

NICENESS = 10


def seal_closed(lines: Iterable[str]) -> None:
    """Seal each trace when it is closed, and all traces that are still open at the end of `lines`."""
    open_traces: list[str] = []
    for line in lines:
        # A server that is killed while writing a line leaves an incomplete one.
        if not line.endswith("\n"):
            break
        command, directory = json.loads(line)
        if command == "open":
            open_traces.append(directory)
        else:
            open_traces.remove(directory)
            _finish(directory)
    for directory in open_traces:
        _finish(directory)


def _finish(directory: str) -> None:
    # Errors go to standard error, which is the server's log. The other traces are sealed regardless.
    subprocess.run(
        [sys.executable, "-m", "vllm_patch", "finish", directory],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=False,
    )


def main() -> None:
    """Leave the server's process tree and session, lower the priority, then seal traces."""
    if os.fork():
        os._exit(0)
    os.setsid()
    os.nice(NICENESS)
    seal_closed(sys.stdin)


if __name__ == "__main__":
    main()
