"""What the parts of the server share: settings, events, and the base of a part."""

from __future__ import annotations

import itertools
import secrets
import sys
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from grpclib import GRPCError, Status

if TYPE_CHECKING:
    from support.modal_server.server import Server

_numbers = itertools.count(1)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """preempt: inputs of a map, by number, whose first container is preempted, so many seconds after the input reached it.

    python: the interpreter whose packages containers have. modules: imported before containers start, with the usual ones; they
    see the variables of the image, but not those that our code sets. secrets: by name, environment variables and their values.
    environment: further variables of all containers. max_containers: of a function that sets no limit.
    """

    preempt: Set[int] = frozenset()
    preempt_after: float = 0.5
    python: Path = Path(sys.executable)
    modules: tuple[str, ...] = ()
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    max_containers: int = 4


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened: `container_start`, `container_end`, `input`, `preempt` or `volume_commit`.

    function: its name, which for a class is `Class.*`. input: its number in the call. files: paths that changed on the Volume.
    """

    kind: str
    container: str
    function: str
    input: int | None = None
    volume: str = ""
    files: tuple[str, ...] = ()


class Part:
    """A part of the server. Each public method in CamelCase answers the procedure of Modal's API that has this name."""

    def __init__(self, server: Server) -> None:
        self.server = server


def new_id(prefix: str) -> str:
    """An id as Modal's are, which no one can guess."""
    return f"{prefix}-{next(_numbers)}{secrets.token_hex(8)}"


def not_found(text: str) -> GRPCError:
    """The error for something that does not exist."""
    return GRPCError(Status.NOT_FOUND, text)


def already_exists(text: str) -> GRPCError:
    """The error for something that exists."""
    return GRPCError(Status.ALREADY_EXISTS, text)
