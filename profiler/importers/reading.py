"""Read untrusted sources: files of a folder, JSON lines in blocks, Parquet columns, nested lists.

JSON lines are not read with pyarrow: pyarrow 26 crashes the process if a value between the lines is not an object.
"""

from __future__ import annotations

import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic_core import from_json

from profiler.errors import UNREADABLE, TraceError, first_line
from profiler.importers.rows import EMPTY, MAX_PIECE_BYTES
from profiler.trace.schema import MAX_TOP_K
from profiler.trace.untrusted.parquet_footer import read_row_groups

HEAD_BYTES = 1 << 16
BLOCK_BYTES = 4 << 20
# A line of nothing but empty objects takes thirty times its length once parsed.
MAX_LINE_BYTES = 16 << 20
# The lists of a block are padded to the longest one: this many rows of 1,024 experts are 32 MB.
MAX_BLOCK_ROWS = 4096
# Memory of a decoded list entry, including its share of the list offsets.
VALUE_BYTES = 8
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# NumPy parses the header of an array as Python literals, which adds errors of its tokenizer and parser.
NOT_AN_ARRAY = (*UNREADABLE, SyntaxError, tokenize.TokenError)


def files_in(folder: Path, *patterns: str) -> list[Path]:
    """The regular files of a folder, shorter names first so that 10 comes after 9. Skips pipes and devices, which block."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(found, key=lambda path: (len(path.name), path.name, len(path.parts[-2:][0]), path.parts[-2:]))


def files_of(source: Path, *patterns: str) -> list[Path]:
    """The file `source` itself, whatever its name, or the files of the folder `source`; empty if the folder has no files."""
    return files_in(source, *patterns) if source.is_dir() else [source] * source.is_file()


def sources_of(source: Path, *patterns: str) -> list[Path]:
    """As `files_of`, but raises `TraceError` if the folder has no files."""
    files = files_of(source, *patterns)
    if not files:
        packed = files_in(source, *(f"{pattern}.{ending}" for pattern in patterns for ending in ("gz", "zst", "xz", "bz2")))
        advice = f"; decompress {packed[0].name} first" if packed else ""
        raise TraceError(f"{source}: the folder contains no file named {' or '.join(patterns)}{advice}")
    return files


def head(path: Path) -> str:
    """The first 64 KiB of a file as text, without a byte order mark; empty for a folder or a file that cannot be read."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return file.read(HEAD_BYTES).removeprefix(BYTE_ORDER_MARK).decode("utf-8", errors="replace")


