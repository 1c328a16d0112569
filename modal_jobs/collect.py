"""Collect routing on rented GPUs.

    modal run modal_jobs/collect.py --dataset gsm8k --model mixtral-8x7b --num-problems 100
    modal run --detach modal_jobs/collect.py ...            # continues when this machine disconnects
    modal run modal_jobs/collect.py::download --run-id RUN  # fetch the trace of a detached run
    specmoe plan ...                                        # what it would do and cost; needs no account

The work is in `profiler.plan.job`, `modal_jobs.shards` and `modal_jobs.download`; this file runs it on Modal.
"""

# No `from __future__ import annotations` here: Modal needs the types of class parameters as types, not as strings.

import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import modal
import modal.experimental

from modal_jobs.download import download_run, finished_shards, skipped_shards, stored_job
from modal_jobs.image import (
    CACHE,
    HF_SECRET,
    TRACE_VOLUME,
    TRACES,
    cache_volume,
    cpu_image,
    gpu_image,
    trace_volume,
)
from modal_jobs.running import one_line_errors, say
from modal_jobs.shards import (
    ShardReport,
    collect_shard,
    dollars_per_hour,
    find_skipped,
    finished_attempt,
    start_collector,
)
from modal_jobs.weights import fetch_checkpoint
from profiler.capture.metadata import describe_kernels
from profiler.collect.options import RentedJobOptions
from profiler.errors import EngineStoppedError, SpecmoeError, counted, first_line
from profiler.models.gpus import device_name, find_gpu
from profiler.plan.estimate import CORES, MEMORY_GIB
from profiler.plan.job import (
    DEFAULT_GPU,
    FALLBACK_GPU,
    JOB_FILE,
    CollectJob,
    JobPlan,
    make_plan,
    read_job,
    write_job,
)
from profiler.terminal_options import plain_signature
from profiler.trace.writer import write_text

DAY = 24 * 60 * 60
COMMIT_FILE = "commit.txt"

app = modal.App("specmoe-collect")


@app.cls(
    image=gpu_image(),
    gpu=[DEFAULT_GPU, FALLBACK_GPU],
    cpu=CORES,
    memory=MEMORY_GIB * 1024,
    volumes={CACHE: cache_volume, TRACES: trace_volume},
    timeout=DAY,
    startup_timeout=30 * 60,
    retries=modal.Retries(max_retries=3, initial_delay=1.0),
    scaledown_window=60,
)
class Collector:
    """A container that loads the model once and collects shards."""

    run_id: str = modal.parameter()
    gpu: str = modal.parameter(default=DEFAULT_GPU)

    @modal.enter()
    def start(self) -> None:
        """Load the model from the cache. If that fails, every call returns the reason, since retrying would not help."""
        self._since = self._began = time.monotonic()
        # The weights are in the cache: no token is needed, and nothing must change between two containers.
        os.environ["HF_HUB_OFFLINE"] = "1"
        self._refusal: str | None = None
        try:
            self._job = read_job(self._folder.joinpath(JOB_FILE).read_bytes(), JOB_FILE)
            self._collector = start_collector(self._job, _pinned(self._folder) or self._job.revision, say=say)
        except SpecmoeError as error:
            self._refusal = first_line(error)
        # Keeps compiled code and other caches for the next container.
        cache_volume.commit()

    @modal.method()
    def collect(self, shard: int) -> ShardReport:
        """Collect a shard, unless it is finished already."""
        if self._refusal is not None:
            return ShardReport(shard=shard, error=self._refusal)
        rate = dollars_per_hour(device_name(), find_gpu(self.gpu))
        try:
            trace_volume.reload()
            report = collect_shard(
                self._folder,
                self._job,
                shard,
                self._collector,
                commit=trace_volume.commit,
                say=say,
                spent=lambda: rate * (time.monotonic() - self._began) / 3600,
            )
        except EngineStoppedError as error:
            # Another container may succeed. This one must not take all other shards and fail them.
            modal.experimental.stop_fetching_inputs()
            raise RuntimeError(f"shard {shard}: {first_line(error)}") from error
        except SpecmoeError as error:
            return ShardReport(shard=shard, error=first_line(error))
        except Exception as error:
            # Modal retries. The message names the shard, because the caller of a map gets errors without their input.
            raise RuntimeError(f"shard {shard}: {type(error).__name__}: {first_line(error)}") from error
        before, self._since = self._since, time.monotonic()
        return report.with_cost(self._since - before, rate)

    @modal.exit()
    def stop(self) -> None:
        """Stop the engine."""
        if self._refusal is None:
            self._collector.close()

    @property
    def _folder(self) -> Path:
        return Path(TRACES) / self.run_id


