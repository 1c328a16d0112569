"""A collection that did not finish: a trace of what there is, where going on (`specmoe collect --resume`) is not wanted."""

from __future__ import annotations

import shutil
from pathlib import Path

from profiler.capture import ABORTED, Sequence, finish_trace, problem_ids, read_completions, read_requests
from profiler.errors import TraceError
from profiler.importers.target import Target
from profiler.reader import Trace
from profiler.schema import CAPTURE_FOLDER, MANIFEST_FILE, METADATA_FILE
from profiler.sealing import run_folder, runs_of
from profiler.writer import exclusive

NAME = "interrupted"
ABOUT = "the folder of a collection that was interrupted"


def detect(source: Path) -> bool:
    return (source / METADATA_FILE).is_file() and (source / CAPTURE_FOLDER).is_dir() and not (source / MANIFEST_FILE).exists()


def read(source: Path, target: Target) -> None:
    if not detect(source):
        raise TraceError(f"{source}: expected {METADATA_FILE} and {CAPTURE_FOLDER}/, and no {MANIFEST_FILE}")
    with exclusive(source):
        metadata = Trace.open(source, allow_incomplete=True).metadata
        shutil.copytree(source / CAPTURE_FOLDER, target.directory / CAPTURE_FOLDER)
    sequences: dict[int, Sequence] = {}
    for run in runs_of(target.directory):
        folder = run_folder(target.directory, run)
        completions = {completion.problem_id: completion for completion in read_completions(folder)}
        requests = read_requests(folder)
        ids = problem_ids(requests)
        for request in requests:
            problem_id = ids[request.number]
            completion = completions.get(problem_id)
            if completion is not None:
                sequences[problem_id] = Sequence(captured_as=(run, request.number), **vars(completion))
            elif problem_id not in sequences or sequences[problem_id].finish_reason == ABORTED:
                # Its prompt is known, and what was routed of that.
                sequences[problem_id] = Sequence(
                    problem_id=problem_id,
                    captured_as=(run, request.number),
                    dataset="unfinished",
                    source_key=request.request_id,
                    prompt=" ".join(map(str, request.prompt_token_ids)),
                    output="",
                    prompt_token_ids=request.prompt_token_ids,
                    output_token_ids=[],
                    cached_tokens=request.cached_tokens,
                    finish_reason=ABORTED,
                )
    if not sequences:
        raise TraceError(f"{source}: nothing was recorded before the interruption")
    planned = sum(dataset.problems for dataset in metadata.datasets)
    gap = f"the collection was interrupted: {len(sequences)} of {planned or 'an unknown number of'} problems had begun"
    metadata = metadata.model_copy(update={"gaps": [*metadata.gaps, gap], "datasets": []})
    target.is_finished(finish_trace(target.directory, metadata, list(sequences.values()), others_abandoned=True))
