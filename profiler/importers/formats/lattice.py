"""Import lattice's routing traces: JSON lines, one per (MoE layer, token), of a single sequence.

{"layer_idx": 3, "token_idx": 17, "selected_ids": [4, 91, 12, 200], "gate_weights": [0.31, 0.28, 0.22, 0.19]}

Lines may come in any order, `gate_weights` may be absent or empty, and other fields are ignored
(github.com/ohdearquant/lattice, crates/inference/src/moe_admission.rs, `TraceRecord`, commit 3739dc5). Only a reader of the
format was found, no collector: whether weights are renormalized, and whether the prompt is included, is unknown.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from profiler.errors import TraceError
from profiler.importers.reading import files_of, first_object, json_lines, sources_of
from profiler.importers.rows import ImportedRows
from profiler.importers.target import Target

NAME = "lattice"
ABOUT = "lattice JSON lines: layer_idx, token_idx, selected_ids[, gate_weights]; a file for each sequence"
KINDS = ("file", "folder")
PATTERNS = ("*.jsonl", "*.json")


def detect(source: Path) -> bool:
    files = files_of(source, *PATTERNS)
    return bool(files) and {"layer_idx", "token_idx", "selected_ids"} <= first_object(files[0]).keys()


def read(source: Path, target: Target) -> None:
    target.gaps.append("it is unknown whether positions include the prompt, and which tokens were generated")
    # A second sequence in the file would count from 0 again.
    target.contradiction = "different rows with one layer_idx and token_idx: each sequence needs a file of its own"
    files = sources_of(source, *PATTERNS)
    for path in files:
        problem_id = target.problem("lattice", path.stem)
        for rows in json_lines(path):
            ids_NK = rows.expert_ids("selected_ids")
            weighted = [bool(found.get("gate_weights")) for found in rows.objects]
            if any(weighted) and not all(weighted):
                number = rows.numbers[weighted.index(False)]
                raise TraceError(f"{path}, line {number}: no gate_weights, but other lines have them")
            weights_NK = rows.weights("gate_weights", ids_NK) if any(weighted) else None
            problem_N = np.full(len(ids_NK), problem_id)
            target.add(
                ImportedRows(problem_N, rows.integers("token_idx"), rows.integers("layer_idx"), ids_NK, weights_NK), rows.where
            )
