"""JSON lines, one per (problem, token, MoE layer): the project's own, and the older spelling of loggers like it.

{"problem_id": 0, "layer": 0, "token_id": 0, "expert_ids": [3, 7], "weights": [0.6, 0.4]}
{"dataset": "gsm8k", "problem_id": 0, "layer": 0, "token_idx": 0, "experts": [7, 0], "gating_probs": [0.8, 0.2]}

In the older one, `token_idx` (or `token_pos`) counts generated tokens, problems are numbered within their dataset, and rows may
be missing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from profiler.errors import TraceError
from profiler.importers.lines import Objects, first_object, json_lines
from profiler.importers.target import EMPTY, Rows, Target

NAME = "jsonl"
ABOUT = "JSON lines with problem_id, layer, token_id (token_idx, token_pos), expert_ids (experts), weights (gating_probs)"

_SPELLINGS = {
    "token_id": ("token_id", "token_idx", "token_pos"),
    "expert_ids": ("expert_ids", "experts"),
    "weights": ("weights", "gating_probs"),
}


def detect(source: Path) -> bool:
    found = first_object(source)
    return "layer" in found and any(name in found for name in _SPELLINGS["expert_ids"])


def read(source: Path, target: Target) -> None:
    first = first_object(source)
    spelled = {name: next((s for s in options if s in first), options[0]) for name, options in _SPELLINGS.items()}
    has_weights = spelled["weights"] in first
    named = isinstance(first.get("problem_id"), str) or "dataset" in first
    if spelled["token_id"] != "token_id":
        target.gaps.append(f"positions are the source's {spelled['token_id']}: whether prompts are included is not known")
    for rows in json_lines(source):
        ids_NK = rows.lists(spelled["expert_ids"], EMPTY)
        weights_NK = weights_of(rows, spelled["weights"], ids_NK) if has_weights else None
        if named:
            datasets = [str(found.get("dataset", "unknown")) for found in rows.objects]
            names = zip(datasets, rows.texts("problem_id"), strict=True)
            problem_N = np.array([target.problem(dataset, problem) for dataset, problem in names])
        else:
            problem_N = rows.integers("problem_id")
        target.add(Rows(problem_N, rows.integers(spelled["token_id"]), rows.integers("layer"), ids_NK, weights_NK), rows.where)


def weights_of(rows: Objects, name: str, ids_NK: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The weights of rows with these experts. Raises `TraceError`, naming the line, if there are more or fewer."""
    weights_NK = rows.lists(name, np.nan)
    for number, found, ids_K in zip(rows.numbers, rows.objects, (ids_NK != EMPTY).sum(1).tolist(), strict=True):
        if len(found[name]) != ids_K:
            raise TraceError(f"{rows.path}, line {number}: {len(found[name])} weights of {ids_K} experts")
    return weights_NK
