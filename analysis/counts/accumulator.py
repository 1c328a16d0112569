"""What every statistic is counted with: a table that takes chunks, adds up with tables of other parts, and can be stored."""

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
    """Counts of a part of a trace, of whole problems.

    `added` names the attributes, all arrays, that add up when parts are merged. A subclass with anything else extends `tables`,
    or `merge`, `state` and `restore`. What a merge gives is what one pass over both parts gives, exactly where it is a count.
    """

    added: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def update(self, frame: Frame) -> None:
        """Count a frame. Frames of a part come in order."""

    def close(self) -> None:
        """Count what only the end of the last problem settles. Called once, after the last frame of a part."""
        return

    def tables(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays that add up, by name."""
        return {name: getattr(self, name) for name in self.added}

    def merge(self, other: Self) -> None:
        """Add the counts of another part."""
        theirs = other.tables()
        for name, mine in self.tables().items():
            mine += theirs[name]

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything as arrays, for `restore`."""
        return self.tables()

    def restore(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Take what another's `state` gave. Raises `TraceError` if its arrays are of other shapes or types."""
        for name, mine in self.tables().items():
            stored = state.get(name)
            if stored is None or stored.shape != mine.shape or stored.dtype != mine.dtype:
                found = "nothing" if stored is None else f"{stored.dtype} {stored.shape}"
                raise TraceError(f"stored counts of another analysis: {name} is {found}, expected {mine.dtype} {mine.shape}")
            mine[...] = stored
