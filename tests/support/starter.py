"""A warm interpreter that forks processes: slow imports happen once, not in every process.

`support.warm` runs this file as a script, with the names of the modules to import as arguments and a listening socket as
standard input. It needs only the standard library. Each request is the path of a process's specification, with two file
descriptors for its output; each answer is a JSON object. When a connection closes, the processes that were requested over it
are killed; when all have closed, this program ends.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import sys
import threading
import traceback
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000
READ_ONLY, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 32, 4096, 16384, 1 << 18
KILLED_WITH_PARENT = 1


@dataclass(frozen=True, kw_only=True)
class Specification:
    """A process: `python -m MODULE ARGUMENTS`, or `python MODULE ARGUMENTS` for the path of a script, which ends in `.py`.

    environment: all variables. python_path: folders of modules, after the working directory. warm_children: processes that it
    spawns are warm, too. cores: those that it may use; all if empty. root: for a container, an empty folder to build its own
    file system on. The rest is for containers only. mounts: folders at paths in the container, (path, folder here, read only).
    files: (path, file here), copied. kept: folders with the interpreter, visible even below the paths that containers have for
    themselves.
    """

    module: str
    arguments: list[str]
    workdir: str
    environment: dict[str, str]
    python_path: list[str]
    warm_children: bool = False
    cores: list[int] = field(default_factory=list)
    root: str | None = None
    mounts: list[tuple[str, str, bool]] = field(default_factory=list)
    files: list[tuple[str, str]] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def main() -> NoReturn:
    """Import, then start processes until all connections have closed."""
    for name in sys.argv[1:]:
        # An environment need not have all.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # It finds the memory for a process's title only with the variables that the process began with.
    with contextlib.suppress(ImportError):
        importlib.import_module("setproctitle").getproctitle()
    # To look at a model's class, vLLM starts another interpreter, which imports all of it, lest CUDA be initialized here.
    if (registry := sys.modules.get("vllm.model_executor.models.registry")) is not None:
        registry._run_in_subprocess = lambda look: look()  # type: ignore[attr-defined]
    # The forks share these objects' memory as long as their garbage collectors do not touch them. An engine collects a dozen
    # times, and unfreezes them first.
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None
    specification = start_processes(socket.socket(fileno=os.dup(0)))
    if specification is None:
        os._exit(0)
    code = 1
    try:
        run(specification)
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        leave(code)


def start_processes(listening: socket.socket) -> Specification | None:
    """Fork a process for each request; returns its specification in the process, and None in this one at the end."""
    waiting = selectors.DefaultSelector()
    waiting.register(listening, selectors.EVENT_READ)
    # Where requests come from, and each one's processes: by a handle that becomes readable when the process ends, its number.
    running: dict[socket.socket, dict[int, int]] = {}
    while True:
        for key, _ in waiting.select():
            if key.fileobj is listening:
                control, _ = listening.accept()
                running[control] = {}
                waiting.register(control, selectors.EVENT_READ, control)
                continue
            control = key.data
            if control not in running:
                # It was closed in this very round.
                continue
            if key.fileobj is not control:
                pid = running[control].pop(key.fd)
                _, status = os.waitpid(pid, 0)
                waiting.unregister(key.fd)
                os.close(key.fd)
                _answer(control, {"ended": pid, "code": os.waitstatus_to_exitcode(status)})
                continue
            request, outputs = _next(control)
            if not request:
                _end(waiting, control, running.pop(control))
                if not running:
                    return None
                continue
            specification = Specification(**json.loads(Path(request.decode()).read_text()))
            starter = os.getpid()
            pid = os.fork()
            if pid == 0:
                for other in running:
                    other.close()
                listening.close()
                waiting.close()
                for handle in [handle for handles in running.values() for handle in handles]:
                    os.close(handle)
                _detach(outputs, starter)
                return specification
            for output in outputs:
                os.close(output)
            # Here too: the process may be killed before it gets that far.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.setpgid(pid, pid)
            handle = os.pidfd_open(pid)
            running[control][handle] = pid
            waiting.register(handle, selectors.EVENT_READ, control)
            _answer(control, {"started": request.decode(), "pid": pid})


def _end(waiting: selectors.BaseSelector, control: socket.socket, processes: dict[int, int]) -> None:
    """Kill the processes that were requested over a connection, and close it."""
    for handle, pid in processes.items():
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        waiting.unregister(handle)
        os.close(handle)
    waiting.unregister(control)
    control.close()


def _next(control: socket.socket) -> tuple[bytes, list[int]]:
    try:
        request, outputs, _, _ = socket.recv_fds(control, 1 << 16, 2)
    except ConnectionResetError:
        # The server went away with answers unread.
        return b"", []
    return request, outputs


def _answer(control: socket.socket, answer: dict[str, Any]) -> None:
    # A server that has gone away is noticed at the next request.
    with contextlib.suppress(OSError):
        control.send(json.dumps(answer).encode())


def _detach(outputs: list[int], starter: int) -> None:
    """Make a process of its own out of the fork: its group, its output, and it dies with the starter."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(KILLED_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != starter:
        os._exit(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, output in enumerate([nothing, *outputs]):
        os.dup2(output, number)
        os.close(output)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def run(specification: Specification) -> None:
    """Run the module in the process's own environment and, if it is a container, file system."""
    if specification.root is not None:
        enter(specification, specification.root)
        # What is installed as a link to a checkout is not a part of the image.
        sys.path[:] = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
        links = [finder for finder in sys.meta_path if getattr(finder, "__module__", "").startswith("__editable__")]
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in links]
    else:
        os.chdir(specification.workdir)
    os.environ.clear()
    os.environ.update(specification.environment)
    if specification.cores:
        os.sched_setaffinity(0, specification.cores)
    # As `python -m` makes it.
    sys.path[:] = [specification.workdir, *specification.python_path, *sys.path]
    sys.argv = [specification.module, *specification.arguments]
    # A shell's background job hands SIGINT down as ignored, and the tests may run in one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if specification.warm_children:
        from support.spawning import spawn_from_here

        if (spawned := spawn_from_here()) is not None:
            spawned()
            return
    if specification.module.endswith(".py"):
        runpy.run_path(specification.module, run_name="__main__")
    else:
        runpy.run_module(specification.module, run_name="__main__", alter_sys=True)


