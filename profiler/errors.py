"""Errors whose text is meant for the user: one line that names the thing, what was expected and what to do."""

from __future__ import annotations

import pyarrow as pa

# What reading a file of an unknown writer can raise in libraries: broken content, names that are no text, sizes beyond limits.
UNREADABLE = (
    pa.ArrowException,
    ArithmeticError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class SpecmoeError(Exception):
    """Base class; the command line prints the text and exits with 1."""


class TraceError(SpecmoeError):
    """A trace (or a file of one) is missing, incomplete, inconsistent or not ours."""


class EmptyPartError(TraceError):
    """No problem of the trace falls into the asked part of the split."""


class ModelError(SpecmoeError):
    """A model is unknown, cannot be loaded, or has no routed experts."""


class DatasetError(SpecmoeError):
    """A dataset is unknown, cannot be read, or lacks a column."""


class UnreachableError(DatasetError):
    """The hub that has a dataset cannot be reached, or does not give it."""


class EngineError(SpecmoeError):
    """An inference engine is not installed, or the capture inside it failed."""


class EngineStoppedError(EngineError):
    """An engine ended while it ran: for want of memory, say. Another one may do better."""


def first_line(error: BaseException) -> str:
    """An exception as one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def printable(text: str) -> str:
    """Text without control characters: names in a stranger's file must not steer the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
