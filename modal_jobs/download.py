"""Download a run's finished shards from a Volume, verify them, and merge them into one trace."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from pydantic import ValidationError

from modal_jobs.shards import SKIPPED_FILE, all_skipped, holds_shard, skipped_shard
from profiler.errors import TraceError, first_fault
from profiler.plan.job import JOB_FILE, CollectJob, read_job
from profiler.trace.merge import Skipped, merge_traces
from profiler.trace.reader import Trace
from profiler.trace.schema import MANIFEST_FILE, Manifest, ManifestEntry
from profiler.trace.writer import check_free, sha256_of

# Jobs and manifests are some kilobytes; a longer file is neither.
MAX_DOCUMENT = 64 << 20
ATTEMPTS = 2


class Volume(Protocol):
    """The part of `modal.Volume` that downloads use."""

    def listdir(self, path: str, *, recursive: bool = False) -> list[Any]:
        """Entries, whose `path` is relative to the root of the Volume."""
        ...

    def read_file(self, path: str) -> Iterator[bytes]:
        """The file's content, in pieces."""
        ...


def stored_job(volume: Volume, run_id: str) -> CollectJob | None:
    """The job of a run, as it was first uploaded; None if the run does not exist."""
    names = {PurePosixPath(entry.path).parts[0] for entry in volume.listdir("/")}
    if run_id not in names:
        return None
    if f"{run_id}/{JOB_FILE}" not in {entry.path.lstrip("/") for entry in volume.listdir(run_id)}:
        return None
    job = read_job(_read_document(volume, f"{run_id}/{JOB_FILE}"), f"{run_id}/{JOB_FILE}")
    if job.run_id != run_id:
        raise TraceError(f"{run_id}/{JOB_FILE} on the Volume belongs to run {job.run_id}")
    return job


def finished_shards(volume: Volume, job: CollectJob) -> dict[int, list[str]]:
    """The folders on the Volume of each shard's attempts that look complete: all files in their manifest exist."""
    names = {entry.path.lstrip("/") for entry in volume.listdir(job.run_id, recursive=True)}
    shards: dict[int, list[str]] = {}
    for path in sorted(names):
        found = re.fullmatch(rf"{re.escape(job.run_id)}/shard-(\d{{5}})/[^/]+/{re.escape(MANIFEST_FILE)}", path)
        if found is None or int(found.group(1)) >= job.num_shards:
            continue
        folder = path.removesuffix(f"/{MANIFEST_FILE}")
        try:
            manifest = _read_manifest(volume, folder)[0]
        except TraceError:
            # The container was stopped while it wrote the manifest.
            continue
        if all(f"{folder}/{name}" in names for name in manifest.files):
            shards.setdefault(int(found.group(1)), []).append(folder)
    return shards


def skipped_shards(volume: Volume, job: CollectJob) -> dict[int, Skipped]:
    """The shards of which no problem can be run. Raises `TraceError` if a file on the Volume is not what says so."""
    shards = {}
    for path in sorted(entry.path.lstrip("/") for entry in volume.listdir(job.run_id, recursive=True)):
        found = re.fullmatch(rf"{re.escape(job.run_id)}/shard-(\d{{5}})/{re.escape(SKIPPED_FILE)}", path)
        if found is not None and int(found.group(1)) < job.num_shards:
            shards[int(found.group(1))] = skipped_shard(_read_document(volume, path).decode(errors="replace"), path)
    return shards


def download_run(
    volume: Volume, run_id: str, out: Path, *, about: dict[str, Any] | None = None, say: Callable[[str], None]
) -> Trace:
    """Download a finished run as the complete trace `out`. Intact files of an earlier download are not downloaded again.

    about: entries to add to the metadata's `capture`. Raises `TraceError` if the run does not exist or is not finished, if a
    file's SHA-256 does not match its shard's manifest, or if no problem of any shard can be run.
    """
    check_free(out)
    job = stored_job(volume, run_id)
    if job is None:
        raise TraceError(f"no run {run_id} on the Volume; 'modal volume ls NAME' lists its content")
    shards, skipped = finished_shards(volume, job), skipped_shards(volume, job)
    finished = len(shards.keys() | skipped.keys())
    if finished < job.num_shards:
        raise TraceError(
            f"{finished} of {job.num_shards} shards of {run_id} are finished: run the same collection again to resume"
        )
    if not shards:
        raise TraceError(f"no problem of {run_id} can be run; {next(iter(skipped.values())).gaps[0]}")
    folder = out.with_name(out.name + ".shards")
    parts = []
    for shard in sorted(shards):
        parts.append(folder / f"shard-{shard:05d}")
        fetched = _fetch_shard(volume, job, shard, shards[shard], parts[-1])
        say(f"shard {shard + 1} of {job.num_shards}: {fetched / 1e6:.1f} MB downloaded and verified")
    without = all_skipped(skipped[shard] for shard in sorted(skipped.keys() - shards.keys()))
    trace = merge_traces(parts, out, about={"run_id": run_id, **(about or {})}, skipped=without)
    shutil.rmtree(folder)
    return trace


