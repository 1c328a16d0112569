"""Reading text that strangers wrote: JSON lines in blocks, and the beginning of a file to tell what it is.

Not by pyarrow's JSON reader: pyarrow 26 ends the process where a value that is no object stands between the lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic_core import from_json

from profiler.capture_stream import first_line
from profiler.errors import TraceError
from profiler.importers.target import MAX_LINE_BYTES
from profiler.schema import MAX_TOP_K

HEAD_BYTES = 1 << 16
BLOCK_BYTES = 4 << 20


def head(path: Path) -> str:
    """The first 64 KiB of a file as text; empty for a folder or a file that cannot be read."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return file.read(HEAD_BYTES).decode("utf-8", errors="replace")


def first_object(path: Path) -> dict[str, Any]:
    """The first line of JSON lines, if it is a short object; else empty."""
    try:
        found = from_json(head(path).lstrip("\ufeff").partition("\n")[0])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Objects:
    """N objects of JSON lines that follow each other, and their line numbers `[N]`."""

    path: Path
    objects: list[dict[str, Any]]
    numbers: list[int]

    @property
    def where(self) -> str:
        """How messages call them."""
        return f"{self.path}, lines {self.numbers[0]}..{self.numbers[-1]}"

    def having(self, name: str, value: object) -> Objects:
        """Those whose `name` is `value`."""
        keep = [n for n, found in enumerate(self.objects) if found.get(name) == value]
        return Objects(self.path, [self.objects[n] for n in keep], [self.numbers[n] for n in keep])

    def texts(self, name: str) -> list[str]:
        """Texts or whole numbers as text. Raises `TraceError`, naming the line, if there is neither."""
        values = [found.get(name) for found in self.objects]
        for number, value in zip(self.numbers, values, strict=True):
            if not isinstance(value, str | int):
                raise TraceError(f"{self.path}, line {number}: expected a text {name!r}")
        return [str(value) for value in values]

    def integers(self, name: str) -> npt.NDArray[np.int64]:
        """Whole numbers `[N]`. Raises `TraceError`, naming the line, if one is absent or no such number."""
        values: list[Any] = [found.get(name) for found in self.objects]
        if {*map(type, values)} != {int} or not -(2**63) <= min(values) <= max(values) < 2**63:
            self._refuse(values, lambda value: type(value) is int and -(2**63) <= value < 2**63, f"a whole number {name!r}")
        return np.array(values, dtype=np.int64)

    def lists(self, name: str, fill: float) -> npt.NDArray[Any]:
        """Lists of numbers `[N, K]`, shorter ones filled up with `fill`: int64 if that is an int, else float64.

        Raises `TraceError`, naming the line, if one is absent, longer than any router's K, or not of such numbers.
        """
        kinds = {int} if isinstance(fill, int) else {int, float}

        def is_number(value: Any) -> bool:
            return type(value) in kinds and abs(value) < 2**31

        values: list[Any] = [found.get(name) for found in self.objects]
        if {*map(type, values)} != {list} or max(map(len, values)) > MAX_TOP_K:
            what = f"a list {name!r} of at most {MAX_TOP_K} numbers"
            self._refuse(values, lambda value: isinstance(value, list) and len(value) <= MAX_TOP_K, what)
        flat = [*chain.from_iterable(values)]
        if not {*map(type, flat)} <= kinds or (flat and not -(2**31) < min(flat) <= max(flat) < 2**31):
            self._refuse(values, lambda value: all(map(is_number, value)), f"numbers of a sensible size in {name!r}")
        lengths_N = np.array([*map(len, values)])
        there_NK = np.arange(lengths_N.max(initial=0)) < lengths_N[:, None]
        array_NK = np.full(there_NK.shape, fill, dtype=np.int64 if kinds == {int} else np.float64)
        array_NK[there_NK] = flat
        return array_NK

    def _refuse(self, values: list[Any], is_sound: Callable[[Any], bool], what: str) -> None:
        """Raise `TraceError` for the first value that is not sound."""
        for number, value in zip(self.numbers, values, strict=True):
            if not is_sound(value):
                raise TraceError(f"{self.path}, line {number}: expected {what}")


def json_lines(path: Path) -> Iterator[Objects]:
    """The objects of JSON lines, about 4 MiB at a time.

    Raises `TraceError`, naming the line, on one that is no object or longer than 64 MiB.
    """
    if not path.is_file():
        raise TraceError(f"{path}: no such file")
    number = 1
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            block += file.readline(MAX_LINE_BYTES)
            if len(block) >= MAX_LINE_BYTES and not block.endswith(b"\n"):
                raise TraceError(f"{path}: a line longer than {MAX_LINE_BYTES >> 20} MiB")
            lines = block.split(b"\n")
            if not lines[-1]:
                lines.pop()
            kept = [(number + n, line) for n, line in enumerate(lines) if line.strip()]
            number += len(lines)
            if kept:
                yield Objects(path, _objects(path, kept), [n for n, _ in kept])


def _objects(path: Path, lines: list[tuple[int, bytes]]) -> list[dict[str, Any]]:
    """The objects of numbered lines: all at once, and one by one if something is wrong with them."""
    try:
        found = from_json(b"[" + b",".join(line for _, line in lines) + b"]")
    except ValueError:
        found = []
    if len(found) != len(lines) or {*map(type, found)} != {dict}:
        found = [_object(path, *numbered) for numbered in lines]
    return list(found)


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        found = from_json(line)
    except ValueError as error:
        raise TraceError(f"{path}, line {number}: not JSON: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise TraceError(f"{path}, line {number}: expected an object")
    return found
