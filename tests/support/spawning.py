"""Children of `multiprocessing`'s method `spawn` that start fast: from a warm interpreter instead of a cold one.

vLLM spawns its engine and its workers, and each imports vLLM for ten seconds. After `spawn_from_here`, a spawned process begins
as a copy of this one as it is at that moment: it gets the arguments, variables, working directory and files of a spawned
process, and none of what its parent does in between. It is the parent's own child, so that the parent waits for it as usual.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing.util
import os
import platform
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CLONE_PARENT = 0x8000
SYS_CLONE = {"x86_64": 56, "aarch64": 220}
MAX_MESSAGE = 1 << 18


def spawn_from_here() -> Callable[[], Any] | None:
    """Fork a process that waits to be copied.

    Returns None in this process; in each spawned one, what it has to do. Without effect on processors that are not listed.
    """
    if platform.machine() not in SYS_CLONE:
        return None
    parent, waiting = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (parent, waiting):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_MESSAGE)
    if os.fork():
        waiting.close()
        multiprocessing.util.spawnv_passfds = _Spawner(parent)  # type: ignore[assignment]
        return None
    parent.close()
    # Ctrl-C is for the whole group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()
    while True:
        text, files, _, _ = socket.recv_fds(waiting, MAX_MESSAGE, 64)
        if not text:
            os._exit(0)
        pid = _sibling()
        if pid == 0:
            waiting.close()
            program = _prepare(json.loads(text), files)
            # vLLM's engine spawns workers of its own.
            return spawn_from_here() or program
        for file in files:
            os.close(file)
        waiting.send(str(pid).encode())


class _Spawner:
    """Stands for `multiprocessing.util.spawnv_passfds`."""

    def __init__(self, waiting: socket.socket) -> None:
        self._waiting = waiting

    def __call__(self, path: bytes, arguments: Sequence[Any], files: Sequence[int]) -> int:
        numbers = [0, 1, 2, *files]
        request = {
            "arguments": [os.fsdecode(argument) for argument in arguments],
            "environment": dict(os.environ),
            "workdir": str(Path.cwd()),
            "files": numbers,
        }
        socket.send_fds(self._waiting, [json.dumps(request).encode()], numbers)
        return int(self._waiting.recv(64))


def _sibling() -> int:
    """As `os.fork`, but the new process is a child of this one's parent. This process must have one thread only."""
    ctypes.pythonapi.PyOS_BeforeFork()
    # The interpreter's lock stays taken: nothing else may run in between.
    syscall = ctypes.PyDLL(None).syscall
    syscall.restype = ctypes.c_long
    pid: int = syscall(SYS_CLONE[platform.machine()], CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    else:
        ctypes.pythonapi.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError("no process could be cloned")
    return pid


def _prepare(request: dict[str, Any], files: Sequence[int]) -> Callable[[], Any]:
    """Give this process what the spawned one would have; returns its program, `-c PROGRAM ARGUMENTS`."""
    numbers = request["files"]
    # Out of the way of the numbers that they are to have.
    free = max([*numbers, *files]) + 1
    moved = [os.dup2(file, free + place) for place, file in enumerate(files)]
    for file in files:
        os.close(file)
    for file, number in zip(moved, numbers, strict=True):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["workdir"])
    os.environ.clear()
    os.environ.update(request["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    place = request["arguments"].index("-c")
    sys.argv = ["-c", *request["arguments"][place + 2 :]]
    program = compile(request["arguments"][place + 1], "<string>", "exec")
    return lambda: exec(program, vars(sys.modules["__main__"]))
