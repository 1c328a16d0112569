"""The base of all counts: tables that are updated chunk by chunk, merged with those of other parts, and stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from analysis.counts.frames import Frame
from profiler.errors import TraceError

Counts = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


class Accumulator(ABC):
    """Counts of a part of a trace that consists of whole problems.

    `added` names the array attributes that are summed when parts are merged. A subclass with other state extends `tables`, or
    `merge`, `state` and `restore`. A merge gives the same result as one pass over both parts; for integer counts, exactly.
    """

    added: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def update(self, frame: Frame) -> None:
        """Count a frame. The frames of a part must come in order."""

    def close(self) -> None:
        """Finish the counts that depend on the end of the last problem. Called once, after the last frame of a part."""
        return

    def tables(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays that are summed in a merge, by name."""
        return {name: getattr(self, name) for name in self.added}

    def merge(self, other: Self) -> None:
        """Add the counts of another part."""
        theirs = other.tables()
        for name, mine in self.tables().items():
            mine += theirs[name]

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The complete state as arrays, for `restore`."""
        return self.tables()

    def restore(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Load the arrays of `state`. Raises `TraceError` if one is missing or has another shape or type."""
        for name, mine in self.tables().items():
            stored = state.get(name)
            if stored is None or stored.shape != mine.shape or stored.dtype != mine.dtype:
                found = "nothing" if stored is None else f"{stored.dtype} {stored.shape}"
                raise TraceError(f"stored counts of another analysis: {name} is {found}, expected {mine.dtype} {mine.shape}")
            mine[...] = stored
