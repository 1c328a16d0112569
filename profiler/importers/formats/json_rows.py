"""Import JSON lines, one per (problem, token, MoE layer): our own export, and a variant that other loggers write.

{"problem_id": 0, "layer": 0, "token_id": 0, "expert_ids": [3, 7], "weights": [0.6, 0.4]}
{"dataset": "gsm8k", "problem_id": 0, "layer": 0, "token_idx": 0, "experts": [7, 0], "gating_probs": [0.8, 0.2]}

In the variant, `token_idx` (or `token_pos`) counts generated tokens, problems are numbered within their dataset, and rows may
be missing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from profiler.errors import TraceError
from profiler.importers.reading import JsonObjects, files_of, first_object, json_lines, sources_of
from profiler.importers.rows import ImportedRows
from profiler.importers.target import Target

NAME = "jsonl"
ABOUT = "JSON lines with problem_id, layer, token_id (token_idx, token_pos), expert_ids (experts), weights (gating_probs)"
KINDS = ("file", "folder")
PATTERNS = ("*.jsonl", "*.json")

_SPELLINGS = {
    "token_id": ("token_id", "token_idx", "token_pos"),
    "expert_ids": ("expert_ids", "experts"),
    "weights": ("weights", "gating_probs"),
}


def detect(source: Path) -> bool:
    files = files_of(source, *PATTERNS)
    found = first_object(files[0]) if files else {}
    return "layer" in found and any(name in found for name in _SPELLINGS["expert_ids"])


def read(source: Path, target: Target) -> None:
    named: bool | None = None
    spelled: dict[str, str] = {}
    files = sources_of(source, *PATTERNS)
    if len(files) > 1:
        # One recording in several files, by layers or by problems.
        target.contradiction = "two files have different rows of a problem, token and layer: convert them one by one"
    for rows in (rows for path in files for rows in json_lines(path)):
        if named is None:
            named = rows.have("dataset") or isinstance(rows.objects[0].get("problem_id"), str)
            spelled = {name: next(filter(rows.have, options), options[0]) for name, options in _SPELLINGS.items()}
            if spelled["token_id"] != "token_id":
                target.gaps.append(
                    f"positions are the source's {spelled['token_id']}: it is unknown whether they include the prompt"
                )
        ids_NK = rows.expert_ids(spelled["expert_ids"])
        weights_NK = rows.weights(spelled["weights"], ids_NK) if rows.have(spelled["weights"]) else None
        if named:
            datasets = [str(found.get("dataset", "unknown")) for found in rows.objects]
            names = zip(datasets, rows.texts("problem_id"), strict=True)
            problem_N = np.array([target.problem(dataset, problem) for dataset, problem in names])
        else:
            _refuse_names(rows)
            problem_N = rows.integers("problem_id")
        target.add(
            ImportedRows(problem_N, rows.integers(spelled["token_id"]), rows.integers("layer"), ids_NK, weights_NK), rows.where
        )


def _refuse_names(rows: JsonObjects) -> None:
    """Raise `TraceError` if rows have a dataset but the first ones had none: problems of equal number would be merged."""
    if rows.have("dataset"):
        raise TraceError(f"{rows.where}: a 'dataset', which earlier lines lack; add one to every line")
