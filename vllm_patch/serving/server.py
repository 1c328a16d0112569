"""Capture of online traffic: a server's engine records into `OUT/trace-00000`, `trace-00001`, ...

    SPECMOE_CAPTURE=1 SPECMOE_CAPTURE_OUT=traces/served vllm serve MODEL

The worker writes rows. The process that runs the scheduler writes the output of each finished request (`OUT/finished.jsonl`).
A separate process (`sealer`) joins the two when a trace is full or the server has exited, so that no request waits for it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from profiler.capture.finish import finish_trace
from profiler.capture.inputs import CapturedInputs
from profiler.capture.requests import ABORTED, CapturedRequest, Sequence, problem_ids, read_requests
from profiler.capture.sealing import run_folder
from profiler.errors import TraceError
from profiler.trace.reader import Trace
from profiler.trace.schema import CAPTURE_FOLDER, MANIFEST_FILE, METADATA_FILE, Metadata
from profiler.trace.writer import write_metadata
from vllm_patch.serving import sealer

DATASET = "served"
FINISHED_FILE = "finished.jsonl"
# How long a stopping server waits for its last trace to be sealed. Sealing continues after that without the server.
SEAL_SECONDS = 3.0
# How long the engine may take to write its queued rows at shutdown. The wait ends as soon as the engine exits.
SHUTDOWN_SECONDS = 15.0

log = logging.getLogger("vllm.specmoe")


def log_finished_requests(out: Path) -> None:
    """Make vLLM's scheduler append each finished request to `out/finished.jsonl`, if it runs in this process. Idempotent."""
    from vllm.v1.core.sched.scheduler import Scheduler

    # mypy: vLLM is untyped here, and a function's type does not declare attributes.
    free: Any = Scheduler._free_request
    if hasattr(free, "specmoe_original"):
        return

    @functools.wraps(free)
    def log_and_free(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        reason = request.get_finished_reason()
        record = {
            "request_id": request.request_id,
            "output_token_ids": list(request.output_token_ids),
            # `reason or ABORTED` would be wrong: vLLM's STOP has the value 0.
            "finish_reason": ABORTED if reason is None else str(reason),
        }
        _append(out, record)
        return free(self, request, *args, **kwargs)

    log_and_free.specmoe_original = free  # type: ignore[attr-defined]
    Scheduler._free_request = log_and_free


def log_stop_strings(out: Path) -> None:
    """Make vLLM's front-end process, if this is it, log the requests that it ends at a stop string. Idempotent.

    The scheduler sees such a request only as aborted.
    """
    from vllm.v1.engine.output_processor import OutputProcessor

    # mypy: as above.
    process: Any = OutputProcessor.process_outputs
    if hasattr(process, "specmoe_original"):
        return

    @functools.wraps(process)
    def process_and_log(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = process(self, *args, **kwargs)
        for request_id in result.reqs_to_abort:
            _append(out, {"request_id": request_id, "stopped": True})
        return result

    process_and_log.specmoe_original = process  # type: ignore[attr-defined]
    OutputProcessor.process_outputs = process_and_log


def _append(out: Path, record: dict[str, Any]) -> None:
    """Append a line. A full disk loses the record but does not disturb the request."""
    try:
        with (out / FINISHED_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, separators=(",", ":")) + "\n")
    except OSError as error:
        log.error("specmoe: a finished request was not recorded: %s", error)


def extend_shutdown_timeout() -> None:
    """Make the server's front-end process give its engine time to close the trace. Idempotent.

    By default, vLLM kills the engine immediately.
    """
    from vllm.v1.engine import utils

    # mypy: as above.
    stop: Any = utils.shutdown
    if hasattr(stop, "specmoe_original") or "timeout" not in inspect.signature(stop).parameters:
        return

    @functools.wraps(stop)
    def stop_with_timeout(processes: Any, timeout: float | None = None) -> Any:
        return stop(processes, timeout=max(timeout or 0.0, SHUTDOWN_SECONDS))

    stop_with_timeout.specmoe_original = stop  # type: ignore[attr-defined]
    utils.shutdown = stop_with_timeout


def next_trace(out: Path) -> Path:
    """The path of the next trace under `out`: `trace-NNNNN`, one after the highest number there."""
    taken = [int(match.group(1)) for path in out.glob("trace-*") if (match := re.fullmatch(r"trace-(\d{5})", path.name))]
    return out / f"trace-{max(taken, default=-1) + 1:05d}"


def begin_trace(directory: Path, metadata: Metadata) -> Path:
    """Create a trace directory and return the folder for its rows."""
    directory.mkdir(parents=True)
    write_metadata(directory, metadata)
    return run_folder(directory, 0)


class Sealer:
    """A separate process that seals traces: those that are closed, and those still open when this process exits.

    It is connected by a pipe and is not in this process's tree: vLLM may kill an engine that is slow to stop, with all its
    children.
    """

    def __init__(self) -> None:
        reader, writer = os.pipe()
        try:
            # Returns immediately: the program forks and leaves this process's tree. It runs as a file and not with -m, because
            # the package's imports would stay in memory with it.
            subprocess.run([sys.executable, "-I", sealer.__file__], stdin=reader, stdout=subprocess.DEVNULL, check=True)
        finally:
            os.close(reader)
        self._pipe = os.fdopen(writer, "w", encoding="utf-8", buffering=1)
        self._last: Path | None = None

    def opened(self, directory: Path) -> None:
        """Have the trace sealed when this process exits, unless it is closed before."""
        self._send("open", directory)

    def closed(self, directory: Path) -> None:
        """Have the trace sealed now."""
        self._last = directory
        self._send("close", directory)

    def wait(self) -> None:
        """Wait up to `SEAL_SECONDS` for the trace that was closed last to be sealed."""
        deadline = time.monotonic() + SEAL_SECONDS
        while self._last is not None and self._last.exists() and not (self._last / MANIFEST_FILE).exists():
            if time.monotonic() > deadline:
                log.warning("%s is still being sealed; it is complete when its %s appears", self._last, MANIFEST_FILE)
                break
            time.sleep(0.1)

    def _send(self, command: str, directory: Path) -> None:
        try:
            self._pipe.write(json.dumps([command, str(directory.absolute())]) + "\n")
        except OSError as error:
            log.error("%s will not be sealed (%s): run 'python -m vllm_patch finish' on it", directory, error)


def finish(directory: Path) -> Trace | None:
    """Seal a trace whose server has stopped or started the next trace.

    Returns None, and removes the folder, if the trace has no requests.

    A problem's id is the number that its client passed as `vllm_xargs={"problem_id": N}`. Requests with no number, with text,
    or with a number that another request has get the smallest free numbers. Their source key is their request id (or text).
    Raises `TraceError` if `directory` is not an unsealed trace.
    """
    if not (directory / METADATA_FILE).is_file() or not (directory / CAPTURE_FOLDER).is_dir():
        raise TraceError(f"{directory} is not an unsealed trace: expected {METADATA_FILE} and {CAPTURE_FOLDER}/")
    requests = read_requests(run_folder(directory, 0))
    if not requests:
        shutil.rmtree(directory)
        return None
    # Sealing computes the gaps; those of an earlier sealing that was interrupted must not stay.
    metadata = Trace.open(directory, allow_incomplete=True).metadata.model_copy(update={"gaps": []})
    finished = _read_finished(directory.parent / FINISHED_FILE, {request.request_id for request in requests})
    inputs = CapturedInputs(run_folder(directory, 0))
    decode = _decoder(metadata)
    ids = problem_ids(requests)
    sequences = [
        Sequence(
            problem_id=ids[request.number],
            captured_as=(0, request.number),
            dataset=DATASET,
            source_key=request.label if isinstance(request.label, str) else request.request_id,
            prompt=decode(request.prompt_token_ids),
            output=decode(found["output_token_ids"]),
            prompt_token_ids=request.prompt_token_ids,
            output_token_ids=found["output_token_ids"],
            cached_tokens=request.cached_tokens,
            finish_reason=found["finish_reason"],
        )
        for request in requests
        for found in [_record_of(request, finished[request.request_id], inputs)]
    ]
    return finish_trace(directory, metadata, sequences, inputs=inputs)


def _read_finished(path: Path, wanted: set[str]) -> defaultdict[str, list[dict[str, Any]]]:
    """The records of the finished requests of these ids. Some releases let clients choose ids, and so use one again."""
    finished: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    if not path.is_file():
        return finished
    with path.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines if line.endswith("\n")]
    selected = [record for record in records if record["request_id"] in wanted]
    for record in selected:
        if "stopped" not in record:
            finished[record["request_id"]].append(record)
    for request_id in {record["request_id"] for record in selected if "stopped" in record}:
        for record in finished[request_id]:
            if len(finished[request_id]) == 1 or record["finish_reason"] == ABORTED:
                record["finish_reason"] = "stop"
    return finished


def _record_of(request: CapturedRequest, records: list[dict[str, Any]], inputs: CapturedInputs) -> dict[str, Any]:
    """Take the record of a request from those with its id: the longest output that it read. Without one, it was aborted."""

    def tokens(record: dict[str, Any]) -> list[int]:
        return [*request.prompt_token_ids, *record["output_token_ids"]]

    possible = [record for record in records if inputs.difference(request.number, tokens(record)) is None]
    read = [record for record in possible if inputs.has_read(request.number, tokens(record))]
    # The last rows of a server that was killed may be lost: then an output counts if it is the only one that is possible.
    chosen = max(read, key=lambda record: len(tokens(record)), default=possible[0] if len(possible) == 1 else None)
    if chosen is None:
        return {"output_token_ids": [], "finish_reason": ABORTED}
    records.remove(chosen)
    return chosen


def _decoder(metadata: Metadata) -> Any:
    """A function from token ids to text. Without a tokenizer, the text is the ids themselves."""
    tokenizer = None
    if name := metadata.capture.get("tokenizer"):
        from transformers import AutoTokenizer

        with contextlib.suppress(OSError, ValueError):
            tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer is None:
        return lambda token_ids: " ".join(map(str, token_ids))
    return tokenizer.decode
