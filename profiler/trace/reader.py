"""Read a trace: metadata, problems, tokens, and routing as `[T, L, K]` arrays in chunks of whole problems.

A trace may be untrusted: everything that is read is checked, and every size before memory is allocated for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ValidationError

from profiler.errors import TraceError, counted, first_fault
from profiler.trace.decoding import concatenate
from profiler.trace.row_groups import RowGroup, RowGroups
from profiler.trace.schema import (
    MANIFEST_FILE,
    METADATA_FILE,
    PROBLEMS_FILE,
    PROBLEMS_SCHEMA,
    ROUTING_FOLDER,
    SCHEMA_VERSION,
    TOKENS_FILE,
    TOKENS_SCHEMA,
    Manifest,
    Metadata,
    RoutingChunk,
)
from profiler.trace.unsealed import describe_unsealed
from profiler.trace.untrusted.parquet_files import count_rows, open_parquet, read_table
from profiler.trace.values import iterate_values, read_values
from profiler.trace.writer import sha256_of

if TYPE_CHECKING:
    import pandas as pd

# JSON of nothing but empty objects takes thirty times its length once parsed.
MAX_DOCUMENT_BYTES = 16 << 20
MAX_PROBLEM_ID = (1 << 31) - 1

_DocumentType = TypeVar("_DocumentType", bound=BaseModel)


@dataclass(frozen=True, eq=False)
class Trace:
    """An opened trace directory.

    Opening reads `metadata.json` and `manifest.json` only; everything else is read on first use. Every row is checked
    as it is read, so no method returns data that breaks the format: it raises `TraceError` instead, naming file and row.

    Shape letters: T tokens, L MoE layers, K experts per token, E experts, D hidden size.

    Attributes:
        path: The trace directory.
        metadata: What was recorded, how, and what is missing.
        manifest: Rows, bytes and SHA-256 of every file; None if the trace is incomplete.

    Example:
        >>> trace = Trace.open("traces/math")
        >>> trace.metadata.model.num_experts
        8
        >>> for chunk in trace.chunks():  # whole problems, in bounded memory
        ...     strongest_TL = chunk.expert_ids_TLK[..., 0]
    """

    path: Path
    metadata: Metadata
    manifest: Manifest | None

    @classmethod
    def open(cls, path: str | Path, *, allow_incomplete: bool = False) -> Self:
        """Open the trace directory `path`.

        Args:
            path: The trace directory.
            allow_incomplete: Open the trace even if it has faults (no manifest, or a file that is missing, unreadable or of
                another size than the manifest says).

        Returns:
            The opened trace.

        Raises:
            TraceError: If `path` is not a trace, if it has another schema version, or if it is incomplete and
                `allow_incomplete` is false.

        Example:
            >>> trace = Trace.open("traces/math")
        """
        directory = Path(path)
        if directory.is_file():
            raise TraceError(f"{directory} is a file, and a trace is a folder: 'specmoe convert' reads files of other tools")
        if not directory.is_dir():
            raise TraceError(f"{directory}: no such trace directory")
        if not (directory / METADATA_FILE).is_file():
            raise TraceError(f"{directory} is not a trace: it has no {METADATA_FILE}")
        metadata = _read_document(directory / METADATA_FILE, Metadata)
        if metadata.schema_version != SCHEMA_VERSION:
            raise TraceError(f"{directory}: schema version {metadata.schema_version}, this release reads {SCHEMA_VERSION}")
        has_manifest = (directory / MANIFEST_FILE).is_file()
        manifest = _read_document(directory / MANIFEST_FILE, Manifest) if has_manifest else None
        trace = cls(directory, metadata, manifest)
        if not allow_incomplete:
            faults = trace.faults()
            if faults:
                raise TraceError(f"{directory} is incomplete: {faults[0]}; 'specmoe inspect' shows details")
        return trace

    def faults(self, *, verify: bool = False) -> list[str]:
        """List what keeps the trace from being complete.

        Args:
            verify: Also compare the SHA-256 of every file with the manifest, which reads all files.

        Returns:
            One line per fault; empty if the trace is complete.
        """
        if self.manifest is None:
            return [f"no {MANIFEST_FILE} (the collection did not finish){describe_unsealed(self.path, self.metadata)}"]
        faults = []
        if self.manifest.schema_version != SCHEMA_VERSION:
            faults.append(f"{MANIFEST_FILE} has schema version {self.manifest.schema_version}, expected {SCHEMA_VERSION}")
        if METADATA_FILE not in self.manifest.files or not self.routing_files:
            faults.append(f"{MANIFEST_FILE} does not list {METADATA_FILE} and at least one routing file")
        for name, entry in self.manifest.files.items():
            file = self.path / name
            if not file.is_file():
                faults.append(f"{name} is missing")
            elif file.stat().st_size != entry.bytes:
                faults.append(f"{name} has {file.stat().st_size} bytes, expected {entry.bytes}")
            elif name.endswith(".parquet") and (rows := count_rows(file)) != entry.rows:
                faults.append(f"{name} {'is not readable' if rows is None else f'has {rows} rows'}, expected {entry.rows} rows")
            elif verify and sha256_of(file) != entry.sha256:
                faults.append(f"{name} does not match its sha256")
        return faults

    @property
    def routing_files(self) -> list[Path]:
        """The files of the routing in order: those listed in the manifest, or all parts if the trace has no manifest yet."""
        if self.manifest is not None:
            return [self.path / name for name in sorted(self.manifest.files) if name.startswith(f"{ROUTING_FOLDER}/")]
        return sorted((self.path / ROUTING_FOLDER).glob("part-*.parquet"))

    @cached_property
    def num_rows(self) -> int:
        """The number of routing rows, one per (problem, token, MoE layer)."""
        return sum(open_parquet(path).metadata.num_rows for path in self.routing_files)

    @property
    def has_problems(self) -> bool:
        """Whether the trace has a table of problems; one converted from bare routing rows has none."""
        return (self.path / PROBLEMS_FILE).is_file()

    @property
    def has_tokens(self) -> bool:
        """Whether the trace has a table of tokens: their vocabulary ids, or at least their phases."""
        return (self.path / TOKENS_FILE).is_file()

    @cached_property
    def problems(self) -> pa.Table:
        """The table `problems.parquet`, one row per problem, sorted by `problem_id`.

        It has the columns of `profiler.trace.schema.PROBLEMS_SCHEMA`, and any others that a converted trace's source had. What
        the source did not know, such as the prompt, is null.

        Raises:
            TraceError: If the table is missing (see `has_problems`) or not as the format requires.
        """
        return read_table(self.path / PROBLEMS_FILE, PROBLEMS_SCHEMA)

    @cached_property
    def tokens(self) -> pa.Table:
        """The table `tokens.parquet`, one row per token of every problem, sorted by `(problem_id, token_id)`.

        It has the columns of `profiler.trace.schema.TOKENS_SCHEMA`: the position `token_id`, the vocabulary id `vocab_id`, and
        the phase, `prefill` or `decode`.

        Raises:
            TraceError: If the table is missing (see `has_tokens`) or not as the format requires.
        """
        return read_table(self.path / TOKENS_FILE, TOKENS_SCHEMA)

    def chunks(self, *, whole_problems: bool = True, problems: range | None = None) -> Iterator[RoutingChunk]:
        """Iterate over the routing in order, in chunks of whole problems.

        A chunk is about one row group (a few MB), or one problem if that is larger.

        Args:
            whole_problems: If false, each chunk is one row group, even where that splits a problem: memory is bounded however
                long a problem is.
            problems: Read only problems whose ids are in this range.

        Yields:
            Chunks sorted by `(problem_id, token_id)`.

        Raises:
            TraceError: If rows break the format; the message names the file and the row.

        Example:
            >>> tokens = sum(len(chunk) for chunk in trace.chunks())
        """
        pending: list[RoutingChunk] = []
        last_key = -1
        for group in self._groups(problems):
            chunk = group.decode()
            if _key(chunk, 0) <= last_key:
                raise TraceError(f"{group.place}: its first row does not come after the row before it")
            last_key = _key(chunk, -1)
            if problems is not None:
                first, end = np.searchsorted(chunk.problem_ids_T, [problems.start, problems.stop])
                if first == end:
                    continue
                chunk = chunk.take(slice(int(first), int(end)))
            if not whole_problems:
                yield chunk
                continue
            # The last problem may continue in the next row group.
            last = int(np.searchsorted(chunk.problem_ids_T, chunk.problem_ids_T[-1]))
            if last or (pending and pending[-1].problem_ids_T[-1] != chunk.problem_ids_T[0]):
                pending.append(chunk.take(slice(0, last)))
                yield concatenate([piece for piece in pending if len(piece)])
                pending = []
            pending.append(chunk.take(slice(last, None)))
        if pending:
            yield concatenate(pending)

    def spans(self, parts: int) -> list[range]:
        """Divide the problems into ranges of about equally many rows, for workers that each read one range.

        Args:
            parts: The number of ranges wanted.

        Returns:
            At most `parts` ranges of problem ids that together cover all problems; pass one to `chunks`.

        Raises:
            TraceError: If row groups are not in order.
        """
        ends: list[tuple[int, int]] = []
        for group in self._groups():
            first = self._row_groups.first_problem_of(group)
            if ends and first < ends[-1][0]:
                raise TraceError(f"{group.place}: its first row does not come after the row before it")
            ends.append((first, group.num_rows))
        if not ends:
            return []
        rows = np.cumsum([0, *(rows for _, rows in ends[:-1])])
        wanted = np.arange(1, parts) * self.num_rows / parts
        starts = sorted({ends[0][0], *(ends[int(np.abs(rows - at).argmin())][0] for at in wanted)})
        return [range(start, end) for start, end in pairwise([*starts, MAX_PROBLEM_ID + 1])]

    def load(self) -> RoutingChunk:
        """Read all routing into memory: 3 to 4 bytes per (token, layer, expert).

        Raises:
            TraceError: As `chunks` does, and if the trace has no rows.
        """
        return concatenate(list(self.chunks(whole_problems=False)))

    def arrays(self, problem_id: int) -> RoutingChunk:
        """Read the routing of one problem.

        The arrays are views of the decoded row group, unless the problem spans several row groups.

        Args:
            problem_id: The problem's id.

        Returns:
            The problem's tokens, in order.

        Raises:
            TraceError: If the trace has no routing of this problem, or if its rows break the format.

        Example:
            >>> problem = trace.arrays(0)
            >>> first_layer_TK = problem.expert_ids_TLK[:, 0]
        """
        pieces = []
        for group in self._groups(range(problem_id, problem_id + 1)):
            chunk = group.decode()
            first, end = np.searchsorted(chunk.problem_ids_T, [problem_id, problem_id + 1])
            if first < end:
                pieces.append(chunk.take(slice(int(first), int(end))))
        if not pieces:
            raise TraceError(f"{self.path}: no routing of problem {problem_id}")
        whole = concatenate(pieces)
        if (np.diff(whole.token_ids_T) <= 0).any():
            raise TraceError(f"{self.path}: rows of problem {problem_id} are not sorted by token_id over the row groups")
        return whole

    def to_arrow(self) -> pa.Table:
        """Read all routing rows, one per (problem, token, MoE layer), as an Arrow table.

        Returns:
            The rows as they are in the files, with the columns of `profiler.trace.schema.routing_schema`.

        Raises:
            TraceError: As `chunks` does, and if the trace has no rows.
        """
        tables = []
        for group in self._groups():
            table = group.table()
            group.decode(table)
            tables.append(table)
        if not tables:
            raise TraceError(f"{self.path} has no routing rows")
        return pa.concat_tables(tables)

    def to_pandas(self) -> pd.DataFrame:
        """Read all routing rows, one per (problem, token, MoE layer), as a pandas data frame.

        A data frame takes 200 bytes per row or more: for millions of rows prefer `to_arrow` or `chunks`.

        Raises:
            TraceError: As `to_arrow` does.
        """
        return self.to_arrow().to_pandas()

    def caveats(self) -> list[str]:
        """List what a reader of any number from this trace must know, one line each."""
        record = self.metadata.record
        lines = []
        if not self.metadata.knows_strongest:
            lines.append("no weights were recorded: which of a token's experts is the strongest is unknown, so nothing says it")
        if record.empty_slots:
            lines.append(f"{counted(record.empty_slots, 'slot')} without an expert: some tokens went to fewer than K")
        return lines

    def values(self, folder: str, problem_id: int) -> tuple[npt.NDArray[np.int32], list[int], npt.NDArray[np.float16]]:
        """Read the router logits or the router inputs of one problem.

        Args:
            folder: `"logits"` for router logits (width W = E), `"hidden"` for router inputs (W = D).
            problem_id: The problem's id.

        Returns:
            Positions `[T]`, the L decoder layers, and float16 values `[T, L, W]`.

        Raises:
            TraceError: If the trace has no such values of this problem, or lacks some layers for some tokens.

        Example:
            >>> positions_T, layers, logits_TLE = trace.values("logits", 0)
        """
        return read_values(self.path, folder, problem_id)

    def value_rows(
        self, folder: str, problems: range | None = None
    ) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int16], npt.NDArray[np.float16]]]:
        """Iterate over all router logits or router inputs, some thousand rows at a time.

        Args:
            folder: `"logits"` for router logits (width W = E), `"hidden"` for router inputs (W = D).
            problems: Skip row groups that contain none of these problems. Other problems in the row groups that are read are
                included.

        Yields:
            Problem ids `[N]`, decoder layers `[N]`, and float16 values `[N, W]`.

        Raises:
            TraceError: If rows break the format.
        """
        return iterate_values(self.path, folder, problems)

    def _groups(self, problems: range | None = None) -> Iterator[RowGroup]:
        """The row groups of the routing in order, or those that may contain `problems`."""
        return self._row_groups.of(self.routing_files, problems)

    @cached_property
    def _row_groups(self) -> RowGroups:
        return RowGroups(self.metadata)


def _key(chunk: RoutingChunk, token: int) -> int:
    return int(chunk.problem_ids_T[token]) << 32 | int(chunk.token_ids_T[token])


def _read_document(path: Path, kind: type[_DocumentType]) -> _DocumentType:
    if path.stat().st_size > MAX_DOCUMENT_BYTES:
        raise TraceError(f"{path} is larger than {MAX_DOCUMENT_BYTES >> 20} MiB, which no trace needs")
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise TraceError(f"{path} is not valid: {first_fault(error)}") from error
