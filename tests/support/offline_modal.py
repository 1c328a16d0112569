"""Run `modal` commands offline: the real command line and container code, against the server in tests/support/modal_server."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support import warm

if TYPE_CHECKING:
    from support.modal_server.parts import Event

ROOT = Path(__file__).resolve().parents[2]

# What `modal run` imports for our jobs, but for the jobs.
CLIENT = ("modal", "modal.cli.entry_point", "modal.cli.run", "numba", "safetensors.torch", "tokenizers", "accelerate")

# Imported once for all containers of our jobs. The jobs set HF_HUB_OFFLINE, which these read, but the tests have it set anyway.
ENGINES = tuple(name for name in warm.LIBRARIES if name.startswith(("transformers", "vllm")))

needs_modal = pytest.mark.skipif(importlib.util.find_spec("modal") is None, reason="modal is not installed")


@dataclass
class OfflineModal:
    """An account with its Volumes in the folder `state`.

    environment: more variables for its commands. secrets: the account's, by name. modules: as in `Settings`; by default, what
    containers of our jobs import. happened: in the last command.
    """

    state: Path
    environment: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)
    modules: tuple[str, ...] = ENGINES
    happened: list[Event] = field(default_factory=list)

    def run(self, *arguments: str, timeout: float = 400, **settings: Any) -> subprocess.CompletedProcess[str]:
        """`modal ARGUMENTS` to its end. settings: as for `command`."""
        clients = _clients(tuple((name, self.environment[name]) for name in warm.are_read_at_import(self.environment)))
        with self._server(settings) as environment:
            return warm.run("modal", *arguments, environment=environment, timeout=timeout, starter=clients, cwd=ROOT)

    def command(self, *command: str, timeout: float = 400, **settings: Any) -> subprocess.CompletedProcess[str]:
        """Any command that finds the account in its environment. Containers live until it ends.

        settings: of the server, such as `preempt` (`support.modal_server.parts.Settings`).
        """
        with self._server(settings) as environment:
            whole = {**os.environ, **environment}
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=whole, timeout=timeout)

    @contextlib.contextmanager
    def _server(self, settings: dict[str, Any]) -> Iterator[dict[str, str]]:
        """A server that runs during the block; gives the variables of its clients."""
        from support.modal_server.parts import Settings
        from support.modal_server.server import Server

        with Server(
            self.state, dataclasses.replace(Settings(secrets=self.secrets, modules=self.modules), **settings)
        ) as server:
            self.happened = server.events
            yield {
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
                "COLUMNS": "200",
                **server.environment,
                **self.environment,
            }

    def events(self, kind: str) -> list[Event]:
        """Events of one kind in the last command."""
        return [event for event in self.happened if event.kind == kind]

    def volume(self, name: str) -> Path:
        """The committed files of a Volume."""
        return self.state / "volumes" / name


@functools.cache
def _clients(read_at_import: tuple[tuple[str, str], ...]) -> warm.Starter:
    """Modal reads the path of its configuration while it is imported, and then finds none; all else it reads when needed.

    read_at_import: additional variables that libraries read while they are imported.
    """
    libraries = (*CLIENT, *(name for name in warm.LIBRARIES if not name.startswith("vllm")))
    environment = {**os.environ, "MODAL_CONFIG_PATH": os.devnull, "COLUMNS": "200", **dict(read_at_import)}
    return warm.Starter(Path(sys.executable), libraries, environment)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a user sees last of a command that failed."""
    lines = [
        line for line in done.stderr.splitlines() if line.startswith(("analyze:", "collect:", "train:", "quantize:", "Error:"))
    ]
    return lines[-1] if lines else done.stderr
