"""Import MoE-Beyond's CSV, one file per prompt (`prompt_7_data.csv`): `Layer ID,Batch Number,Token,Activated Expert IDs`.

1,0,Hello,"[8, 26, 56, 57, 60, 43]"

`Token` is the token's text; its position is the number of earlier rows of the same layer. The files hold one pass over the
prompt, no weights, and experts in no particular order (github.com/ngavhane/moe-beyond). A folder of files becomes one trace.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as pa_csv
from pydantic_core import from_json

from profiler.errors import UNREADABLE, TraceError
from profiler.importers.reading import files_of, head, integer_array, pad_lists, sources_of
from profiler.importers.rows import EMPTY, ImportedRows, running_count
from profiler.importers.target import Target
from profiler.trace.schema import MAX_TOP_K, PREFILL

NAME = "moe-beyond"
ABOUT = "MoE-Beyond CSV, or a folder of them: Layer ID, Batch Number, Token, Activated Expert IDs; no weights"
KINDS = ("file", "folder")

_COLUMNS = ("Layer ID", "Batch Number", "Token", "Activated Expert IDs")
MAX_FIELD_BYTES = 1 << 20
ROWS = 4096
# Files up to this size are parsed at once, which takes a tenth of the time.
WHOLE_BYTES = 16 << 20

_Line = tuple[int, tuple[str, ...]]
_LAYER = re.compile(r"[0-9]{1,5}")
_LIST = r"\[[0-9]{1,9}(, ?[0-9]{1,9})*\]"


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
        whole = _whole(path)
        seen = _Seen()
        for block in [whole] if whole is not None else _blocks(path):
            _add(block, name, seen, target)


@dataclass(frozen=True)
class _Block:
    """N rows of a file: layers `[N]`, expert ids `[N, K]` padded with `EMPTY`, batches and texts of tokens."""

    where: str
    layer_N: npt.NDArray[np.int64]
    ids_NK: npt.NDArray[np.int64]
    batches: list[str]
    tokens: pa.Array


@dataclass
class _Seen:
    """Progress through a file: the rows read of each (batch, layer), and the first layer of each batch."""

    rows: dict[int, int] = field(default_factory=dict)
    first_layer: dict[int, int] = field(default_factory=dict)


def _add(block: _Block, name: str, seen: _Seen, target: Target) -> None:
    """Add a block of rows."""
    problems = {
        batch: target.problem("moe-beyond", name if batch == "0" else f"{name}/{batch}")
        for batch in dict.fromkeys(block.batches)
    }
    problem_N = np.array([problems[batch] for batch in block.batches], dtype=np.int64)
    token_N = running_count(problem_N << 20 | block.layer_N, seen.rows)
    target.add(ImportedRows(problem_N, token_N, block.layer_N, block.ids_NK, None), block.where)
    for problem_id in problems.values():
        # Every layer repeats the text of the tokens: take it from the first one only.
        at = np.flatnonzero(problem_N == problem_id)
        first = seen.first_layer.setdefault(problem_id, int(block.layer_N[at[0]]))
        at = at[block.layer_N[at] == first]
        if len(at):
            target.add_tokens(problem_id, token_N[at], PREFILL, texts_T=block.tokens.take(pa.array(at)))


def _whole(path: Path) -> _Block | None:
    """A small file as one block, or None if it is large or not entirely sound; `_blocks` then says where it is not."""
    if path.stat().st_size > WHOLE_BYTES:
        return None
    parsing = pa_csv.ParseOptions(newlines_in_values=True)
    kinds = pa_csv.ConvertOptions(column_types=dict.fromkeys(_COLUMNS, pa.string()), include_columns=list(_COLUMNS))
    try:
        reading = pa_csv.ReadOptions(use_threads=False)
        table = pa_csv.read_csv(path, reading, parsing, kinds).combine_chunks()
    except UNREADABLE:
        return None
    if not table.num_rows:
        return None
    layers, batches, tokens, experts = (table.column(name).chunk(0) for name in _COLUMNS)
    if not (_all_match(layers, _LAYER.pattern) and _all_match(experts, _LIST)):
        return None
    # With every text sound, the lists are the numbers in the order of the file.
    counts_N = pc.add(pc.count_substring(experts, ","), 1).to_numpy()
    numbers = b"".join(experts.cast(pa.binary()).to_pylist()).replace(b"][", b",")[1:-1]
    flat = np.fromstring(numbers.decode(), dtype=np.int64, sep=",")
    if len(flat) != counts_N.sum() or counts_N.max() > MAX_TOP_K:
        return None
    # Padded to the longest list, a file whose lists have about the same length has fewer entries than bytes.
    if len(counts_N) * int(counts_N.max()) > WHOLE_BYTES:
        return None
    present_NK = np.arange(counts_N.max()) < counts_N[:, None]
    ids_NK = np.full(present_NK.shape, EMPTY, dtype=np.int64)
    ids_NK[present_NK] = flat
    return _Block(str(path), layers.cast(pa.int64()).to_numpy(), ids_NK, batches.to_pylist(), tokens)


def _all_match(column: pa.Array, pattern: str) -> bool:
    return bool(pc.all(pc.match_substring_regex(column, f"^{pattern}$")).as_py())


def _blocks(path: Path) -> Iterator[_Block]:
    """Read a file some thousand rows at a time. Raises `TraceError`, naming the line, on a row that is not sound."""
    lines = _lines(path)
    while block := list(islice(lines, ROWS)):
        layers, batches, tokens, experts = zip(*(values for _, values in block), strict=True)
        if not all(map(_LAYER.fullmatch, layers)):
            number = next(number for number, (layer, *_) in block if not _LAYER.fullmatch(layer))
            raise TraceError(f"{path}, line {number}: expected a layer number")
        where = f"{path}, lines {block[0][0]}..{block[-1][0]}"
        ids_NK = _expert_ids(path, block, experts)
        yield _Block(where, np.array(layers).astype(np.int64), ids_NK, list(batches), pa.array(tokens, pa.string()))


def _expert_ids(path: Path, block: list[_Line], texts: tuple[str, ...]) -> npt.NDArray[np.int64]:
    """The lists of expert ids `[N, K]`, shorter ones padded. Raises `TraceError`, naming the line, on anything else."""
    try:
        lists = from_json("[" + ",".join(texts) + "]")
    except ValueError:
        lists = []
    if len(lists) != len(texts) or {*map(type, lists)} != {list}:
        lists = [_expert_list(text, f"{path}, line {number}") for (number, _), text in zip(block, texts, strict=True)]
    ids_NK = pad_lists(lists)
    if ids_NK is None:
        for (number, _), found in zip(block, lists, strict=True):
            integer_array(found, f"{path}, line {number}: Activated Expert IDs")
            if len(found) > MAX_TOP_K:
                raise TraceError(f"{path}, line {number}: {len(found)} experts, expected at most {MAX_TOP_K}")
        raise TraceError(f"{path}, lines {block[0][0]}..{block[-1][0]}: expected lists of expert ids")
    return ids_NK


def _expert_list(text: str, where: str) -> list[Any]:
    try:
        found = from_json(text)
    except ValueError as error:
        raise TraceError(f"{where}: expected a list of expert ids") from error
    if not isinstance(found, list):
        raise TraceError(f"{where}: Activated Expert IDs: expected a list of whole numbers")
    return found


def _name(path: Path) -> str:
    number = re.fullmatch(r"prompt_(\d+)(_data)?", path.stem)
    return number.group(1) if number else path.stem


def _lines(path: Path) -> Iterator[_Line]:
    """The numbers of the lines of a file, and their values in the order of `_COLUMNS`."""
    csv.field_size_limit(MAX_FIELD_BYTES)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, [])
            absent = [name for name in _COLUMNS if name not in header]
            if absent:
                raise TraceError(f"{path} lacks the column {absent[0]!r}")
            columns = itemgetter(*map(header.index, _COLUMNS))
            for row in reader:
                if len(row) < len(header):
                    if not row:
                        continue
                    raise TraceError(f"{path}, line {reader.line_num}: fewer fields than columns")
                yield reader.line_num, columns(row)
        except csv.Error as error:
            raise TraceError(f"{path}, line {reader.line_num}: {error}") from error
