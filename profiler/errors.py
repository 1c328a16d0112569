"""Errors whose message is written for the user: one line that names the problem, what was expected, and what to do."""

from __future__ import annotations

import pyarrow as pa

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

    The message is one line for the user. The command line prints it and exits with status 1.

    Example:
        >>> from profiler import SpecmoeError, Trace
        >>> try:
        ...     Trace.open("no/such/trace")
        ... except SpecmoeError as error:
        ...     print(error)
        no/such/trace: no such trace directory
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


class NothingToRunError(EngineError):
    """None of a collection's problems can be run.

    problems: how many there are. gaps: why, in the lines that a trace of others has for them.
    """

    def __init__(self, problems: int, gaps: list[str]) -> None:
        super().__init__(f"none of the {problems} problems can be run; {gaps[0]}")
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
    "analysis": ("jinja2", "numba", "plotly", "scipy", "sklearn", "tokenizers"),
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


def printable(text: str) -> str:
    """The text with every control character replaced: names in an untrusted file must not control the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