def _fetch_shard(volume: Volume, job: CollectJob, shard: int, attempts: list[str], target: Path) -> int:
    """Download the first attempt that is intact and holds this shard. Returns the number of bytes downloaded."""
    last: TraceError | None = None
    for path in attempts:
        try:
            fetched = fetch_trace(volume, path, target)
        except TraceError as error:
            last = error
            continue
        if holds_shard(target, job, shard):
            return fetched
        last = TraceError(f"{path} does not hold the problems of shard {shard + 1}: 'modal volume rm -r' it and run again")
    assert last is not None
    raise last


def fetch_trace(volume: Volume, path: str, target: Path) -> int:
    """Download the trace folder `path` and verify every file against the manifest. Returns the number of bytes downloaded.

    A file gets its final name only when it is complete, and the manifest comes last. Other files in `target`, left by an
    earlier download, are removed. Raises `TraceError` that names the file.
    """
    manifest, text = _read_manifest(volume, path)
    (target / MANIFEST_FILE).unlink(missing_ok=True)
    for other in [found for found in target.rglob("*") if not found.is_dir() or found.is_symlink()]:
        if str(other.relative_to(target)) not in manifest.files or other.is_symlink():
            other.unlink()
    fetched = 0
    for name, entry in manifest.files.items():
        local = target / name
        if (
            local.is_file()
            and not local.is_symlink()
            and local.stat().st_size == entry.bytes
            and sha256_of(local) == entry.sha256
        ):
            continue
        local.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, ATTEMPTS + 1):
            reason = _fetch_file(volume, f"{path}/{name}", local, entry)
            if reason is None:
                break
            if attempt == ATTEMPTS:
                raise TraceError(
                    f"{path}/{name}: {reason}, twice; if this persists, 'modal volume rm -r' the folder {path} and run the "
                    "same collection again: only that shard is recomputed"
                )
        fetched += entry.bytes
    (target / MANIFEST_FILE).write_bytes(text)
    return fetched


def _read_manifest(volume: Volume, path: str) -> tuple[Manifest, bytes]:
    text = _read_document(volume, f"{path}/{MANIFEST_FILE}")
    try:
        # Validation also rejects paths that leave the folder.
        return Manifest.model_validate_json(text), text
    except ValidationError as error:
        raise TraceError(f"{path}/{MANIFEST_FILE} on the Volume is not a manifest: {first_fault(error)}") from error


def _fetch_file(volume: Volume, path: str, local: Path, entry: ManifestEntry) -> str | None:
    """Download one file. Returns what is wrong with it, or None."""
    temporary = local.with_name(local.name + ".part")
    digest, size = hashlib.sha256(), 0
    with temporary.open("wb") as file:
        for piece in volume.read_file(path):
            size += len(piece)
            if size > entry.bytes:
                break
            digest.update(piece)
            file.write(piece)
    if size != entry.bytes:
        reason = f"more than {entry.bytes} bytes" if size > entry.bytes else f"{size} bytes, expected {entry.bytes}"
    elif digest.hexdigest() != entry.sha256:
        reason = "its SHA-256 does not match the manifest"
    else:
        temporary.replace(local)
        return None
    temporary.unlink()
    return reason


def _read_document(volume: Volume, path: str) -> bytes:
    content = b""
    for piece in volume.read_file(path):
        content += piece
        if len(content) > MAX_DOCUMENT:
            raise TraceError(f"{path} on the Volume is larger than {MAX_DOCUMENT >> 20} MiB: it is not a job or manifest")
    return content
