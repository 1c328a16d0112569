"""Analyze a collected run or a local trace on rented machines: parts are counted in parallel, and the counts merged locally.

    modal run modal_jobs/analyze.py --run-id RUN --out reports/run
    modal run modal_jobs/analyze.py --trace traces/math --containers 4 --out reports/math

Only counts are downloaded, not the trace. The work is in `modal_jobs.analyzing`.
"""

# No `from __future__ import annotations` here, as in collect.py.

from pathlib import Path

import modal

from analysis.analyze import write_analysis
from analysis.cli import print_findings
from analysis.statistics.compute import make_statistics
from modal_jobs.analyzing import AnalysisJob, count_part, merge_counts, plan_analysis
from modal_jobs.image import TRACE_VOLUME, TRACES, cpu_image, trace_volume
from modal_jobs.running import one_line_errors
from modal_jobs.uploading import upload_trace
from profiler.errors import SpecmoeError, first_line
from profiler.trace.reader import Trace

CORES, MEMORY_MIB = 4.0, 4096
MAX_STORED_BYTES = 1 << 30

app = modal.App("specmoe-analyze")
# Crashes are retried. Errors that would only recur are returned as a line of text.
RETRIES = modal.Retries(max_retries=2, initial_delay=1.0)


@app.function(image=cpu_image(), volumes={TRACES: trace_volume}, cpu=1.0, memory=MEMORY_MIB, timeout=60 * 60, retries=RETRIES)
def plan(source: str, pieces: int, hops: int | None) -> AnalysisJob | str:
    """Decide what to count. Returns the job, or an error message of one line."""
    try:
        return plan_analysis(Path(TRACES), source, pieces=pieces, hops=hops)
    except SpecmoeError as error:
        return first_line(error)


@app.function(
    image=cpu_image(), volumes={TRACES: trace_volume}, cpu=CORES, memory=MEMORY_MIB, timeout=4 * 60 * 60, retries=RETRIES
)
def count(job: AnalysisJob, number: int, volume: str) -> tuple[int, bool, str]:
    """Count a part of a trace on the mounted Volume `volume`.

    Returns its number, whether it had been counted before, and an error message of one line, empty without an error.
    """
    try:
        cached = count_part(Path(TRACES), job, number)
    except SpecmoeError as error:
        return number, False, first_line(error)
    modal.Volume.from_name(volume).commit()
    return number, cached, ""


@app.local_entrypoint()
def main(
    out: str,
    run_id: str | None = None,
    trace: str | None = None,
    containers: int = 4,
    hops: int | None = None,
    seed: int = 0,
    volume: str = TRACE_VOLUME,
) -> None:
    """Analyze a run or a local trace, and write the report to a local folder."""
    with one_line_errors("analyze"):
        if (run_id is None) == (trace is None):
            raise SpecmoeError("expected either --run-id, of a collected run, or --trace, a local trace folder")
        if containers < 1:
            raise SpecmoeError(f"--containers {containers}: expected 1 or more")
        store = trace_volume if volume == TRACE_VOLUME else modal.Volume.from_name(volume).hydrate()
        source = run_id if run_id is not None else upload_trace(store, Trace.open(str(trace)))
        job = plan.with_options(volumes={TRACES: store}).remote(source, containers, hops)
        if isinstance(job, str):
            raise SpecmoeError(job)
        remote = count.with_options(volumes={TRACES: store}, max_containers=containers)
        total = len(job.parts)
        for number, cached, refusal in remote.starmap([(job, number, volume) for number in range(total)], order_outputs=False):
            if refusal:
                raise SpecmoeError(f"part {number + 1} of {total}: {refusal}")
            print(f"part {number + 1} of {total}: {'had been counted before' if cached else 'counted'}", flush=True)
        counts = merge_counts(job, (_read(store, job.stored(number)) for number in range(total)))
        findings = write_analysis(make_statistics(counts, job.described(), seed=seed), Path(out))
        print_findings(findings)
        print(f"report: {Path(out) / 'report.html'}")


def _read(store: modal.Volume, path: str) -> bytes:
    content = bytearray()
    for piece in store.read_file(path):
        content += piece
        if len(content) > MAX_STORED_BYTES:
            raise SpecmoeError(f"{path} on the Volume is larger than {MAX_STORED_BYTES >> 30} GiB: it is not a file of counts")
    return bytes(content)
