"""Turn an interrupted collection into a trace of what was recorded, instead of resuming it (`specmoe collect --resume`)."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

from profiler.capture.finish import finish_trace, list_some
from profiler.capture.inputs import find_faults
from profiler.capture.requests import (
    ABORTED,
    COMPLETIONS_FILE,
    PLANNED_FILE,
    REQUESTS_FILE,
    SKIPPED_FILE,
    CapturedRequest,
    Sequence,
    free_ids,
    read_completed,
    read_planned,
    read_requests,
    read_skipped,
)
from profiler.capture.sealing import STREAMS, run_folder, runs_of
from profiler.errors import TraceError, counted
from profiler.importers.target import Target
from profiler.trace.reader import Trace
from profiler.trace.schema import CAPTURE_FOLDER, GATES_FILE, MANIFEST_FILE, METADATA_FILE
from profiler.trace.stream import INPUTS_STREAM
from profiler.trace.writer import exclusive

NAME = "interrupted"
ABOUT = "the folder of a collection that was interrupted"
KINDS = ("folder",)

_FILES = (*STREAMS.values(), INPUTS_STREAM, REQUESTS_FILE, COMPLETIONS_FILE, PLANNED_FILE, SKIPPED_FILE, GATES_FILE)


def detect(source: Path) -> bool:
    return (source / METADATA_FILE).is_file() and (source / CAPTURE_FOLDER).is_dir() and not (source / MANIFEST_FILE).exists()


def read(source: Path, target: Target) -> None:
    if not detect(source):
        raise TraceError(f"{source}: expected {METADATA_FILE} and {CAPTURE_FOLDER}/, and no {MANIFEST_FILE}")
    if target.options.layers is not None or target.options.num_experts is not None:
        raise TraceError(f"{source}: layers and the number of experts can be chosen for other tools' formats only")
    with exclusive(source):
        metadata = Trace.open(source, allow_incomplete=True).metadata
        if metadata.capture.get("server"):
            raise TraceError(
                f"{source} was recorded by a server: seal it with 'python -m vllm_patch finish', which recovers more of it"
            )
        for run in runs_of(source):
            _copy_run(run_folder(source, run), run_folder(target.directory, run))
    sequences: dict[int, Sequence] = {}
    unlabeled: list[tuple[int, CapturedRequest]] = []
    for run in runs_of(target.directory):
        folder = run_folder(target.directory, run)
        sequences |= read_completed(target.directory, run)
        planned = {problem.problem_id: problem for problem in read_planned(folder)}
        for request in read_requests(folder):
            known = planned.get(request.label) if isinstance(request.label, int) else None
            if known is None:
                unlabeled.append((run, request))
            elif known.problem_id not in sequences or sequences[known.problem_id].finish_reason == ABORTED:
                # Its output was lost, but its prompt is known, and the routing recorded so far.
                sequences[known.problem_id] = known.sequence((run, request.number), request)
    for problem_id, (run, request) in zip(free_ids(sequences), unlabeled, strict=False):
        sequences[problem_id] = Sequence(
            problem_id=problem_id,
            captured_as=(run, request.number),
            dataset="unfinished",
            source_key=request.request_id,
            prompt=None,
            output="",
            prompt_token_ids=request.prompt_token_ids,
            output_token_ids=[],
            cached_tokens=request.cached_tokens,
            finish_reason=ABORTED,
        )
    if not sequences:
        raise TraceError(f"{source}: nothing was recorded before the interruption")
    faults = {sequence.problem_id: text for sequence, text in find_faults(target.directory, list(sequences.values()))}
    for problem_id in faults:
        del sequences[problem_id]
    if not sequences:
        raise TraceError(f"{source}: {next(iter(faults.values()))}")
    skipped = [record for run in runs_of(target.directory) for record in read_skipped(run_folder(target.directory, run))]
    count = sum(dataset.problems for dataset in metadata.datasets)
    of = counted(count, "problem") if count else "an unknown number of problems"
    gaps = [f"the collection was interrupted: {len(sequences)} of {of} had started"]
    gaps += list_some([f"left out {text}" for text in faults.values()])
    gaps += list_some([f"skipped problem {record.problem_id}: {record.reason}" for record in skipped])
    metadata = metadata.model_copy(update={"gaps": gaps, "datasets": []})
    target.is_finished(finish_trace(target.directory, metadata, list(sequences.values()), drop_other_requests=True))


def _copy_run(source: Path, target: Path) -> None:
    """Copy the files of a run. Refuses links, which could point to any file."""
    target.mkdir(parents=True)
    for name in _FILES:
        path = source / name
        if path.is_symlink() or (path.exists() and not stat.S_ISREG(path.lstat().st_mode)):
            raise TraceError(f"{path} is not a regular file")
        if path.exists():
            shutil.copyfile(path, target / name, follow_symlinks=False)
