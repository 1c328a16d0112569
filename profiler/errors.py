"""Errors whose message is written for the user: one line that names the problem, what was expected, and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    from pydantic import ValidationError

# What libraries raise when they read an untrusted file: broken content, names that are not text, sizes beyond limits. Neither
# TypeError nor LookupError: those are errors of our own code, and must not be reported as a broken file.
UNREADABLE = (
    pa.ArrowException,
    ArithmeticError,
    EOFError,
    MemoryError,
    OSError,
    RuntimeError,
    ValueError,
)


class SpecmoeError(Exception):
    """Base class of all errors that this project raises on purpose.

    The message is one line for the user. The command line prints it and exits with status 1, or 2 if it is a `UsageError`.

    Example:
        >>> from profiler import SpecmoeError, Trace
        >>> try:
        ...     Trace.open("no/such/trace")
        ... except SpecmoeError as error:
        ...     print(error)
        no/such/trace: no such trace directory
    """


class UsageError(SpecmoeError):
    """A chosen value does not exist or cannot be, or contradicts another one, whatever files and models contain.

    The command line exits with status 2, as for an unknown option.
    """


class TraceError(SpecmoeError):
    """A trace, or a file of one, is missing, incomplete, inconsistent or not in the trace format.

    Where a file is at fault, the message names the file and the place in it (row group and row, or line).
    """


class EmptyPartError(TraceError):
    """The requested part of the split contains no problem of the trace."""


class ModelError(SpecmoeError):
    """A model is unknown, cannot be loaded, has no routed experts, or does not fit on the GPU."""


class DatasetError(SpecmoeError):
    """A dataset is unknown or empty, cannot be read, or lacks a column."""


class UnreachableError(DatasetError):
    """The hub that hosts a dataset cannot be reached, or does not serve the dataset."""


class EngineError(SpecmoeError):
    """An inference engine is not installed, or recording the routing inside it failed."""


class TraceUsageError(TraceError, UsageError):
    """A chosen format of traces does not exist."""


class ModelUsageError(ModelError, UsageError):
    """A chosen model, precision or machine does not exist."""


class DatasetUsageError(DatasetError, UsageError):
    """A chosen dataset does not exist, or what is to be taken of it cannot be."""


class EngineUsageError(EngineError, UsageError):
    """A chosen engine does not exist, or does not have a chosen option."""


class NothingToRunError(EngineError):
    """None of a collection's problems can be run.

    problems: how many there are. gaps: why, in the lines that a trace of others has for them.
    """

    def __init__(self, problems: int, gaps: list[str]) -> None:
        super().__init__(f"none of {counted(problems, 'problem')} can be run; {gaps[0]}")
        self.problems = problems
        self.gaps = gaps

    def __reduce__(self) -> tuple[type[NothingToRunError], tuple[int, list[str]]]:
        """How to copy it into another process: with both arguments, of which `args` has only the message."""
        return type(self), (self.problems, self.gaps)


class EngineStoppedError(EngineError):
    """An engine stopped while it was running, for example because it ran out of memory. Another engine may work."""


# Optional packages, by the extra that installs them.
EXTRAS = {
    "collect": ("datasets", "huggingface_hub", "psutil", "pynvml", "safetensors", "torch", "transformers"),
    "analysis": ("jinja2", "numba", "plotly", "scipy", "sklearn", "threadpoolctl", "tokenizers"),
    "figures": ("matplotlib",),
    "train": ("accelerate", "numba", "safetensors", "tensorboardX", "threadpoolctl", "torch"),
    "live": ("prometheus_client",),
    "lowmem": ("bitsandbytes",),
    "modal": ("modal",),
    "quantize": ("llmcompressor",),
}


def missing_extra(error: ModuleNotFoundError) -> str:
    """One line that says what to install for a package that is missing."""
    package = (error.name or "").partition(".")[0]
    extras = [extra for extra, packages in EXTRAS.items() if package in packages]
    if not extras:
        return f"the Python package {package or '?'} is not installed: {error}"
    commands = " or ".join(f"pip install 'speculative-moe[{extra}]'" for extra in extras)
    return f"this needs the Python package {package}, which is not installed: {commands}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its type if it has no message."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def first_fault(error: ValidationError) -> str:
    """The first fault of a document, in one line: the field, and what was expected of it."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field, what = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    return printable(f"{field}: {what}" if field else what)


def counted(count: int, noun: str) -> str:
    """A number with its noun.

    Example:
        >>> counted(1, "problem"), counted(2048, "MoE layer")
        ('1 problem', '2,048 MoE layers')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def printable(text: str) -> str:
    """The text with every control character replaced: names in an untrusted file must not control the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
