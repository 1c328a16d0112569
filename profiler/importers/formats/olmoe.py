"""Import OLMoE's analysis: JSON lines of whole sequences, `input_ids` and `exp_ids` nested `[T][K][L]` (the layer last).

{"input_ids": [510, 12], "exp_ids": [[[3, 60], [9, 1]], [[5, 2], [3, 8]]]}: token 0 is routed to experts 3 and 9 at layer 0.

Recorded in a single pass over text, without weights; experts are in the order of their logits. A sequence is a piece of
concatenated documents (github.com/allenai/OLMoE, scripts/run_moe_analysis.py).
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.errors import TraceError, counted
from profiler.importers.reading import files_of, head, integer_array, json_lines, sources_of
from profiler.importers.target import Target
from profiler.trace.schema import PREFILL

NAME = "olmoe"
ABOUT = "OLMoE analysis JSON lines: input_ids, exp_ids[T][K][L]; no weights"
KINDS = ("file", "folder")
PATTERNS = ("*.jsonl", "*.json")


def detect(source: Path) -> bool:
    files = files_of(source, *PATTERNS)
    text = head(files[0]) if files else ""
    return text.lstrip().startswith("{") and '"exp_ids"' in text


def read(source: Path, target: Target) -> None:
    target.gaps.append("prefill only: sequences of concatenated text, nothing generated")
    files = sources_of(source, *PATTERNS)
    for path in files:
        for lines in json_lines(path):
            for number, found in zip(lines.numbers, lines.objects, strict=True):
                name = (path.stem, str(number - 1)) if len(files) > 1 else (str(number - 1),)
                _add(found, name, f"{path}, line {number}", target)


def _add(found: dict[str, Any], name: tuple[str, ...], where: str, target: Target) -> None:
    """Add the sequence of a line."""
    ids_TLK = _nested(found.get("exp_ids"), f"{where}: exp_ids").transpose(0, 2, 1)
    problem_id = target.problem("olmoe", *name)
    positions_T = np.arange(len(ids_TLK))
    target.add_arrays(problem_id, positions_T, list(range(ids_TLK.shape[1])), ids_TLK, None, where)
    if "input_ids" in found:
        vocab_ids_T = integer_array(found["input_ids"], f"{where}: input_ids")
        if len(vocab_ids_T) != len(ids_TLK):
            raise TraceError(f"{where}: {len(vocab_ids_T)} input_ids, but exp_ids of {counted(len(ids_TLK), 'token')}")
        target.add_tokens(problem_id, positions_T, PREFILL, vocab_ids_T=vocab_ids_T)


def _nested(value: object, what: str) -> npt.NDArray[np.int64]:
    """Lists nested `[T][K][L]` as an array. Raises `TraceError`, naming `what`, if they are ragged or not whole numbers."""
    shape = []
    flat: object = value
    for _ in range(2):
        if not isinstance(flat, list) or not flat or {*map(type, flat)} != {list}:
            raise TraceError(f"{what}: expected whole numbers, nested 3 deep")
        shape.append(len(flat[0]))
        if {*map(len, flat)} != {shape[-1]} or not shape[-1]:
            raise TraceError(f"{what} has rows of different length, or empty ones")
        flat = [*chain.from_iterable(flat)]
    return integer_array(flat, what).reshape(-1, *shape)
