"""Convert routing that other tools recorded into traces: one module in `formats` each, detected from the content of the source.

Every importer sets what it knows about the model on a `Target` and passes it rows or tokens in the order of the source. The
`Target` reports what is missing and writes the trace. Sources are untrusted: nothing in them is executed, every size is
checked.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from profiler.errors import TraceError, TraceUsageError
from profiler.importers.formats import (
    colibri,
    edge_csv,
    flame_moe,
    interrupted,
    json_rows,
    lattice,
    llama_cpp,
    megatron,
    moe_beyond,
    olmoe,
    parquet_rows,
    prime_rl,
    route_log,
    routed_experts,
    server_responses,
    sglang,
    slime,
)
from profiler.importers.rows import ImportOptions
from profiler.importers.target import Target
from profiler.trace.reader import Trace
from profiler.trace.schema import MANIFEST_FILE


@dataclass(frozen=True)
class Format:
    """A format of sources. detect: whether a source looks like it. read: pass the content of a source to a `Target`.

    kinds: whether a source is a file, a folder, or either.
    """

    name: str
    about: str
    kinds: tuple[str, ...]
    detect: Callable[[Path], bool]
    read: Callable[[Path, Target], None]


# How compressed files begin.
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz", b"BZh": "bzip2"}

FORMATS = {
    module.NAME: Format(module.NAME, module.ABOUT, module.KINDS, module.detect, module.read)
    for module in (
        interrupted,
        parquet_rows,
        flame_moe,
        prime_rl,
        slime,
        sglang,
        routed_experts,
        server_responses,
        moe_beyond,
        edge_csv,
        route_log,
        olmoe,
        megatron,
        lattice,
        llama_cpp,
        colibri,
        json_rows,
    )
}


def import_trace(
    source: Path, directory: Path, *, format_name: str | None = None, options: ImportOptions | None = None
) -> Trace:
    """Convert `source` into the trace `directory`.

    format_name: one of `FORMATS`; None to detect it from the content. What the source lacks, and what was left out, is listed
    in the trace's gaps. Raises `TraceError`, and leaves nothing behind, if the source cannot be read.
    """
    if not source.is_file() and not source.is_dir():
        raise TraceError(f"{source}: no such file or folder")
    _check_content(source)
    if directory.is_symlink():
        raise TraceError(f"{directory} is a link: choose a folder")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise TraceError(f"{directory} exists and is not an empty folder: choose another one")
    chosen = find_format(source, format_name)
    kind = "folder" if source.is_dir() else "file"
    if kind not in chosen.kinds:
        raise TraceError(
            f"{source} is a {kind}, and {chosen.name} is read from a {chosen.kinds[0]}{_looks_like(source, chosen)}"
        )
    created = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        target = Target(directory, source, chosen.name, options or ImportOptions())
        try:
            chosen.read(source, target)
            return target.finish()
        except TraceError as error:
            raise TraceError(f"{error}{_looks_like(source, chosen)}") from error
    except BaseException:
        shutil.rmtree(directory)
        if not created:
            directory.mkdir()
        raise


def _check_content(source: Path) -> None:
    """Raise `TraceError` if a file is empty or compressed, which no format is."""
    if not source.is_file():
        return
    with source.open("rb") as file:
        start = file.read(max(map(len, COMPRESSED)))
    if not start:
        raise TraceError(f"{source} is an empty file")
    kind = next((name for magic, name in COMPRESSED.items() if start.startswith(magic)), None)
    if kind is not None:
        raise TraceError(f"{source} is compressed with {kind}: decompress it first")


def find_format(source: Path, name: str | None = None) -> Format:
    """The format called `name`, or the one detected from `source`. Raises `TraceError`, listing the formats, if none fits."""
    if name is not None:
        if name not in FORMATS:
            raise TraceUsageError(f"unknown format {name!r}: expected one of {', '.join(FORMATS)}")
        return FORMATS[name]
    detected = _detected(source)
    if detected is not None:
        return detected
    if (source / MANIFEST_FILE).is_file():
        raise TraceError(f"{source} is a trace already: it can be exported as JSON lines or as a hub folder")
    raise TraceError(f"{source} looks like none of {', '.join(FORMATS)}: if it is one of them, name the format")


def _detected(source: Path) -> Format | None:
    return next((candidate for candidate in FORMATS.values() if source.exists() and candidate.detect(source)), None)


def _looks_like(source: Path, chosen: Format) -> str:
    """The end of an error message: the format that the source looks like, if that is another one than was chosen."""
    detected = _detected(source)
    return "" if detected is None or detected is chosen else f"; it looks like {detected.name}"
