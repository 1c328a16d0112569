"""Decode MessagePack: numbers, text, bytes, lists and dictionaries, nothing else (github.com/msgpack/msgpack, spec.md)."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

# First byte -> format of a number that follows; and first byte -> format of the length of text, bytes, a list or a dictionary.
_NUMBERS = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
_LENGTHS = {
    0xC4: ">B",
    0xC5: ">H",
    0xC6: ">I",
    0xD9: ">B",
    0xDA: ">H",
    0xDB: ">I",
    0xDC: ">H",
    0xDD: ">I",
    0xDE: ">H",
    0xDF: ">I",
}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
# Deeper nesting than any format needs, well below Python's limit of recursion.
MAX_DEPTH = 32
# Limits on what a few bytes can become: lists, dictionaries and texts, of 50 bytes or more each, and values of any kind.
MAX_OBJECTS = 1 << 20
MAX_VALUES = 1 << 26
# Of one value: the ids of 500,000 tokens in 61 layers with 8 experts, in 16 bits.
MAX_BYTES = 512 << 20


def entries_of_first(file: BinaryIO) -> Iterator[Any]:
    """The entries of the list that is the first entry of the list in `file`, one in memory at a time.

    Raises `ValueError` if there is no such list, on extension types, on an entry with more bytes or values than fit in
    memory, and on anything after the outer list. Its other entries are decoded, and discarded, before the iterator ends.
    """
    decoder = _Decoder(file)
    others = decoder.list_length() - 1
    if others < 0:
        raise ValueError("the list is empty")
    for _ in range(decoder.list_length()):
        yield decoder.counted_value()
    for _ in range(others):
        decoder.counted_value()
    decoder.finish()


class _Decoder:
    """A position in encoded data."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        # A length in the data may be any number: nothing is read that the file does not have.
        self._left = file.seek(0, io.SEEK_END)
        file.seek(0)
        self._objects = 0
        self._values = 0
        self._bytes = 0

    def counted_value(self) -> Any:
        """Decode the next value, within the limits of a value of its own."""
        self._objects = self._values = self._bytes = 0
        return self.value(0)

    def list_length(self) -> int:
        """Decode the beginning of a list. Raises `ValueError` if something else is next."""
        first = self._take(1)[0]
        if 0x90 <= first <= 0x9F:
            return first & 0x0F
        if first in {0xDC, 0xDD}:
            return int(self._unpack(_LENGTHS[first]))
        raise ValueError("expected a list of lists")

    def finish(self) -> None:
        """Raise `ValueError` unless everything was decoded."""
        if self._left:
            raise ValueError(f"{self._left} bytes follow the value")

    def value(self, depth: int) -> Any:
        """Decode the next value."""
        if depth > MAX_DEPTH:
            raise ValueError(f"values are nested more than {MAX_DEPTH} deep")
        first = self._take(1)[0]
        self._values += 1
        self._objects += 0x80 <= first <= 0xBF or first in _LENGTHS
        if self._objects > MAX_OBJECTS or self._values > MAX_VALUES:
            raise ValueError(f"more than {MAX_OBJECTS:,} lists, dictionaries and texts, or {MAX_VALUES:,} values")
        if first <= 0x7F or first >= 0xE0:
            return first - 256 if first >= 0xE0 else first
        if first in _NUMBERS:
            return self._unpack(_NUMBERS[first])
        if first in _CONSTANTS:
            return _CONSTANTS[first]
        if first <= 0x8F or first in {0xDE, 0xDF}:
            size = first & 0x0F if first <= 0x8F else self._unpack(_LENGTHS[first])
            return {self._key(depth + 1): self.value(depth + 1) for _ in range(size)}
        if first <= 0x9F or first in {0xDC, 0xDD}:
            size = first & 0x0F if first <= 0x9F else self._unpack(_LENGTHS[first])
            return [self.value(depth + 1) for _ in range(size)]
        if first <= 0xBF:
            return self._take(first & 0x1F).decode()
        if first in _LENGTHS:
            taken = self._take(self._unpack(_LENGTHS[first]))
            return taken if first <= 0xC6 else taken.decode()
        raise ValueError(f"type 0x{first:02x} is not supported")

    def _key(self, depth: int) -> Any:
        key = self.value(depth)
        if isinstance(key, (list, dict)):
            raise ValueError("a key that is a list or a dictionary")
        return key

    def _unpack(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _take(self, size: int) -> bytes:
        if size > self._left:
            raise ValueError("the data ends within a value")
        self._bytes += size
        if self._bytes > MAX_BYTES:
            raise ValueError(f"a value of more than {MAX_BYTES:,} bytes")
        self._left -= size
        return self._file.read(size)