def first_object(path: Path) -> dict[str, Any]:
    """The object on the first line of a JSON-lines file that is not blank; empty if the line is not an object, or too long."""
    try:
        found = from_json(head(path).lstrip().partition("\n")[0])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class JsonObjects:
    """N consecutive objects of a JSON-lines file, and their line numbers `[N]`."""

    path: Path
    objects: list[dict[str, Any]]
    numbers: list[int]

    @property
    def where(self) -> str:
        """The file and the range of lines, as text for messages."""
        return f"{self.path}, lines {self.numbers[0]}..{self.numbers[-1]}"

    def having(self, name: str, value: object) -> JsonObjects:
        """The objects whose `name` is `value`."""
        keep = [n for n, found in enumerate(self.objects) if found.get(name) == value]
        return JsonObjects(self.path, [self.objects[n] for n in keep], [self.numbers[n] for n in keep])

    def have(self, name: str) -> bool:
        """Whether any of the objects has the key `name`."""
        return any(name in found for found in self.objects)

    def texts(self, name: str) -> list[str]:
        """The strings or whole numbers under `name`, as strings. Raises `TraceError`, naming the line, on any other value."""
        values: list[Any] = [found.get(name) for found in self.objects]
        if not {*map(type, values)} <= {str, int}:
            self._refuse(values, lambda value: type(value) in {str, int}, f"a text {name!r}")
        return [str(value) for value in values]

    def integers(self, name: str) -> npt.NDArray[np.int64]:
        """The whole numbers `[N]` under `name`. Raises `TraceError`, naming the line, if one is missing or not an int64."""
        values: list[Any] = [found.get(name) for found in self.objects]
        if {*map(type, values)} != {int} or not -(2**63) <= min(values) <= max(values) < 2**63:
            self._refuse(values, lambda value: type(value) is int and -(2**63) <= value < 2**63, f"a whole number {name!r}")
        return np.array(values, dtype=np.int64)

    def expert_ids(self, name: str) -> npt.NDArray[np.int64]:
        """The lists of expert ids `[N, K]` under `name`, shorter ones padded with `EMPTY`.

        Raises `TraceError`, naming the line, if a list is missing, longer than `MAX_TOP_K`, or has an entry that is not an id.
        """
        return self._lists(name, {int}, lambda value: 0 <= value < 2**31, "expert ids", EMPTY, np.dtype(np.int64))

    def weights(self, name: str, ids_NK: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """The weights `[N, K]` under `name` of rows with these experts; padded with NaN, and NaN where the source has NaN.

        Raises `TraceError`, naming the line, if a list is missing, has an entry that is not a number, or another length.
        """

        def is_number(value: Any) -> bool:
            return bool(value != value or abs(value) < 2**31)

        weights_NK = self._lists(name, {int, float}, is_number, "numbers", np.nan, np.dtype(np.float64))
        for number, found, experts in zip(self.numbers, self.objects, (ids_NK != EMPTY).sum(1).tolist(), strict=True):
            if len(found[name]) != experts:
                raise TraceError(f"{self.path}, line {number}: {len(found[name])} weights for {experts} experts")
        return weights_NK

    def _lists(
        self, name: str, kinds: set[type], is_sound: Callable[[Any], bool], what: str, fill: float, dtype: np.dtype[Any]
    ) -> npt.NDArray[Any]:
        values: list[Any] = [found.get(name) for found in self.objects]
        if {*map(type, values)} != {list} or max(map(len, values)) > MAX_TOP_K:
            is_list = f"a list {name!r} of at most {MAX_TOP_K} {what}"
            self._refuse(values, lambda value: isinstance(value, list) and len(value) <= MAX_TOP_K, is_list)
        flat = [*chain.from_iterable(values)]
        if not {*map(type, flat)} <= kinds or not all(map(is_sound, flat)):
            each = f"{what} in {name!r} within the valid range"
            self._refuse(values, lambda value: all(type(entry) in kinds and is_sound(entry) for entry in value), each)
        lengths_N = np.array([*map(len, values)])
        present_NK = np.arange(lengths_N.max(initial=0)) < lengths_N[:, None]
        array_NK = np.full(present_NK.shape, fill, dtype=dtype)
        array_NK[present_NK] = flat
        return array_NK

    def _refuse(self, values: list[Any], is_sound: Callable[[Any], bool], what: str) -> None:
        """Raise `TraceError` for the first value that is not valid."""
        for number, value in zip(self.numbers, values, strict=True):
            if not is_sound(value):
                raise TraceError(f"{self.path}, line {number}: expected {what}")


def json_lines(path: Path) -> Iterator[JsonObjects]:
    """Iterate over the objects of a JSON-lines file, some thousand at a time; blank lines are skipped.

    Raises `TraceError`, naming the line, if one is not an object, and if one is longer than 16 MiB.
    """
    for lines in text_lines(path):
        yield JsonObjects(path, _objects(path, lines), [number for number, _ in lines])


def text_lines(path: Path) -> Iterator[list[tuple[int, bytes]]]:
    """Iterate over the lines of a file with their numbers, some thousand at a time; blank lines are skipped.

    Raises `TraceError` if one is longer than 16 MiB.
    """
    if not path.is_file():
        raise TraceError(f"{path}: no such file")
    number = 1
    with path.open("rb") as file:
        if file.read(len(BYTE_ORDER_MARK)) != BYTE_ORDER_MARK:
            file.seek(0)
        while block := file.read(BLOCK_BYTES):
            block += file.readline(MAX_LINE_BYTES)
            if len(block) >= MAX_LINE_BYTES and not block.endswith(b"\n"):
                raise TraceError(f"{path}: a line longer than {MAX_LINE_BYTES >> 20} MiB")
            lines = block.split(b"\n")
            if not lines[-1]:
                lines.pop()
            kept = [(number + n, line) for n, line in enumerate(lines) if line.strip()]
            number += len(lines)
            for start in range(0, len(kept), MAX_BLOCK_ROWS):
                yield kept[start : start + MAX_BLOCK_ROWS]


def _objects(path: Path, lines: list[tuple[int, bytes]]) -> list[dict[str, Any]]:
    """Parse numbered lines: all at once, or one at a time to find the invalid one."""
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


def integer_array(value: object, what: str) -> npt.NDArray[np.int64]:
    """A flat list of whole numbers in [0, 2^31) as an array. Raises `TraceError`, naming `what`, on anything else."""
    if not isinstance(value, list) or not {*map(type, value)} <= {int}:
        raise TraceError(f"{what}: expected a list of whole numbers")
    if value and not 0 <= min(value) <= max(value) < 2**31:
        raise TraceError(f"{what}: a number below 0 or above 2^31")
    return np.array(value, dtype=np.int64)


def pad_lists(lists: list[list[Any]]) -> npt.NDArray[np.int64] | None:
    """Lists of expert ids as `[N, K]`, shorter ones padded with `EMPTY`; None if one is too long or an entry is not an id."""
    flat = [*chain.from_iterable(lists)]
    if not {*map(type, flat)} <= {int} or max(map(len, lists), default=0) > MAX_TOP_K:
        return None
    if flat and not 0 <= min(flat) <= max(flat) < 2**31:
        return None
    lengths_N = np.array([*map(len, lists)])
    present_NK = np.arange(lengths_N.max(initial=0)) < lengths_N[:, None]
    ids_NK = np.full(present_NK.shape, EMPTY, dtype=np.int64)
    ids_NK[present_NK] = flat
    return ids_NK


def column_names(path: Path) -> list[str]:
    """The column names of a Parquet file. Raises `TraceError` if it is not readable."""
    try:
        return list(pq.read_schema(path).names)
    except UNREADABLE as error:
        raise TraceError(f"{path} is not a readable Parquet file: {first_line(error)}") from error


def has_columns(path: Path, names: set[str]) -> bool:
    """Whether a file is Parquet and has at least these columns."""
    try:
        return names <= set(column_names(path))
    except TraceError:
        return False


def batches(path: Path, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
    """Iterate over columns of a Parquet file, `rows` at a time. Raises `TraceError` if one is missing or cannot be decoded."""
    # A few bytes can encode a list of a billion entries in a single row.
    most = max((count for group in read_row_groups(path) for count in group.values), default=0)
    if most * VALUE_BYTES > MAX_PIECE_BYTES:
        raise TraceError(f"{path}: {most:,} values in a column of a row group: more than can be read at once")
    absent = [name for name in columns if name not in column_names(path)]
    if absent:
        raise TraceError(f"{path} lacks the column {absent[0]!r}")
    try:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=rows, columns=columns)
    except UNREADABLE as error:
        raise TraceError(f"{path} cannot be decoded: {first_line(error)}") from error


def lists(column: pa.Array, what: str) -> npt.NDArray[Any]:
    """A list column whose lists all have the same length, as `[N, K]`. Raises `TraceError`, naming `what`, on anything else."""
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise TraceError(f"{what} is {kind}, expected lists")
    values = column.flatten()
    if column.null_count or values.null_count or not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise TraceError(f"{what}: nulls, or entries that are not numbers")
    lengths = column.value_lengths().to_numpy() if not pa.types.is_fixed_size_list(kind) else np.array([kind.list_size])
    if not len(lengths) or lengths.min() != lengths.max() or not 1 <= lengths[0] <= MAX_TOP_K:
        raise TraceError(
            f"{what}: lists of {lengths.min(initial=0)} to {lengths.max(initial=0)} entries, expected equal lengths"
        )
    return np.asarray(values.to_numpy(zero_copy_only=False).reshape(-1, int(lengths[0])))


def id_lists(column: pa.Array, what: str) -> npt.NDArray[Any]:
    """As `lists`, for expert ids: also raises unless all are whole numbers and none is negative."""
    ids_NK = lists(column, what)
    if ids_NK.dtype.kind not in "iu" or (ids_NK.size and ids_NK.min() < 0):
        raise TraceError(f"{what}: expected whole numbers, none of them negative")
    return ids_NK


def integer_column(column: pa.Array, what: str) -> npt.NDArray[Any]:
    """A column of whole numbers as an array. Raises `TraceError`, naming `what`, on nulls and other types."""
    if not pa.types.is_integer(column.type) or column.null_count:
        raise TraceError(f"{what}: expected whole numbers, and no nulls")
    return np.asarray(column.to_numpy())


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is text in any of Arrow's encodings, dictionaries included."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
