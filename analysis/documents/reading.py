"""Reads JSON documents that other commands wrote. They are untrusted: size is checked first, then the schema."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from profiler.errors import TraceError, first_fault, first_line

MAX_BYTES = 64 << 20

Document = TypeVar("Document", bound=BaseModel)


def read_document(path: Path, kind: type[Document], name: str, command: str) -> Document:
    """Read a document from a file, or from the file `name` in a folder.

    command: the command that writes such files, for messages. Raises `TraceError` if the file is not such a document.
    """
    if path.is_dir():
        path = path / name
    try:
        if path.stat().st_size > MAX_BYTES:
            raise TraceError(f"{path} is larger than {MAX_BYTES >> 20} MiB: not what '{command}' writes")
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise TraceError(f"{path}: expected what '{command}' writes: {first_fault(error)}") from error
    except FileNotFoundError as error:
        raise TraceError(f"{path}: no such file; expected what '{command}' writes") from error
    except OSError as error:
        raise TraceError(f"{path}: {first_line(error)}") from error