@app.function(image=cpu_image(), volumes={CACHE: cache_volume}, timeout=4 * 60 * 60, retries=2)
def fetch_weights(checkpoint: str, revision: str | None) -> tuple[str | None, str]:
    """Download the model's files into the cache, on a machine without a GPU.

    Returns their commit, and an error message of one line, empty without an error.
    """
    try:
        commit = fetch_checkpoint(checkpoint, revision, say=say)
    except SpecmoeError as error:
        return None, first_line(error)
    cache_volume.commit()
    return commit, ""


@app.function(image=cpu_image(), volumes={TRACES: trace_volume}, timeout=DAY, retries=6, nonpreemptible=True)
def orchestrate(run_id: str, gpu: str | None, containers: int, secret: str | None) -> list[ShardReport]:
    """Fetch the weights, then collect all unfinished shards. Continues when the client disconnects.

    After a day, the longest timeout that Modal allows, it is restarted and skips the finished shards.
    """
    run = Path(TRACES) / run_id
    job = read_job(run.joinpath(JOB_FILE).read_bytes(), JOB_FILE)
    todo = [
        shard
        for shard in range(job.num_shards)
        if find_skipped(run, shard) is None and finished_attempt(run, job, shard) is None
    ]
    if len(todo) < job.num_shards:
        say(f"{job.num_shards - len(todo)} of {job.num_shards} shards were already finished")
    if not todo:
        return []
    if job.checkpoint is not None:
        fetch = fetch_weights if secret is None else fetch_weights.with_options(secrets=[modal.Secret.from_name(secret)])
        commit, refusal = fetch.remote(job.checkpoint, _pinned(run) or job.revision)
        if refusal:
            return [ShardReport(shard=shard, error=refusal) for shard in todo]
        if commit is not None and _pinned(run) is None:
            # All shards must use the same weights, even if the repository changes in between.
            write_text(run / COMMIT_FILE, commit)
            trace_volume.commit()
    # Modal's decorator replaces the class with a `modal.Cls`, which type checkers do not see.
    configured = cast("modal.Cls", Collector).with_options(max_containers=containers, gpu=gpu)
    collector = configured(run_id=run_id, gpu=gpu or DEFAULT_GPU)
    outcomes = collector.collect.map(todo, order_outputs=False, return_exceptions=True)
    return list(_watch(outcomes, todo, job))


def _pinned(run: Path) -> str | None:
    """The commit of the weights that the run started with, or None."""
    path = run / COMMIT_FILE
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _watch(outcomes: Iterable[ShardReport | BaseException], todo: list[int], job: CollectJob) -> Iterator[ShardReport]:
    """Yield reports as they arrive, printing the total cost so far. Shards whose container died without a report come last."""
    dollars = hours = 0.0
    tokens = 0
    left, nameless = list(todo), []
    for outcome in outcomes:
        report = _failed(outcome) if isinstance(outcome, BaseException) else outcome
        if report is None or report.shard not in left:
            nameless.append(f"{type(outcome).__name__}: {first_line(outcome)}" if isinstance(outcome, BaseException) else "")
            continue
        left.remove(report.shard)
        tokens, hours, dollars = tokens + report.tokens, hours + report.seconds / 3600, dollars + report.dollars
        result = f"failed: {report.error}" if report.error else f"finished, {report.tokens:,} tokens"
        if report.gaps:
            result = f"has no problem that can be run: {report.gaps[0]}"
        say(
            f"shard {report.shard + 1} of {job.num_shards} {result}; total {tokens:,} tokens, {hours:.2f} GPU hours, "
            f"about ${dollars:.2f}, {counted(len(left), 'shard')} left"
        )
        yield report
    for shard in left:
        yield ShardReport(shard=shard, error=nameless.pop(0) if nameless else "its container ended without a report")


def _failed(error: BaseException) -> ShardReport | None:
    """The report of a shard whose collection raised an error; None if the error does not name the shard."""
    named = re.match(r"shard (\d+): (.*)", first_line(error))
    return None if named is None else ShardReport(shard=int(named.group(1)), error=named.group(2))


def collect_here(**arguments: Any) -> None:
    """Collect a trace on rented GPUs and download it."""
    with one_line_errors("collect"):
        options = RentedJobOptions(**{**arguments, "data_files": _path(arguments.get("data_files"))})
        plan = make_plan(options)
        target = Path(options.out or f"traces/{plan.job.run_id}")
        if target.exists():
            raise SpecmoeError(f"{target} exists: choose another --out, or move it away")
        secret = _secret(plan.job, options.hf_secret)
        job = _upload(plan)
        print("\n".join(plan.lines()), flush=True)
        began = time.monotonic()
        call = orchestrate.spawn(job.run_id, options.gpu, options.containers, secret)
        print(f"  with --detach it continues without this machine; then: ...::download --run-id {job.run_id}", flush=True)
        reports = call.get()
        failed = [report for report in reports if report.error]
        for report in failed:
            print(f"shard {report.shard + 1} of {job.num_shards} failed: {report.error}")
        if failed:
            raise SpecmoeError(f"{len(failed)} of {job.num_shards} shards failed: run again to resume; finished ones are kept")
        _download(trace_volume, job.run_id, target)
        _print_end(reports, time.monotonic() - began)


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


