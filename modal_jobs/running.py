"""How errors and progress of all Modal apps reach the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import modal

from profiler.errors import SpecmoeError, first_line, printable


@contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """Turn errors that users can cause or encounter into one line and exit code 1."""
    try:
        yield
    except (modal.exception.NotFoundError, modal.exception.InvalidError) as error:
        raise SystemExit(f"{name}: {printable(first_line(error))}") from None
    except modal.exception.Error as error:
        # For example, a lost connection or a timeout.
        raise SystemExit(f"{name}: {type(error).__name__}: {printable(first_line(error))}; run again to resume") from None
    except (SpecmoeError, OSError) as error:
        raise SystemExit(f"{name}: {printable(' '.join(str(error).split()))}") from None


def say(text: str) -> None:
    """Print a line and flush it, so that Modal shows it immediately."""
    print(printable(text), flush=True)
