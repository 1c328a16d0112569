"""Merge the parts of one collection, each a complete trace of different problems, into one trace.

Rows are not rewritten. Because problems are in order, the parts' files are hard-linked under new numbers, or copied where the
file system has no hard links.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from profiler.errors import TraceError
from profiler.trace.reader import Trace
from profiler.trace.schema import (
    GATES_FILE,
    HIDDEN_FOLDER,
    LOGITS_FOLDER,
    PROBLEMS_FILE,
    ROUTING_FOLDER,
    TOKENS_FILE,
    DatasetMetadata,
    Metadata,
    comparable_capture,
)
from profiler.trace.writer import check_free, public_command, sha256_of, write_manifest, write_metadata

# Entries of the metadata's `capture` that are summed. All others must be equal in all parts.
SUMMED = {"truncated_problems", "skipped_problems", "runs", "hidden_tokens", "writer_waits", "writer_wait_seconds"}
# Entries of `capture` that depend on the machine. Parts may come from different machines.
BY_MACHINE = {"device", "moe_kernels"}
# Metadata that may differ between parts recorded in the same way: which data, when, and with which versions.
MAY_DIFFER = {"created", "command", "gaps", "datasets", "capture", "versions"}


@dataclass(frozen=True)
class Skipped:
    """Problems that could not be run, in parts of which nothing else is left: how many, and lines for the trace's gaps."""

    problems: int = 0
    gaps: tuple[str, ...] = ()


