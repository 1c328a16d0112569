"""MoE-Beyond's CSV, a file per prompt (`prompt_7_data.csv`): `Layer ID,Batch Number,Token,Activated Expert IDs`.

1,0,Hello,"[8, 26, 56, 57, 60, 43]"

`Token` is the token's text, so that its position is the number of rows of its layer before it. One pass over the prompt, no
weights, and experts in no particular order (github.com/ngavhane/moe-beyond). A folder of such files becomes one trace.
"""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from profiler.errors import TraceError
from profiler.importers.lines import head
from profiler.importers.olmoe import integers
from profiler.importers.target import Target
from profiler.schema import PREFILL

NAME = "moe-beyond"
ABOUT = "MoE-Beyond CSV, or a folder of them: Layer ID, Batch Number, Token, Activated Expert IDs; no weights"

_COLUMNS = ("Layer ID", "Batch Number", "Token", "Activated Expert IDs")
MAX_FIELD_BYTES = 1 << 20


def detect(source: Path) -> bool:
    files = _files(source)
    return bool(files) and head(files[0]).lstrip("\ufeff").startswith("Layer ID,")


def read(source: Path, target: Target) -> None:
    target.gaps.append("prefill only: one pass over each prompt")
    files = _files(source)
    if not files:
        raise TraceError(f"{source}: no .csv file")
    for path in files:
        number = re.search(r"(\d+)", path.stem)
        name = number.group(1) if number else path.stem
        layers: dict[tuple[str, int], list[np.ndarray]] = defaultdict(list)
        texts: dict[tuple[str, int], list[str | None]] = defaultdict(list)
        for line, row in _rows(path):
            where = f"{path}, line {line}"
            try:
                layer = int(row["Layer ID"])
                ids = json.loads(row["Activated Expert IDs"])
            except (ValueError, TypeError, RecursionError) as error:
                raise TraceError(f"{where}: expected a layer number and a list of expert ids") from error
            layers[row["Batch Number"], layer].append(integers(ids, 1, f"{where}: Activated Expert IDs"))
            texts[row["Batch Number"], layer].append(row["Token"])
        for (batch, layer), lists in layers.items():
            problem_id = target.problem("moe-beyond", name if batch == "0" else f"{name}/{batch}")
            width = max(map(len, lists))
            ids_NK = np.full((len(lists), 1, width), -1, dtype=np.int32)
            for row_number, ids_K in enumerate(lists):
                ids_NK[row_number, 0, : len(ids_K)] = ids_K
            target.add_arrays(problem_id, np.arange(len(lists)), [layer], ids_NK, None, f"{path}, layer {layer}")
            if layer == min(other for b, other in layers if b == batch):
                tokens = texts[batch, layer]
                target.add_tokens(problem_id, np.arange(len(tokens)), PREFILL, texts_T=tokens)


def _files(source: Path) -> list[Path]:
    if source.is_dir():
        return sorted(source.glob("*.csv"), key=lambda path: (len(path.name), path.name))
    return [source] if source.suffix == ".csv" else []


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    csv.field_size_limit(MAX_FIELD_BYTES)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file)
        try:
            absent = [name for name in _COLUMNS if name not in (reader.fieldnames or [])]
            if absent:
                raise TraceError(f"{path} lacks the column {absent[0]!r}")
            for row in reader:
                if any(row[name] is None for name in _COLUMNS):
                    raise TraceError(f"{path}, line {reader.line_num}: fewer fields than columns")
                yield reader.line_num, row
        except csv.Error as error:
            raise TraceError(f"{path}, line {reader.line_num}: {error}") from error
