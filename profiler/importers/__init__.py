"""Routing that other tools recorded, as traces: one module per format, found by the content of the source.

Every importer tells a `Target` what it knows and hands it rows or tokens in whatever order the source has; the `Target` says
what is missing and writes the trace. Sources come from strangers: nothing in them is executed, and every size is checked.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from profiler.errors import TraceError
from profiler.importers import (
    edge_csv,
    flame_moe,
    interrupted,
    json_rows,
    moe_beyond,
    olmoe,
    parquet_rows,
    route_log,
    routed_experts,
    sglang,
)
from profiler.importers.rows import ImportOptions
from profiler.importers.target import Target
from profiler.trace.reader import Trace
from profiler.trace.schema import MANIFEST_FILE


@dataclass(frozen=True)
class Format:
    """A kind of source. detect: whether a source looks like it; read: hand it to a `Target`."""

    name: str
    about: str
    detect: Callable[[Path], bool]
    read: Callable[[Path, Target], None]


FORMATS = {
    module.NAME: Format(module.NAME, module.ABOUT, module.detect, module.read)
    for module in (
        interrupted,
        parquet_rows,
        flame_moe,
        sglang,
        routed_experts,
        moe_beyond,
        edge_csv,
        route_log,
        olmoe,
        json_rows,
    )
}


def import_trace(
    source: Path, directory: Path, *, format_name: str | None = None, options: ImportOptions | None = None
) -> Trace:
    """Make the trace `directory` from `source`.

    format_name: one of `FORMATS`; None for the one that the content looks like. What the source lacks, and what was left out,
    is in the trace's gaps. Raises `TraceError`, and leaves nothing behind, if the source cannot be read.
    """
    if not source.is_file() and not source.is_dir():
        raise TraceError(f"{source}: no such file or folder")
    if directory.is_symlink():
        raise TraceError(f"{directory} is a link: choose a folder")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise TraceError(f"{directory} exists and is not an empty folder: choose another one")
    chosen = find_format(source, format_name)
    created = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        target = Target(directory, source, chosen.name, options or ImportOptions())
        chosen.read(source, target)
        return target.finish()
    except BaseException:
        shutil.rmtree(directory)
        if not created:
            directory.mkdir()
        raise


def find_format(source: Path, name: str | None = None) -> Format:
    """The format `name`, or the one that `source` looks like. Raises `TraceError` listing what there is."""
    if name is not None:
        if name not in FORMATS:
            raise TraceError(f"unknown format {name!r}: expected one of {', '.join(FORMATS)}")
        return FORMATS[name]
    for candidate in FORMATS.values():
        if candidate.detect(source):
            return candidate
    if (source / MANIFEST_FILE).is_file():
        raise TraceError(f"{source} is a trace already; --to jsonl and --to hub-folder make something else of it")
    raise TraceError(f"{source} looks like none of {', '.join(FORMATS)}: choose one with --from, if it is one of them")
