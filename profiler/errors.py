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


# Packages that are not always installed, by the extra that brings them.
EXTRAS = {
    "collect": ("datasets", "huggingface_hub", "psutil", "pynvml", "safetensors", "torch", "transformers"),
    "analysis": ("jinja2", "numba", "plotly", "scipy", "sklearn", "tokenizers"),
    "train": ("accelerate", "numba", "safetensors", "tensorboardX", "threadpoolctl", "torch"),
    "lowmem": ("bitsandbytes",),
    "modal": ("modal",),
    "quantize": ("llmcompressor",),
}


def missing_extra(error: ModuleNotFoundError) -> str:
    """What to install for a package that is not there, as one line."""
    package = (error.name or "").partition(".")[0]
    extras = [extra for extra, packages in EXTRAS.items() if package in packages]
    if not extras:
        return f"the Python package {package or '?'} is not installed: {error}"
    commands = " or ".join(f"pip install 'speculative-moe[{extra}]'" for extra in extras)
    return f"this needs the Python package {package}, which is not installed: {commands}"


def first_line(error: BaseException) -> str:
    """An exception as one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def printable(text: str) -> str:
    """Text without control characters: names in a stranger's file must not steer the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