def leave(code: int) -> NoReturn:
    """End a forked process as `multiprocessing` does: without destructors of libraries that wait for the starter's threads."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def enter(specification: Specification, root: str) -> None:
    """Give this process a file system of its own: this machine's, with /root, /tmp, mounts and files of the container."""
    user, group = os.getuid(), os.getgid()
    _check(ctypes.CDLL(None, use_errno=True).unshare(NEW_MOUNTS | (NEW_USER if user else 0)), "unshare")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount(None, "/", flags=RECURSIVE | PRIVATE)
    _mount("tmpfs", root, kind="tmpfs")
    mounts = {path: (folder, read_only) for path, folder, read_only in specification.mounts}
    own = {"/root", "/tmp", *mounts}
    kept = [path for path in specification.kept if any(path.startswith(f"{fresh}/") for fresh in own)]
    _mirror("/", root, own=own, opened={str(parent) for path in own for parent in Path(path).parents})
    for path in sorted(own):
        Path(root + path).mkdir(parents=True, exist_ok=True)
        if path in mounts:
            folder, read_only = mounts[path]
            _mount(folder, root + path, flags=BIND)
            if read_only:
                _mount(None, root + path, flags=BIND | REMOUNT | READ_ONLY)
    for path in kept:
        Path(root + path).mkdir(parents=True, exist_ok=True)
        _mount(path, root + path, flags=BIND | RECURSIVE)
    for path, source in specification.files:
        Path(root + path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, root + path)
        # By its content: caches of what was compiled from a file know it again by its path, size and time.
        os.utime(root + path, (zlib.crc32(Path(source).read_bytes()),) * 2)
    os.chroot(root)
    os.chdir(specification.workdir)


def _mirror(folder: str, root: str, *, own: set[str], opened: set[str]) -> None:
    """Show what is in `folder` below `root`, but for the paths in `own`, whose parents are in `opened`."""
    for entry in os.scandir(folder):
        target = root + entry.path
        if entry.path in own or entry.path == root:
            continue
        if entry.path in opened:
            Path(target).mkdir()
            _mirror(entry.path, root, own=own, opened=opened)
        elif entry.is_symlink():
            Path(target).symlink_to(Path(entry.path).readlink())
        elif entry.is_dir():
            Path(target).mkdir()
            _mount(entry.path, target, flags=BIND | RECURSIVE)
        elif entry.is_file():
            Path(target).touch()
            _mount(entry.path, target, flags=BIND)


def _mount(source: str | None, target: str, *, kind: str | None = None, flags: int = 0) -> None:
    arguments = [None if text is None else text.encode() for text in (source, target, kind)]
    done = ctypes.CDLL(None, use_errno=True).mount(*arguments, ctypes.c_ulong(flags), None)
    _check(done, f"mount {source or ''} on {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(
            number, f"{what}: {os.strerror(number)}; containers need mount namespaces, and user namespaces without root"
        )


if __name__ == "__main__":
    main()
