"""Upload a local trace to a Volume, once."""

from __future__ import annotations

import modal

from profiler.errors import TraceError
from profiler.trace.reader import Trace
from profiler.trace.schema import MANIFEST_FILE
from profiler.trace.writer import sha256_of


def upload_trace(store: modal.Volume, trace: Trace) -> str:
    """Upload a trace, its manifest last. Returns its folder on the Volume.

    The folder is named after the content, so that the same content is uploaded only once. Raises `TraceError` if the trace is
    faulty.
    """
    faults = trace.faults(verify=True)
    if faults or trace.manifest is None:
        raise TraceError(f"{trace.path}: {faults[0]}")
    name = f"trace-{sha256_of(trace.path / MANIFEST_FILE)[:16]}"
    is_there = any(entry.path.strip("/") == name for entry in store.listdir("/"))
    if is_there and f"{name}/{MANIFEST_FILE}" in {entry.path.lstrip("/") for entry in store.listdir(name)}:
        return name
    print(f"uploading {trace.path}", flush=True)
    for names in (list(trace.manifest.files), [MANIFEST_FILE]):
        with store.batch_upload(force=True) as batch:
            for file in names:
                batch.put_file(trace.path / file, f"/{name}/{file}")
    return name
