"""What the Modal files have in common: how errors and progress reach a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import modal

from profiler.errors import SpecmoeError, first_line


@contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """Errors that a user can meet as one line and exit code 1."""
    try:
        yield
    except modal.exception.NotFoundError as error:
        raise SystemExit(f"{name}: {first_line(error)}") from None
    except modal.exception.Error as error:
        raise SystemExit(f"{name}: {type(error).__name__}: {first_line(error)}; run again to resume") from None
    except (SpecmoeError, OSError) as error:
        raise SystemExit(f"{name}: {' '.join(str(error).split())}") from None


def say(text: str) -> None:
    """Print a line at once: Modal shows what its machines print."""
    print(text, flush=True)
