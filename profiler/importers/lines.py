"""Reading text that strangers wrote: JSON lines in blocks, and the beginning of a file to tell what it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json as pj

from profiler.capture_stream import first_line
from profiler.errors import TraceError
from profiler.importers.target import MAX_LINE_BYTES

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
    line = head(path).lstrip("\ufeff").partition("\n")[0]
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def json_batches(path: Path, schema: pa.Schema) -> Iterator[tuple[str, pa.RecordBatch]]:
    """The columns of `schema` from JSON lines, block by block, each with how messages call it; absent keys are null.

    Raises `TraceError` if a line is no object with values of these types.
    """
    if not path.is_file():
        raise TraceError(f"{path}: no such file")
    options = pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    row = 1
    try:
        for batch in pj.open_json(path, read_options=pj.ReadOptions(block_size=BLOCK_BYTES), parse_options=options):
            if batch.num_rows:
                yield f"{path}, rows {row}..{row + batch.num_rows - 1}", batch
            row += batch.num_rows
    except pa.ArrowException as error:
        raise TraceError(f"{path}, after row {row - 1}: not JSON lines of routing rows: {first_line(error)}") from error


def objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of JSON lines with their line numbers, for lines too long or too varied for columns.

    Raises `TraceError` on a line that is no object, or longer than 64 MiB.
    """
    if not path.is_file():
        raise TraceError(f"{path}: no such file")
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES:
                raise TraceError(f"{path}, line {number}: longer than {MAX_LINE_BYTES >> 20} MiB")
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TraceError(f"{path}, line {number}: not JSON: {first_line(error)}") from error
            if not isinstance(found, dict):
                raise TraceError(f"{path}, line {number}: expected an object")
            yield number, found
