"""What an unfinished collection has recorded: counted in complete lines and blocks of its files."""

from __future__ import annotations

from pathlib import Path

from profiler.errors import TraceError, counted
from profiler.trace.schema import CAPTURE_FOLDER, Metadata
from profiler.trace.stream import ROUTING_STREAM, read_index


def describe_unsealed(directory: Path, metadata: Metadata) -> str:
    """The end of a sentence that says what was recorded into `directory` so far, and how to make a trace of it."""
    capture = directory / CAPTURE_FOLDER
    tokens = 0
    for path in sorted(capture.glob(f"run-*/{ROUTING_STREAM}")):
        try:
            index = read_index(path)
            tokens += 0 if index is None else len(index.token_ids_N)
        except TraceError as error:
            return f"; {error}"
    finished = sum(path.read_bytes().count(b"\n") for path in capture.glob("run-*/completions.jsonl"))
    if not tokens:
        return "; nothing was recorded yet"
    outputs = f" and the outputs of {counted(finished, 'problem')}" if finished else ""
    if metadata.capture.get("server"):
        how = "'python -m vllm_patch finish' seals them"
    else:
        how = "'specmoe collect --resume' continues the collection, 'specmoe convert' makes a trace of what was recorded"
    return f"; {tokens:,} tokens{outputs} wait in {CAPTURE_FOLDER}/: {how}"
