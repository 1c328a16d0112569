"""Import route traces of edge inference (`# route_trace v1`): CSV with one line per expert that a token was routed to.

turn,phase,step,layer,slot,expert,weight,residency,expert_bytes,dropped

`step` is the position in the context. `phase` is 0 for the prompt and 1 for generated tokens. A weight of `nan` is unknown.
`dropped` = 1 marks an expert that was selected but not run: an empty slot here. Columns are found by name, others are ignored
(github.com/Helldez/BigMoeOnEdge). The last layer contains only the last token of a prompt, since the others are not needed
there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv as pa_csv

from profiler.errors import UNREADABLE, TraceError, first_line
from profiler.importers.reading import BLOCK_BYTES, files_of, head, sources_of
from profiler.importers.rows import EMPTY, ImportedRows
from profiler.importers.target import Target
from profiler.trace.schema import DECODE, MAX_TOP_K, PREFILL

NAME = "edge-csv"
ABOUT = "route-trace CSV: turn, phase, step, layer, slot, expert, weight, ...; one line per expert"
KINDS = ("file", "folder")

_TYPES = {
    "turn": pa.int64(),
    "phase": pa.int64(),
    "step": pa.int64(),
    "layer": pa.int32(),
    "slot": pa.int32(),
    "expert": pa.int32(),
    "weight": pa.float32(),
    "dropped": pa.int8(),
}
_REQUIRED = ("turn", "step", "layer", "slot", "expert")


def detect(source: Path) -> bool:
    files = files_of(source, "*.csv")
    text = head(files[0]) if files else ""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return text.startswith("# route_trace") or bool(lines and {*_REQUIRED} <= {*lines[0].split(",")})


def read(source: Path, target: Target) -> None:
    files = sources_of(source, "*.csv")
    # Turns are counted from 0 in every file.
    for path in files:
        _read_file(path, (path.stem,) if len(files) > 1 else (), target)


def _read_file(source: Path, name: tuple[str, ...], target: Target) -> None:
    """Read a file; `name` precedes its turns in the names of problems."""
    preamble = _preamble(source)
    fact = re.search(r"\bmodel=(\S+)", "\n".join(preamble))
    # A path on the machine that recorded it: keep only the name.
    model_id = fact.group(1).replace("\\", "/").rpartition("/")[2] if fact else None
    experts = re.search(r"\bn_expert=(\d{1,6})\b", "\n".join(preamble))
    target.of_model(source, model_id=model_id, num_experts=int(experts.group(1)) if experts else None)
    # In another order, the lines of one token and layer could be split between two blocks.
    target.contradiction = "lines of one turn, step and layer are not together: sort the file by turn, step, layer and slot"
    carried: pa.Table | None = None
    phases: dict[tuple[int, int], list[np.ndarray]] = {}
    for where, block in _blocks(source, len(preamble)):
        table = block if carried is None else pa.concat_tables([carried, block])
        keys = np.stack([table.column(name).to_numpy() for name in ("turn", "step", "layer")])
        # The last token's rows may continue in the next block.
        ends = np.flatnonzero((np.diff(keys) != 0).any(0)) + 1
        end = int(ends[-1]) if len(ends) else 0
        if end == 0 and table.num_rows > MAX_TOP_K:
            raise TraceError(f"{where}: more than {MAX_TOP_K} experts at one token and layer")
        carried = table.slice(end)
        if end:
            _add(table.slice(0, end), name, target, where, phases)
    if carried is not None and carried.num_rows:
        _add(carried, name, target, f"{source}, at its end", phases)
    for (problem_id, phase), pieces in sorted(phases.items()):
        target.add_tokens(problem_id, np.unique(np.concatenate(pieces)), DECODE if phase else PREFILL)


def _preamble(source: Path) -> list[str]:
    lines = []
    for line in head(source).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line)
    return lines


def _blocks(source: Path, skipped: int) -> Iterator[tuple[str, pa.Table]]:
    """The columns that we use, block by block."""
    header = next((line for line in head(source).splitlines() if line and not line.startswith("#")), "").split(",")
    absent = [name for name in _REQUIRED if name not in header]
    if absent:
        raise TraceError(f"{source} lacks the column {absent[0]!r}")
    if len(set(header)) < len(header):
        raise TraceError(f"{source} has a column twice")
    names = [name for name in _TYPES if name in header]
    options = pa_csv.ConvertOptions(column_types=_TYPES, include_columns=names, null_values=[""], strings_can_be_null=False)
    reading = pa_csv.ReadOptions(block_size=BLOCK_BYTES, skip_rows=skipped)
    row = 1
    try:
        with pa_csv.open_csv(source, read_options=reading, convert_options=options) as reader:
            for batch in reader:
                where = f"{source}, rows {row}..{row + batch.num_rows - 1}"
                row += batch.num_rows
                if any(batch.column(name).null_count for name in names):
                    raise TraceError(f"{where}: an empty field")
                if batch.num_rows:
                    yield where, pa.Table.from_batches([batch.select(names)])
    except UNREADABLE as error:
        raise TraceError(f"{source}, after row {row - 1}: {first_line(error)}") from error


def _add(
    table: pa.Table, name: tuple[str, ...], target: Target, where: str, phases: dict[tuple[int, int], list[np.ndarray]]
) -> None:
    """Add complete (turn, step, layer) groups, one line per slot, as rows whose experts are in the order of the slots."""
    columns = {name: table.column(name).to_numpy() for name in table.column_names}
    # A step below zero could not be attributed to a position.
    keep_N = columns["step"] >= 0
    order_N = np.lexsort([columns[name] for name in ("slot", "layer", "step", "turn")])
    columns = {name: values[order_N[keep_N[order_N]]] for name, values in columns.items()}
    if not len(columns["turn"]):
        return
    keys = np.stack([columns[name] for name in ("turn", "step", "layer")])
    starts = np.flatnonzero(np.append(True, (np.diff(keys) != 0).any(0)))
    counts = np.diff(np.append(starts, keys.shape[1]))
    if counts.max() > MAX_TOP_K:
        raise TraceError(f"{where}: {counts.max()} experts at one token and layer")
    present_NK = np.arange(counts.max()) < counts[:, None]

    def padded(values: np.ndarray, fill: float) -> np.ndarray:
        rows_NK = np.full(present_NK.shape, fill, dtype=values.dtype)
        rows_NK[present_NK] = values
        return rows_NK

    expert_N = columns["expert"]
    if "dropped" in columns:
        expert_N = np.where(columns["dropped"] != 0, EMPTY, expert_N)
    turn_N = columns["turn"][starts]
    numbers = {turn: target.problem("edge", *name, str(turn)) for turn in np.unique(turn_N).tolist()}
    problem_N = np.array([numbers[turn] for turn in turn_N.tolist()])
    step_N = columns["step"][starts]
    weights_NK = padded(columns["weight"], np.nan) if "weight" in columns else None
    target.add(ImportedRows(problem_N, step_N, columns["layer"][starts], padded(expert_N, EMPTY), weights_NK), where)
    if "phase" in columns:
        phase_N = columns["phase"][starts] != 0
        for problem_id in np.unique(problem_N).tolist():
            for phase in (0, 1):
                steps = np.unique(step_N[(problem_N == problem_id) & (phase_N == bool(phase))])
                if len(steps):
                    phases.setdefault((problem_id, phase), []).append(steps)
