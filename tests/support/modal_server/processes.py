"""Start containers through the warm interpreter of an environment, and see them end."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# Containers share this machine's cores: threads that wait for each other while others have the cores take many times as long.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
STARTER = Path(__file__).with_name("starter.py")


@dataclass
class Process:
    """A container's process, which is in a group of its own. code: its exit code, once it has ended."""

    pid: int
    code: asyncio.Future[int]
    readers: list[asyncio.Task[None]] = field(default_factory=list)

    def interrupt(self) -> None:
        """Ask it to stop, as Ctrl-C does."""
        self._send(os.kill, signal.SIGINT)

    def kill(self) -> None:
        """End it, and what it has started."""
        self._send(os.killpg, signal.SIGKILL)

    async def ended(self, seconds: float) -> bool:
        """Whether it ends within some seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self.code), seconds)
        return self.code.done()

    def _send(self, how: Callable[[int, int], None], number: int) -> None:
        if not self.code.done():
            with contextlib.suppress(ProcessLookupError):
                how(self.pid, number)


class Starter:
    """The warm interpreter of one environment. It lives until this process ends; one server at a time uses it."""

    _all: dict[Path, Starter] = {}  # noqa: RUF012 - a cache for the whole process

    def __init__(self, python: Path) -> None:
        self._control, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MODAL_", "PYTHONPATH"))}
        # Modal's package decides some things as it is imported, OpenMP the number of its threads.
        environment |= {"MODAL_IS_REMOTE": "1", "PYTHONUNBUFFERED": "1", **ONE_THREAD}
        with other:
            self._process = subprocess.Popen(
                [str(python), "-P", str(STARTER)], stdin=other.fileno(), env=environment, start_new_session=True, cwd="/"
            )
        self._control.setblocking(False)
        self._started: dict[str, asyncio.Future[int]] = {}
        self._ended: dict[int, asyncio.Future[int]] = {}
        atexit.register(self._close)

    @classmethod
    def of(cls, python: Path) -> Starter:
        """The one of this interpreter, which is started if there is none."""
        if python not in cls._all or cls._all[python]._process.poll() is not None:
            cls._all[python] = cls(python)
        return cls._all[python]

    def attach(self) -> None:
        """Have this event loop receive its answers."""
        asyncio.get_running_loop().add_reader(self._control, self._receive)

    def detach(self) -> None:
        """End that."""
        asyncio.get_running_loop().remove_reader(self._control)
        self._started.clear()
        self._ended.clear()

    async def start(self, specification: Path, say: Callable[[int, str], None]) -> Process:
        """Start a container. say: gets each line of its output, with 1 for standard output and 2 for errors."""
        loop = asyncio.get_running_loop()
        pipes = [os.pipe(), os.pipe()]
        self._started[str(specification)] = started = loop.create_future()
        try:
            socket.send_fds(self._control, [str(specification).encode()], [write for _, write in pipes])
        finally:
            for _, write in pipes:
                os.close(write)
        pid = await started
        readers = [asyncio.create_task(_read(read, number, say)) for number, (read, _) in enumerate(pipes, start=1)]
        return Process(pid, self._ended[pid], readers)

    def _receive(self) -> None:
        message = self._control.recv(1 << 16)
        if not message:
            lost = RuntimeError(f"the process that starts containers has ended: {self._process.args!r}")
            for waiting in [*self._started.values(), *self._ended.values()]:
                if not waiting.done():
                    waiting.set_exception(lost)
            asyncio.get_running_loop().remove_reader(self._control)
            return
        answer = json.loads(message)
        if "started" in answer:
            started = self._started.pop(answer["started"], None)
            if started is not None:
                self._ended[answer["pid"]] = asyncio.get_running_loop().create_future()
                started.set_result(answer["pid"])
        elif answer["ended"] in self._ended:
            self._ended.pop(answer["ended"]).set_result(answer["code"])

    def _close(self) -> None:
        # It kills its containers and ends.
        self._control.close()
        self._process.wait()


async def _read(pipe: int, number: int, say: Callable[[int, str], None]) -> None:
    reader = asyncio.StreamReader()
    with os.fdopen(pipe, "rb") as file:
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), file)
        rest = b""
        while piece := await reader.read(1 << 16):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                say(number, line.decode(errors="replace") + "\n")
        if rest:
            say(number, rest.decode(errors="replace"))
