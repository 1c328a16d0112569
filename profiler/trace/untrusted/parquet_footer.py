"""Read from a Parquet file's footer how many values each column declares, and from its page headers how large its pages are.

A list of a billion entries fits into a few bytes, and so does a page of gigabytes: both must be known before anything is
decoded. pyarrow exposes the number of values, but pyarrow 26 crashes the process when it reads the columns of some broken
footers, and it does not expose page sizes. Only a small part of Thrift's compact protocol is needed (apache/parquet-format,
parquet.thrift:
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
# A page header may contain the page's smallest and largest value.
HEADER_BYTES, MAX_HEADER_BYTES = 1 << 10, 16 << 20
MAX_PAGES = 1_000_000
MAX_STRUCTS = 2_000_000
MAX_DEPTH = 16

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT, _UUID = range(1, 14)
_FIXED = {_BYTE: 1, _DOUBLE: 8, _UUID: 16}
# What parsing a broken footer or header can raise.
BROKEN = (ValueError, LookupError, TypeError, AttributeError, OSError, struct.error)


# parquet.thrift, Encoding: each value is stored as the length of the prefix that it shares with the previous one, and the rest.
DELTA_BYTE_ARRAY = 7


@dataclass(frozen=True)
class DeclaredRowGroup:
    """What a row group declares.

    values: number of values of each leaf column, counting every entry of a list. chunks: leaf column -> its column chunk.
    """

    rows: int
    values: list[int]
    chunks: dict[bytes, ColumnChunk]


@dataclass(frozen=True)
class ColumnChunk:
    """Where the pages of a column in a row group lie in the file."""

    start: int
    size: int


@dataclass(frozen=True)
class Page:
    """A page of a column. size: bytes when decompressed. encoding: of its values; None if it is not a page of values."""

    size: int
    encoding: int | None


def read_row_groups(path: Path) -> list[DeclaredRowGroup]:
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
            DeclaredRowGroup(
                rows=_count(group[3]),
                values=[_count(column[3][5]) for column in group[1]],
                chunks={b".".join(column[3].get(3, [])): _chunk(column[3]) for column in group[1]},
            )
            for group in _structs(document.get(4, []))
        ]
    except BROKEN as error:
        raise TraceError(f"{path} is not a readable Parquet file: {type(error).__name__}: {error}") from error


def read_pages(path: Path, chunk: ColumnChunk) -> list[Page]:
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
    """The page header at byte `at` of the file, and its length."""
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


def _chunk(column: dict[int, Any]) -> ColumnChunk:
    """Where the chunk starts, by the rule that pyarrow uses: a dictionary page, if there is one, comes before the values."""
    values, dictionary = _count(column.get(9, 0)), _count(column.get(11, 0))
    return ColumnChunk(dictionary if 0 < dictionary < values else values, _count(column.get(7, 0)))


def _structs(value: Any) -> list[dict[int, Any]]:
    if not isinstance(value, list):
        raise TypeError("row groups are not a list")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a number of rows, values or bytes")
    return value


class _Reader:
    """A parser for part of Thrift's compact protocol.

    Structs become dictionaries by field number, strings bytes, and lists of structs or strings lists. Everything else except
    integers and booleans is skipped: other lists become empty, maps and fixed-size values None.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0
        self._structs = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Read a struct, from its first field to its end."""
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
            raise ValueError("lists nested too deeply")
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
            raise ValueError("maps nested too deeply")
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
        """Raise if fewer than `count` bytes are left. Every entry of a list takes at least one byte."""
        if count > len(self._data) - self.at:
            raise ValueError("truncated")
