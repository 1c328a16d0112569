"""Decode MessagePack: numbers, text, bytes, lists and dictionaries, nothing else (github.com/msgpack/msgpack, spec.md)."""

from __future__ import annotations

import struct
from typing import Any

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


def decode(data: bytes) -> Any:
    """The value that `data` encodes.

    Raises `ValueError` on anything but exactly one value, on extension types, and on more values than fit in memory.
    """
    decoder = _Decoder(data)
    value = decoder.value(0)
    if decoder.at != len(data):
        raise ValueError(f"{len(data) - decoder.at} bytes follow the value")
    return value


class _Decoder:
    """A position in encoded data."""

    def __init__(self, data: bytes) -> None:
        self.at = 0
        self._data = data
        self._objects = 0
        self._values = 0

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
        taken = self._data[self.at : self.at + size]
        if len(taken) < size:
            raise ValueError("the data ends within a value")
        self.at += size
        return taken
