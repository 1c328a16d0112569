"""Start containers, and see them end."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from support import warm

# Containers share this machine's cores: threads that wait for each other while others have the cores take many times as long.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# Third-party packages only: containers import the project from the files that were uploaded. And none that reads, as it is
# imported, the environment variables that our images and jobs set (huggingface_hub, transformers, datasets).
WARM = (
    *("modal", "modal._runtime.asgi", "modal._runtime.container_io_manager", "modal._runtime.user_code_imports"),
    *("numpy", "pyarrow.dataset", "pyarrow.parquet", "pydantic", "typer", "rich.progress"),
    *("scipy.stats", "sklearn.metrics", "sympy", "torch", "torch._dynamo", "torch.distributed._composable.fsdp"),
)


@dataclass
class Process:
    """A container's process, which is in a group of its own. readers: of its output."""

    process: warm.Process
    readers: list[asyncio.Task[None]]

    @property
    def pid(self) -> int:
        """Its process id here."""
        return self.process.pid

    async def wait(self) -> int:
        """Its exit code, once it has ended."""
        return await asyncio.wrap_future(self.process.code)

    def interrupt(self) -> None:
        """Ask it to stop, as Ctrl-C does."""
        self._send(os.kill, signal.SIGINT)

    def kill(self) -> None:
        """End it, and what it has started."""
        self._send(os.killpg, signal.SIGKILL)

    async def ended(self, seconds: float) -> bool:
        """Whether it ends within some seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self.process.code)), seconds)
        return self.process.code.done()

    def _send(self, how: Callable[[int, int], None], number: int) -> None:
        if not self.process.code.done():
            with contextlib.suppress(ProcessLookupError):
                how(self.pid, number)


@functools.cache
def numba_cache() -> Path:
    """A folder for the functions that containers compile, so that each is compiled once; it lives as long as this process."""
    folder = tempfile.mkdtemp(prefix="numba-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


_starters: dict[tuple[Path, tuple[str, ...], tuple[tuple[str, str], ...]], warm.Starter] = {}


def starter_of(python: Path, modules: tuple[str, ...] = (), environment: Mapping[str, str] | None = None) -> warm.Starter:
    """A warm interpreter. modules: imported in addition to the usual ones, with those of these variables that imports read."""
    environment = environment if modules and environment else {}
    read = warm.are_read_at_import(environment)
    environment = {name: environment[name] for name in read if environment[name] != os.environ.get(name)}
    key = (python, modules, tuple(sorted(environment.items())))
    if key not in _starters or not _starters[key].alive:
        whole = {name: value for name, value in os.environ.items() if not name.startswith(("MODAL_", "PYTHONPATH"))}
        # Modal's package decides some things as it is imported, OpenMP the number of its threads.
        whole |= {"MODAL_IS_REMOTE": "1", "PYTHONUNBUFFERED": "1", **ONE_THREAD, **environment}
        _starters[key] = warm.Starter(python, (*WARM, *modules), whole)
    return _starters[key]


async def start(starter: warm.Starter, specification: Path, say: Callable[[int, str], None]) -> Process:
    """Start a container. say: gets each line of its output, with 1 for standard output and 2 for errors."""
    pipes = [os.pipe(), os.pipe()]
    started: Future[warm.Process] = starter.start(specification, [write for _, write in pipes])
    process = await asyncio.wrap_future(started)
    readers = [asyncio.create_task(_read(read, number, say)) for number, (read, _) in enumerate(pipes, start=1)]
    return Process(process, readers)


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
