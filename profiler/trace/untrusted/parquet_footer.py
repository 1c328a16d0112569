"""How many values each column of a Parquet file promises, read from its footer, and how large its pages are, from theirs.

A list of a billion entries fits into a few bytes, and so does a page of gigabytes: this must be known before anything
is decoded. pyarrow knows the first, but pyarrow 26 ends the process when it is asked about the columns of some broken footers,
and does not tell the second; and of Thrift's compact protocol little is needed (apache/parquet-format, parquet.thrift:
FileMetaData 4 -> RowGroup 1, 3 -> ColumnChunk 3 -> ColumnMetaData 3, 5, 7, 9, 11; PageHeader 2, 3, 5, 8).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from profiler.errors import TraceError

MAGIC = b"PAR1"
MAX_FOOTER_BYTES = 32 << 20
# A page's header may repeat its least and greatest value.
HEADER_BYTES, MAX_HEADER_BYTES = 1 << 10, 16 << 20
MAX_PAGES = 1_000_000
MAX_STRUCTS = 2_000_000
MAX_DEPTH = 16

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT, _UUID = range(1, 14)
_FIXED = {_BYTE: 1, _DOUBLE: 8, _UUID: 16}
# What reading a broken document raises.
BROKEN = (ValueError, LookupError, TypeError, AttributeError, OSError, struct.error)


# parquet.thrift, Encoding: each value is told by how much of the one before it repeats.
DELTA_BYTE_ARRAY = 7


@dataclass(frozen=True)
class RowGroup:
    """What a row group promises. values: of each leaf column, entries of lists counted one by one; chunks: of each, by name."""

    rows: int
    values: list[int]
    chunks: dict[bytes, Chunk]


@dataclass(frozen=True)
class Chunk:
    """Where the pages of a column in a row group lie in the file."""

    start: int
    size: int


@dataclass(frozen=True)
class Page:
    """A page of a column: bytes once decompressed, and how its values are encoded, None for what is no page of values."""

    size: int
    encoding: int | None


def read_row_groups(path: Path) -> list[RowGroup]:
    """The row groups of a Parquet file. Raises `TraceError` if its footer cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 8))
            length, magic = struct.unpack("<I4s", file.read(8))
            if magic != MAGIC or length > min(size, MAX_FOOTER_BYTES):
                raise ValueError(f"no footer of at most {MAX_FOOTER_BYTES >> 20} MiB at its end")
            file.seek(size - 8 - length)
            document = _Reader(file.read(length)).struct()
        return [
            RowGroup(
                rows=_count(group[3]),
                values=[_count(column[3][5]) for column in group[1]],
                chunks={b".".join(column[3].get(3, [])): _chunk(column[3]) for column in group[1]},
            )
            for group in _structs(document.get(4, []))
        ]
    except BROKEN as error:
        raise TraceError(f"{path} is not a readable Parquet file: {type(error).__name__}: {error}") from error


def read_pages(path: Path, chunk: Chunk) -> list[Page]:
    """The pages of a column chunk, from their headers alone. Raises `TraceError` if they cannot be read."""
    pages = []
    try:
        with path.open("rb") as file:
            at, end = chunk.start, chunk.start + chunk.size
            while at < end:
                header, length = _page_header(file, at)
                values = header.get(5, {}).get(2), header.get(8, {}).get(4)
                pages.append(
                    Page(max(_count(header[2]), _count(header[3])), next((each for each in values if each is not None), None))
                )
                at += length + _count(header[3])
                if len(pages) > MAX_PAGES:
                    raise ValueError(f"more than {MAX_PAGES:,} pages in a column of a row group")
    except BROKEN as error:
        raise TraceError(f"{path} is not a readable Parquet file: {type(error).__name__}: {error}") from error
    return pages


def _page_header(file: BinaryIO, at: int) -> tuple[dict[int, Any], int]:
    """The header that begins at a place in the file, and its length."""
    room = HEADER_BYTES
    while True:
        file.seek(at)
        data = file.read(room)
        reader = _Reader(data)
        try:
            return reader.struct(), reader.at
        except (ValueError, IndexError):
            if len(data) < room or room >= MAX_HEADER_BYTES:
                raise
        room *= 8


def _chunk(column: dict[int, Any]) -> Chunk:
    """As pyarrow finds it: a dictionary, if there is one, comes before the values."""
    values, dictionary = _count(column.get(9, 0)), _count(column.get(11, 0))
    return Chunk(dictionary if 0 < dictionary < values else values, _count(column.get(7, 0)))


def _structs(value: Any) -> list[dict[int, Any]]:
    if not isinstance(value, list):
        raise TypeError("row groups are no list")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no number of rows or values")
    return value


class _Reader:
    """Thrift's compact protocol: structs as dictionaries by field number, integers, texts as bytes, lists; no more."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0
        self._structs = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """A struct, from its first field to its end."""
        self._structs += 1
        if self._structs > MAX_STRUCTS or depth > MAX_DEPTH:
            raise ValueError("more structs than any footer needs")
        fields: dict[int, Any] = {}
        number = 0
        while kind := self._byte():
            delta, kind = kind >> 4, kind & 15
            number = number + delta if delta else self._integer()
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (_I16, _I32, _I64):
            return self._integer()
        if kind in _FIXED:
            return self._skip(_FIXED[kind])
        if kind == _BINARY:
            size = self._varint()
            self._skip(size)
            return self._data[self.at - size : self.at]
        if kind in (_LIST, _SET):
            return self._list(depth + 1)
        if kind == _MAP:
            return self._map(depth + 1)
        if kind == _STRUCT:
            return self.struct(depth + 1)
        raise ValueError(f"unknown type {kind}")

    def _list(self, depth: int) -> list[Any]:
        if depth > MAX_DEPTH:
            raise ValueError("lists in lists without end")
        head = self._byte()
        size, kind = head >> 4, head & 15
        size = self._varint() if size == 15 else size
        self._fits(size)
        if kind == _STRUCT:
            return [self.struct(depth + 1) for _ in range(size)]
        if kind == _BINARY:
            return [self._value(kind, depth) for _ in range(size)]
        for _ in range(size):
            self._skip(1) if kind in (_TRUE, _FALSE) else self._value(kind, depth + 1)
        return []

    def _map(self, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise ValueError("maps in maps without end")
        size = self._varint()
        self._fits(size)
        if size:
            kinds = self._byte()
            for _ in range(size):
                for kind in (kinds >> 4, kinds & 15):
                    self._skip(1) if kind in (_TRUE, _FALSE) else self._value(kind, depth + 1)

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    def _byte(self) -> int:
        value = self._data[self.at]
        self.at += 1
        return value

    def _skip(self, count: int) -> None:
        self._fits(count)
        self.at += count

    def _fits(self, count: int) -> None:
        """Every entry takes a byte at least."""
        if count > len(self._data) - self.at:
            raise ValueError("ends in the middle")