# Modal derives the command line's arguments from the function's signature and annotations.
main_signature, main_annotations = plain_signature(RentedJobOptions)
collect_here.__name__ = "main"
collect_here.__annotations__ = main_annotations
# Functions accept attributes, but their type does not declare them.
collect_here.__signature__ = main_signature  # type: ignore[attr-defined] # inspect reads it, typeshed has it not
main = app.local_entrypoint(name="main")(collect_here)


def fetch_run(run_id: str, out: str | None = None, volume: str = TRACE_VOLUME) -> None:
    """Download a finished run from the Volume, verify it and merge it into one trace."""
    with one_line_errors("collect"):
        _download(modal.Volume.from_name(volume), run_id, Path(out or f"traces/{run_id}"))


# A separate app, which needs no image. Its entry point is unnamed here, so that `modal run modal_jobs/collect.py` means `main`.
download = modal.App("specmoe-download")
download.local_entrypoint(name="download")(fetch_run)


def _upload(plan: JobPlan) -> CollectJob:
    """Upload the job to the Volume. If it is there already, it keeps the shards that it started with."""
    stored = stored_job(trace_volume, plan.job.run_id)
    if stored is not None:
        finished = len(finished_shards(trace_volume, stored)) + len(skipped_shards(trace_volume, stored))
        print(f"{stored.run_id} was started before: {finished} of {stored.num_shards} shards are finished", flush=True)
        return stored
    with tempfile.TemporaryDirectory() as folder:
        write_job(Path(folder), plan.job, plan.problems)
        try:
            _put(Path(folder), plan.job.run_id, force=False)
        except FileExistsError:
            # Another client started the same run a moment ago, or an upload was interrupted before the job's own file.
            stored = stored_job(trace_volume, plan.job.run_id)
            if stored is not None:
                return stored
            _put(Path(folder), plan.job.run_id, force=True)
    return plan.job


def _put(folder: Path, run_id: str, *, force: bool) -> None:
    with trace_volume.batch_upload(force=force) as batch:
        # The job's own file comes last: a run exists once it is there.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == JOB_FILE):
            batch.put_file(path, f"/{run_id}/{path.name}")


def _secret(job: CollectJob, name: str | None) -> str | None:
    """The name of the secret with the Hugging Face token that the model's repository requires, or None if it requires none.

    The secret is looked up before anything costs money.
    """
    if name is None and not job.is_gated:
        return None
    name = name or HF_SECRET
    try:
        modal.Secret.from_name(name, required_keys=["HF_TOKEN"]).hydrate()
    except modal.exception.NotFoundError as error:
        raise SpecmoeError(
            f"no Modal secret {name!r} with HF_TOKEN, which {job.checkpoint} needs: accept the model's terms on "
            f"huggingface.co, then 'modal secret create {name} HF_TOKEN=hf_...'"
        ) from error
    return name


def _download(volume: modal.Volume, run_id: str, target: Path) -> None:
    trace = download_run(volume, run_id, target, say=say)
    size = sum(entry.bytes for entry in trace.manifest.files.values()) if trace.manifest else 0
    print(
        f"{target}: {counted(trace.problems.num_rows, 'problem')}, {trace.num_rows:,} routing rows, {size / 1e6:.1f} MB, "
        "complete"
    )
    for line in describe_kernels(trace.metadata.capture.get("moe_kernels", {})):
        print(f"  {line}")


def _print_end(reports: list[ShardReport], seconds: float) -> None:
    tokens = sum(report.tokens for report in reports)
    hours, dollars = sum(report.seconds for report in reports) / 3600, sum(report.dollars for report in reports)
    for report in reports:
        if report.usage is not None:
            speed = f"{report.tokens_per_second:,.0f} tokens/s, " if report.tokens_per_second else ""
            print(f"  shard {report.shard + 1}: {report.tokens:,} tokens, {speed}{report.device}, {report.usage}")
    print(
        f"{tokens:,} tokens in {seconds:.0f} s, {hours:.2f} GPU hours, about ${dollars:.2f} "
        "(not counting lost attempts and the minute that machines idle before they stop)"
    )
