"""Python processes that start fast: forks of an interpreter that has already imported the slow libraries.

Importing vLLM takes ten seconds, torch two. A process from here differs from `python -m MODULE` in nothing else, as long as no
variable changes that a library reads while it is imported: `run` and `start` refuse that.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TypeVar

from support.starter import Specification

STARTER = Path(__file__).with_name("starter.py")
TESTS = Path(__file__).resolve().parents[1]

LIBRARIES = (
    *("numpy", "pyarrow.dataset", "pyarrow.parquet", "pydantic", "typer", "rich.progress", "scipy.stats", "sklearn.metrics"),
    *("torch", "torch._dynamo", "datasets", "transformers.models.auto.modeling_auto"),
    *("transformers.models.mixtral.modeling_mixtral", "transformers.generation.utils"),
    *("vllm", "vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.v1.executor.uniproc_executor", "vllm.v1.worker.cpu_worker"),
    *("vllm.v1.worker.cpu_model_runner", "vllm.model_executor.models.mixtral"),
)
T = TypeVar("T")

# The test processes of one run have this in common.
RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", uuid.uuid4().hex)

# Beginnings of the names of variables that libraries read while they are imported.
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "OMP_", "MKL_", "TORCH", "NUMBA_", "VLLM_LOGGING", "VLLM_CONFIGURE", "LD_")


@dataclass
class Process:
    """A process, which is in a group of its own. code: its exit code, once it has ended; negative for a signal."""

    pid: int
    code: Future[int]


class Starter:
    """A warm interpreter, which lives until every process that uses it has ended.

    python: the interpreter. modules: imported beforehand, in `environment`; those that it lacks are left out. All test
    processes of a run share an interpreter with the same arguments, since each takes seconds and hundreds of megabytes.
    read_at_import: the variables of `environment` that libraries read while they are imported.
    """

    def __init__(self, python: Path, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        kept = {name: environment[name] for name in sorted(environment) if name.startswith((*READ_AT_IMPORT, "MODAL_"))}
        self.read_at_import = kept
        identity = hashlib.sha256(json.dumps([RUN, str(python), list(modules), kept]).encode()).hexdigest()
        self._name = f"{python.name} with {', '.join(modules)}"
        # Tests run at the same time, and OpenMP's threads spin while they wait.
        environment = {**environment, "OMP_NUM_THREADS": "1"}
        self._control = _connection(f"\0specmoe-{identity}", [str(python), "-P", str(STARTER), *modules], environment)
        self._lock = threading.Lock()
        self._started: dict[str, Future[Process]] = {}
        self._ended: dict[int, Future[int]] = {}
        self._receiver = threading.Thread(target=self._receive, name="starter", daemon=True)
        self._receiver.start()
        atexit.register(self._close)

    @property
    def alive(self) -> bool:
        """Whether it can start processes."""
        return self._receiver.is_alive()

    def start(self, specification: Path, outputs: Sequence[int]) -> Future[Process]:
        """Start the process that a file specifies. outputs: descriptors for its standard output and errors; closed here."""
        started: Future[Process] = _running(Future())
        try:
            with self._lock:
                self._started[str(specification)] = started
                socket.send_fds(self._control, [str(specification).encode()], list(outputs))
        finally:
            for output in outputs:
                os.close(output)
        return started

    def _receive(self) -> None:
        while message := self._next():
            answer = json.loads(message)
            with self._lock:
                if "started" in answer:
                    code: Future[int] = _running(Future())
                    self._ended[answer["pid"]] = code
                    self._started.pop(answer["started"]).set_result(Process(answer["pid"], code))
                else:
                    self._ended.pop(answer["ended"]).set_result(answer["code"])
        lost = RuntimeError(f"the process that starts others has ended: {self._name}")
        with self._lock:
            for started in self._started.values():
                started.set_exception(lost)
            for ended in self._ended.values():
                ended.set_exception(lost)

    def _next(self) -> bytes:
        with contextlib.suppress(OSError):
            return self._control.recv(1 << 16)
        return b""

    def _close(self) -> None:
        # It kills the processes that were started from here, and then closes its end.
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)
        self._receiver.join()


# Kept: a `Popen` that is deleted while its process runs warns of that.
_interpreters: list[subprocess.Popen[bytes]] = []


def _connection(name: str, command: Sequence[str], environment: Mapping[str, str]) -> socket.socket:
    """A connection to the program that listens at an abstract address. It is started if there is none."""
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
            try:
                listening.bind(name)
            except OSError:
                # Another process has the address: only one can.
                pass
            else:
                listening.listen()
                _interpreters.append(
                    subprocess.Popen(command, stdin=listening.fileno(), env=environment, start_new_session=True, cwd="/")
                )
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                connection.connect(name)
            except ConnectionRefusedError:
                # The one that has the address does not listen yet, or is ending.
                connection.close()
                time.sleep(0.01)
            else:
                return connection


def _running(future: Future[T]) -> Future[T]:
    """The same future; whoever waits for it cannot cancel it now."""
    future.set_running_or_notify_cancel()
    return future


class Running:
    """A `python -m MODULE ARGUMENTS` that was started. stderr: its standard error, to read, unless there is a log."""

    def __init__(self, process: Process, stderr: IO[str]) -> None:
        self.pid = process.pid
        self.stderr = stderr
        self._code = process.code

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return not self._code.done()

    def wait(self, timeout: float) -> int:
        """Its exit code. Raises `TimeoutError`."""
        return self._code.result(timeout)


def run(
    module: str,
    *arguments: str | Path,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
    starter: Starter | None = None,
    cwd: Path | None = None,
    warm_children: bool = False,
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run([python, "-m", module, *arguments], capture_output=True, text=True)`.

    module: or the path of a script, which ends in `.py`. environment: additional variables. starter: default: this interpreter
    with `LIBRARIES`. warm_children: what it starts by `multiprocessing`'s method `spawn` is warm, too. Raises
    `subprocess.TimeoutExpired` after killing the process and its group.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        files = [os.open(path, os.O_WRONLY | os.O_CREAT) for path in outputs]
        starter = starter or usual_starter()
        process = _start(starter, Path(folder), module, arguments, environment, files, cwd or Path.cwd(), warm_children)
        try:
            code = process.code.result(timeout)
        except TimeoutError:
            os.killpg(process.pid, 9)
            raise subprocess.TimeoutExpired([module, *arguments], timeout, *(path.read_bytes() for path in outputs)) from None
        stdout, stderr = (path.read_text(errors="replace") for path in outputs)
    return subprocess.CompletedProcess([module, *map(str, arguments)], code, stdout, stderr)


def start(
    module: str,
    *arguments: str | Path,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
    warm_children: bool = False,
) -> Running:
    """Start `python -m module arguments` and return at once.

    log: gets its output; else standard output is dropped. warm_children: as for `run`.
    """
    read, write = os.pipe()
    output = os.open(os.devnull if log is None else log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if log is not None:
        os.dup2(output, write)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [output, write]
        process = _start(usual_starter(), Path(folder), module, arguments, environment, outputs, Path.cwd(), warm_children)
    return Running(process, os.fdopen(read))


def are_read_at_import(names: Iterable[str]) -> list[str]:
    """Which of these variables libraries read while they are imported."""
    return sorted(name for name in names if name.startswith(READ_AT_IMPORT) and name != "HF_TOKEN")


def cores_of_this_process() -> list[int]:
    """The cores that this process may use; empty where that cannot be limited."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _start(
    starter: Starter,
    folder: Path,
    module: str,
    arguments: Sequence[str | Path],
    environment: Mapping[str, str] | None,
    outputs: Sequence[int],
    cwd: Path,
    warm_children: bool,
) -> Process:
    new = {name: value for name, value in (environment or {}).items() if starter.read_at_import.get(name) != value}
    if changed := are_read_at_import(new):
        raise ValueError(f"libraries read {', '.join(changed)} while they are imported, which has happened: use subprocess")
    whole = {**os.environ, **(environment or {})}
    specification = Specification(
        module=module,
        arguments=[str(argument) for argument in arguments],
        workdir=str(cwd),
        environment=whole,
        python_path=[*filter(None, whole.get("PYTHONPATH", "").split(os.pathsep)), str(TESTS)],
        warm_children=warm_children,
        cores=cores_of_this_process(),
    )
    (folder / "specification").write_text(json.dumps(asdict(specification)))
    return starter.start(folder / "specification", outputs).result(300)


@functools.cache
def starter_without_vllm() -> Starter:
    """For processes that import another vLLM than the installed one, or none."""
    return Starter(Path(sys.executable), [name for name in LIBRARIES if not name.startswith("vllm")], os.environ)


@functools.cache
def usual_starter() -> Starter:
    """This interpreter with `LIBRARIES`."""
    return Starter(Path(sys.executable), LIBRARIES, os.environ)
