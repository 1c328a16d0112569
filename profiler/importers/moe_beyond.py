"""Import MoE-Beyond's CSV, one file per prompt (`prompt_7_data.csv`): `Layer ID,Batch Number,Token,Activated Expert IDs`.

1,0,Hello,"[8, 26, 56, 57, 60, 43]"

`Token` is the token's text; its position is the number of earlier rows of the same layer. The files hold one pass over the
prompt, no weights, and experts in no particular order (github.com/ngavhane/moe-beyond). A folder of files becomes one trace.
"""

from __future__ import annotations

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from pydantic_core import from_json

from profiler.errors import TraceError
from profiler.importers.reading import files_of, head, integer_array, sources_of
from profiler.importers.rows import EMPTY, ImportedRows
from profiler.importers.target import Target
from profiler.trace.schema import MAX_TOP_K, PREFILL

NAME = "moe-beyond"
ABOUT = "MoE-Beyond CSV, or a folder of them: Layer ID, Batch Number, Token, Activated Expert IDs; no weights"
KINDS = ("file", "folder")

_COLUMNS = ("Layer ID", "Batch Number", "Token", "Activated Expert IDs")
MAX_FIELD_BYTES = 1 << 20
ROWS = 4096

_Line = tuple[int, dict[str, str]]


def detect(source: Path) -> bool:
    files = files_of(source, "*.csv")
    return bool(files) and head(files[0]).startswith("Layer ID,")


def read(source: Path, target: Target) -> None:
    target.gaps.append("prefill only: one pass over each prompt")
    files = sources_of(source, "*.csv")
    named = [(_name(path), path) for path in files]
    counts = Counter(name for name, _ in named)
    for name, path in named:
        if counts[name] > 1:
            raise TraceError(f"{path}: another file has the same prompt {name}")
        lines = _lines(path)
        seen = _Seen()
        while block := list(islice(lines, ROWS)):
            _add(path, name, block, seen, target)


@dataclass
class _Seen:
    """Progress through a file: the rows read of each (batch, layer), and the first layer of each batch."""

    rows: dict[tuple[str, int], int] = field(default_factory=lambda: defaultdict(int))
    first_layer: dict[str, int] = field(default_factory=dict)


def _add(path: Path, name: str, block: list[_Line], seen: _Seen, target: Target) -> None:
    """Add a block of lines of a file."""
    keys: list[tuple[int, int, int]] = []
    lists: list[np.ndarray] = []
    texts: dict[int, tuple[list[int], list[str | None]]] = {}
    for line, row in block:
        where = f"{path}, line {line}"
        batch = row["Batch Number"]
        if not re.fullmatch(r"\d{1,5}", row["Layer ID"], re.ASCII):
            raise TraceError(f"{where}: expected a layer number")
        layer = int(row["Layer ID"])
        try:
            ids_K = integer_array(from_json(row["Activated Expert IDs"]), f"{where}: Activated Expert IDs")
        except ValueError as error:
            raise TraceError(f"{where}: expected a list of expert ids") from error
        if len(ids_K) > MAX_TOP_K:
            raise TraceError(f"{where}: {len(ids_K)} experts, expected at most {MAX_TOP_K}")
        problem_id = target.problem("moe-beyond", name if batch == "0" else f"{name}/{batch}")
        position = seen.rows[batch, layer]
        seen.rows[batch, layer] += 1
        keys.append((problem_id, position, layer))
        lists.append(ids_K)
        # Every layer repeats the text of the tokens: take it from the first one only.
        if seen.first_layer.setdefault(batch, layer) == layer:
            known = texts.setdefault(problem_id, ([], []))
            known[0].append(position)
            known[1].append(row["Token"])
    ids_NK = np.full((len(lists), max(map(len, lists))), EMPTY, dtype=np.int64)
    for number, ids_K in enumerate(lists):
        ids_NK[number, : len(ids_K)] = ids_K
    problem_N, token_N, layer_N = np.array(keys, dtype=np.int64).T
    target.add(ImportedRows(problem_N, token_N, layer_N, ids_NK, None), f"{path}, lines {block[0][0]}..{block[-1][0]}")
    for problem_id, (at, tokens) in texts.items():
        target.add_tokens(problem_id, np.array(at), PREFILL, texts_T=tokens)


def _name(path: Path) -> str:
    number = re.fullmatch(r"prompt_(\d+)(_data)?", path.stem)
    return number.group(1) if number else path.stem


def _lines(path: Path) -> Iterator[_Line]:
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