def merge_traces(
    parts: list[Path],
    out: Path,
    *,
    about: dict[str, Any] | None = None,
    skipped: Skipped | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trace:
    """Merge `parts`, which are left unchanged, into the trace `out`. Memory: the token table of one part.

    about: further entries for the metadata's `capture`. skipped: problems of parts that are not there.
    on_progress: is called with parts done and parts in all.
    Raises `TraceError`, and creates no `out`, if a part is incomplete, if the problems of two parts overlap, or if the parts
    were not recorded in the same way.
    """
    check_free(out)
    if not parts:
        raise TraceError(f"{out}: no parts to merge")
    ranges = {part: _problem_range(part) for part in parts}
    traces = [Trace.open(part) for part in sorted(parts, key=lambda part: ranges[part])]
    metadata = merged_metadata(traces, about or {}, skipped)
    for before, after in pairwise(trace.path for trace in traces):
        last = ranges[before][1]
        if last >= ranges[after][0]:
            raise TraceError(f"{before} and {after} overlap: {before.name} has problem {last}")
    building = out.with_name(out.name + ".part")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    for folder in (ROUTING_FOLDER, LOGITS_FOLDER, HIDDEN_FOLDER):
        # Only what the manifest lists: other files are not part of the trace.
        files = [trace.path / name for trace in traces for name in _listed(trace) if name.startswith(f"{folder}/")]
        for number, path in enumerate(files):
            (building / folder).mkdir(exist_ok=True)
            _link(path, building / folder / f"part-{number:05d}.parquet")
    _link_gates(traces, building)
    for name in (PROBLEMS_FILE, TOKENS_FILE):
        _append_tables(traces, name, building / name, on_progress)
    write_metadata(building, metadata)
    write_manifest(building)
    if out.is_dir():
        out.rmdir()
    building.rename(out)
    return Trace.open(out)


def _listed(trace: Trace) -> list[str]:
    return sorted(trace.manifest.files) if trace.manifest is not None else []


def _problem_range(part: Path) -> tuple[int, int]:
    """The first and last problem id. Opens its own `Trace`, so that the cached table is freed with it."""
    ids = Trace.open(part).problems.column("problem_id")
    return int(ids[0].as_py()), int(ids[-1].as_py())


def merged_metadata(traces: list[Trace], about: dict[str, Any], skipped: Skipped | None = None) -> Metadata:
    """The metadata that the traces share, with their counts summed. Raises `TraceError`, naming the first difference.

    about: further entries for `capture`. skipped: problems of parts that are not there.
    """
    skipped = skipped or Skipped()
    first = traces[0]
    counts: dict[str, Any] = {}
    datasets: dict[str, DatasetMetadata] = {}
    gaps: dict[str, None] = {}
    versions: dict[str, list[str]] = {}
    kernels = {name: own for trace in traces for name, own in trace.metadata.capture.get("moe_kernels", {}).items()}
    devices = Counter(trace.metadata.capture.get("device", "unknown") for trace in traces)
    for trace in traces:
        for name, found in trace.metadata.versions.items():
            versions[name] = sorted({*versions.get(name, []), found})
        for name, expected, found in _compared(first.metadata, trace.metadata):
            if found != expected:
                raise TraceError(
                    f"{trace.path} was recorded with {name} {found!r}, {first.path} with {expected!r}: "
                    "they are not parts of one trace"
                )
        for name, value in trace.metadata.capture.items():
            if name in SUMMED:
                counts[name] = counts.get(name, 0) + value
        for dataset in trace.metadata.datasets:
            before = datasets.get(dataset.name)
            if before is not None and before.model_copy(update={"problems": dataset.problems}) != dataset:
                raise TraceError(f"{trace.path}: dataset {dataset.name} differs from the one in {first.path}")
            total = dataset.problems + (before.problems if before else 0)
            datasets[dataset.name] = dataset.model_copy(update={"problems": total})
        gaps |= dict.fromkeys(trace.metadata.gaps)
    gaps |= dict.fromkeys(skipped.gaps)
    if skipped.problems:
        counts["skipped_problems"] = counts.get("skipped_problems", 0) + skipped.problems
    return first.metadata.model_copy(
        update={
            "datasets": list(datasets.values()),
            "gaps": list(gaps),
            "versions": {name: ", ".join(found) for name, found in versions.items()},
            "capture": {name: value for name, value in first.metadata.capture.items() if name != "device"}
            | counts
            | {"parts": len(traces), "devices": dict(devices)}
            | ({"moe_kernels": kernels} if kernels else {})
            | about,
            "created": min(trace.metadata.created for trace in traces),
            "command": public_command(),
        }
    )


def _compared(first: Metadata, other: Metadata) -> list[tuple[str, Any, Any]]:
    """Everything that parts must have in common: its name, and both values."""
    ours, theirs = (metadata.model_dump(mode="json", exclude=MAY_DIFFER) for metadata in (first, other))
    before, after = comparable_capture(first), comparable_capture(other)
    names = sorted((before.keys() | after.keys()) - SUMMED - BY_MACHINE)
    captured = [(f"capture.{name}", before.get(name), after.get(name)) for name in names]
    return [(name, ours[name], theirs[name]) for name in ours] + captured


def _link(source: Path, target: Path) -> None:
    """Hard-link the file, or copy it where the file system has no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copyfile(source, target)


def _link_gates(traces: list[Trace], building: Path) -> None:
    paths = [trace.path / GATES_FILE for trace in traces if GATES_FILE in _listed(trace)]
    if len({sha256_of(path) for path in paths}) > 1:
        raise TraceError(f"{building}: the parts have different {GATES_FILE}: their models differ")
    if paths:
        _link(paths[0], building / GATES_FILE)


def _append_tables(traces: list[Trace], name: str, target: Path, on_progress: Callable[[int, int], None]) -> None:
    temporary = target.with_suffix(".tmp")
    writer: pq.ParquetWriter | None = None
    try:
        for done, trace in enumerate(traces):
            on_progress(done, len(traces))
            # Opened again: a `Trace` caches its tables, which would keep those of all parts in memory.
            opened = Trace.open(trace.path)
            table = opened.problems if name == PROBLEMS_FILE else opened.tokens
            if writer is None:
                writer = pq.ParquetWriter(temporary, table.schema, compression="zstd", write_page_checksum=True)
            if table.schema != writer.schema:
                raise TraceError(f"{trace.path / name}: its columns differ from those of {traces[0].path / name}")
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()
    temporary.rename(target)
