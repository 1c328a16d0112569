"""Where every importer puts its rows: sorts and checks them, counts what is missing, and writes the trace."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from profiler.capture.sealing import run_folder, seal
from profiler.errors import TraceError
from profiler.importers.buckets import RowBuckets, padded
from profiler.importers.content import content_hashes
from profiler.importers.identical_runs import RouteFingerprints, find_identical_runs
from profiler.importers.known_model import Recorded, facts_for
from profiler.importers.losses import Losses, holes
from profiler.importers.rows import EMPTY, MAX_LAYER, MAX_PIECE_BYTES, ImportedProblem, ImportedRows, ImportOptions
from profiler.trace.reader import Trace
from profiler.trace.schema import (
    INFERRED_EXPERTS,
    MAX_EXPERTS,
    MAX_TOP_K,
    PROBLEMS_FILE,
    PROBLEMS_SCHEMA,
    TOKENS_FILE,
    TOKENS_SCHEMA,
    DatasetMetadata,
    Metadata,
    ModelMetadata,
    RecordMetadata,
)
from profiler.trace.splits import CONTENT_HASH
from profiler.trace.stream import RoutingWriter
from profiler.trace.writer import write_manifest, write_metadata, write_table

# A pair of id and weight while rows are sorted.
PAIR_BYTES = 8


class Target:
    """A trace that is being written. Importers set `model_id` and other attributes, then call `add` and `add_tokens`."""

    def __init__(self, directory: Path, source: Path, format_name: str, options: ImportOptions) -> None:
        self.directory = directory
        self.source = source
        self.options = options
        self.model_id = options.model
        self.architecture: str | None = None
        self.num_experts: int | None = None
        self.renormalized: bool | None = None
        self.versions: dict[str, str] = {}
        self.gaps: list[str] = []
        self.problems: dict[int, ImportedProblem] = {}
        self._format = format_name
        self._ids: dict[tuple[str, ...], int] = {}
        self._buckets = RowBuckets(directory)
        self._rows_of_layer: dict[int, int] = defaultdict(int)
        self._most_experts = 0
        self._fewest_experts = MAX_TOP_K + 1
        self._highest = -1
        self._weighted_rows = 0
        self._rows = 0
        self._unknown_weights = 0
        self._known_weights = 0
        # Weights with few decimals can be the same at many positions of text.
        self.rounded_weights = False
        # Why rows that contradict each other are an error, in a format where they are more than a logger's slip.
        self.contradiction: str | None = None
        self._tokens: list[dict[str, npt.NDArray[Any]]] = []
        self._finished: Trace | None = None
        self._fingerprints = RouteFingerprints()
        self._model_lacks: list[str] = []
        self._said: dict[str, tuple[object, Path]] = {}

    def of_model(self, path: Path, *, model_id: str | None, num_experts: int | None) -> None:
        """Note what a file says of its model, None for nothing. Raises `TraceError` if another file says otherwise."""
        for what, value in (("model", model_id), ("number of experts", num_experts)):
            if value is not None:
                known, by = self._said.setdefault(what, (value, path))
                if known != value:
                    raise TraceError(f"{by} is of {what} {known}, but {path} of {value}: convert them one by one")
        self.model_id = self.model_id if model_id is None else model_id
        self.num_experts = self.num_experts if num_experts is None else num_experts

    def problem(self, dataset: str, *key: str) -> int:
        """Return the number of the problem with this name in the source. New problems are numbered in the order of calls."""
        name = (dataset, *key)
        if name not in self._ids:
            self._ids[name] = len(self._ids)
            self.problems[self._ids[name]] = ImportedProblem(dataset, "/".join(key))
        return self._ids[name]

    def add(self, rows: ImportedRows, where: str) -> None:
        """Add rows, in any order. Raises `TraceError`, which names `where`, on numbers that a trace cannot hold."""
        layers_N, ids_NK = rows.layers_N, rows.expert_ids_NK
        if self.options.layers is not None:
            rows = rows.where(np.isin(layers_N, self.options.layers))
            layers_N, ids_NK = rows.layers_N, rows.expert_ids_NK
        if not len(layers_N):
            return
        limits = (
            ("problem_id", rows.problem_ids_N, 0, 2**31 - 1),
            ("token_id", rows.token_ids_N, 0, 2**31 - 3),
            ("layer", layers_N, 0, MAX_LAYER),
            ("expert id", ids_NK, EMPTY, MAX_EXPERTS - 1),
        )
        for name, values, lowest, highest in limits:
            if values.size and not lowest <= values.min() <= values.max() <= highest:
                raise TraceError(f"{where}: {name} {values.min()}..{values.max()}, expected {max(lowest, 0)}..{highest}")
        if ids_NK.shape[1] > MAX_TOP_K:
            raise TraceError(f"{where}: {ids_NK.shape[1]} experts per token, expected at most {MAX_TOP_K}")
        # Not before: an id of 2^64 - 1 would become an empty slot.
        ids_NK = ids_NK.astype(np.int32)
        present_NK = ids_NK != EMPTY
        counts_N = present_NK.sum(1)
        if rows.weights_NK is not None:
            with np.errstate(invalid="ignore"):
                bad_N = (present_NK & ((rows.weights_NK < 0) | np.isinf(rows.weights_NK) | (rows.weights_NK > 65_504))).any(1)
            if bad_N.any():
                at = int(np.flatnonzero(bad_N)[0])
                raise TraceError(
                    f"{where}: problem {rows.problem_ids_N[at]}, token {rows.token_ids_N[at]}, layer {layers_N[at]}: "
                    "a weight that is negative, infinite, or above 65,504 (float16)"
                )
            self._weighted_rows += len(layers_N)
            unknown_NK = present_NK & np.isnan(rows.weights_NK)
            self._unknown_weights += int(unknown_NK.sum())
            self._known_weights += int(present_NK.sum() - unknown_NK.sum())
        self._rows += len(layers_N)
        for layer, count in zip(*np.unique(layers_N, return_counts=True), strict=True):
            self._rows_of_layer[int(layer)] += int(count)
        self._most_experts = max(self._most_experts, int(counts_N.max()))
        self._fewest_experts = min(self._fewest_experts, int(counts_N.min()))
        self._highest = max(self._highest, int(ids_NK.max(initial=-1)))
        self._buckets.add(replace(rows, expert_ids_NK=ids_NK))

    def add_arrays(
        self,
        problem_id: int,
        token_ids_T: npt.NDArray[np.integer[Any]],
        layers: list[int],
        expert_ids_TLK: npt.NDArray[np.integer[Any]],
        weights_TLK: npt.NDArray[np.floating[Any]] | None,
        where: str,
    ) -> None:
        """Add tokens of one problem that have rows at all `layers`, as `[T, L, K]`."""
        tokens, count, top_k = expert_ids_TLK.shape
        self.add(
            ImportedRows(
                np.full(tokens * count, problem_id),
                np.repeat(token_ids_T, count),
                np.tile(np.asarray(layers), tokens),
                expert_ids_TLK.reshape(-1, top_k),
                None if weights_TLK is None else weights_TLK.reshape(-1, top_k),
            ),
            where,
        )

    def add_tokens(
        self,
        problem_id: int,
        token_ids_T: npt.NDArray[np.integer[Any]],
        phase: str,
        *,
        vocab_ids_T: npt.NDArray[np.integer[Any]] | pa.Array | None = None,
        texts_T: list[str | None] | pa.Array | None = None,
    ) -> None:
        """Add what is known about tokens of one problem: vocabulary ids or texts, and their phase."""
        columns: dict[str, Any] = {
            "problem_id": pa.array(np.full(len(token_ids_T), problem_id), pa.int32()),
            "token_id": pa.array(np.asarray(token_ids_T), pa.int32()),
            "vocab_id": pa.array([None] * len(token_ids_T) if vocab_ids_T is None else vocab_ids_T, pa.int32()),
            "phase": pa.DictionaryArray.from_arrays(np.zeros(len(token_ids_T), np.int8), [phase]).cast("string"),
        }
        if texts_T is not None:
            columns["text"] = pa.array(texts_T, pa.string())
        self._tokens.append(columns)

    def is_finished(self, trace: Trace) -> None:
        """Note that the importer has written the whole trace itself."""
        self._finished = trace

    def finish(self) -> Trace:
        """Sort the rows and write the trace. Raises `TraceError` if no token is left."""
        if self._finished is not None:
            return self._finished
        if not self._rows:
            asked = "" if self.options.layers is None else f" at layers {','.join(map(str, self.options.layers))}"
            raise TraceError(f"{self.source}: no routing rows{asked}")
        model, record = self._model(), self._record()
        losses = Losses()
        with RoutingWriter(run_folder(self.directory, 0), model, record) as writer:
            for table in self._buckets.read():
                self._assemble(table, model, record, writer, losses)
        self._buckets.remove()
        dropped_keys = self._count_tokens(losses)
        if not losses.tokens:
            scarce = min(self._rows_of_layer, key=lambda layer: self._rows_of_layer[layer])
            reasons = "; ".join(losses.gaps())
            raise TraceError(
                f"{self.source}: nothing is left: {reasons}. Of the layers {model.moe_layers}, layer {scarce} has the fewest "
                f"rows ({self._rows_of_layer[scarce]:,}); choose some of the layers"
            )
        record = record.model_copy(update={"empty_slots": losses.empty_slots})
        sequence_tokens = {p: last + 2 for p, last in losses.last_token.items()}
        missing = seal(
            self.directory, model, sequence_tokens, record=record, drop_other_requests=True, dropped_keys=dropped_keys
        )
        self._write_tables(losses)
        gaps = [*self.gaps, *losses.gaps(), *holes(missing, dropped_keys), *self._model_gaps(model)]
        # Counted in one pass: an untrusted file may name as many datasets as it has problems.
        counts = Counter(self.problems[problem].dataset for problem in losses.last_token if problem in self.problems)
        datasets = [DatasetMetadata(name=name, problems=count) for name, count in sorted(counts.items())]
        write_metadata(
            self.directory,
            Metadata(
                model=model,
                record=record,
                datasets=datasets,
                engine="unknown",
                versions=self.versions,
                hook=f"imported from {self._format}",
                gaps=gaps,
                command=list(self.options.command),
            ),
        )
        write_manifest(self.directory)
        return Trace.open(self.directory)

    def _assemble(
        self, table: pa.Table, model: ModelMetadata, record: RecordMetadata, writer: RoutingWriter, losses: Losses
    ) -> None:
        """Write the tokens of a bucket that have exactly one row at every layer."""
        if table.num_rows * model.top_k * PAIR_BYTES > MAX_PIECE_BYTES:
            raise TraceError(
                f"{self.source}: {table.num_rows:,} rows of up to {model.top_k} experts must be sorted at once, which takes "
                f"more than {MAX_PIECE_BYTES >> 20} MiB; split the source by problems"
            )
        layers_L = np.array(model.moe_layers)
        problem_N, token_N, layer_N = (table.column(name).to_numpy() for name in ("problem_id", "token_id", "layer"))
        ids_NK, weights_NK = padded(table, model.top_k)
        order_N = np.lexsort((layer_N, token_N, problem_N))
        key_N = (problem_N.astype(np.int64) << 32 | token_N)[order_N]
        layer_N, ids_NK, weights_NK = layer_N[order_N], ids_NK[order_N], weights_NK[order_N]
        again_N = np.zeros(len(key_N), dtype=np.bool_)
        again_N[1:] = (key_N[1:] == key_N[:-1]) & (layer_N[1:] == layer_N[:-1])
        if again_N.any():
            # A row that was written twice counts once. Of two that contradict each other, neither can be trusted.
            same_N = np.zeros_like(again_N)
            same_N[1:] = (ids_NK[1:] == ids_NK[:-1]).all(1) & _equal(weights_NK[1:], weights_NK[:-1]).all(1)
            contradicted = np.unique(key_N[again_N & ~same_N])
            if len(contradicted) and self.contradiction is not None:
                raise TraceError(f"{self.source}: {self.contradiction}")
            losses.contradicted += len(contradicted)
            keep_N = ~again_N & ~np.isin(key_N, contradicted)
            key_N, layer_N, ids_NK, weights_NK = key_N[keep_N], layer_N[keep_N], ids_NK[keep_N], weights_NK[keep_N]
        keys_T, first_T, counts_T = np.unique(key_N, return_index=True, return_counts=True)
        whole_T = counts_T == len(layers_L)
        losses.count_incomplete(keys_T[~whole_T])
        rows_TL = first_T[whole_T][:, None] + np.arange(len(layers_L))
        keys_T = keys_T[whole_T]
        ids_TLK, weights_TLK = ids_NK[rows_TL], weights_NK[rows_TL]
        empty_TLK = ids_TLK == EMPTY
        repeated_T = _repeats(ids_TLK).any(1)
        losses.repeated += int(repeated_T.sum())
        leave_T = repeated_T
        if record.weights and self._unknown_weights:
            unknown_T = (np.isnan(weights_TLK) & ~empty_TLK).any((1, 2)) & ~leave_T
            losses.unknown_weights += int(unknown_T.sum())
            leave_T = leave_T | unknown_T
        if self.options.drop_incomplete:
            short_T = empty_TLK.any((1, 2)) & ~leave_T
            losses.short += int(short_T.sum())
            leave_T = leave_T | short_T
        keys_T, ids_TLK, weights_TLK, empty_TLK = (array[~leave_T] for array in (keys_T, ids_TLK, weights_TLK, empty_TLK))
        if not len(keys_T):
            return
        self._fingerprints.add(keys_T, ids_TLK, weights_TLK if record.weights else None)
        ids_TLK = np.where(empty_TLK, model.num_experts, ids_TLK)
        weights = np.where(empty_TLK, 0, weights_TLK).astype(np.float16) if record.weights else None
        writer.add((keys_T >> 32).astype(np.int32), (keys_T & 0xFFFFFFFF).astype(np.int32), ids_TLK, weights)

    def _count_tokens(self, losses: Losses) -> npt.NDArray[np.int64]:
        """Count the assembled tokens, and return the keys of those to drop: the dummy tokens of an engine's warm-up."""
        keys_T, routes_T, weights_T, empty_T = self._fingerprints.sorted()
        self._fingerprints = RouteFingerprints()
        runs = find_identical_runs(keys_T, routes_T, weights_T, rounded=self.rounded_weights)
        wanted = self.options.identical_runs
        drop_T = runs.dummy_T if wanted == "auto" else (runs.dummy_T | runs.unclear_T) & (wanted == "drop")
        losses.identical = int(drop_T.sum())
        losses.identical_kept = int((runs.dummy_T | runs.unclear_T).sum()) - losses.identical
        losses.empty_slots = int(empty_T[~drop_T].sum())
        losses.count(keys_T[~drop_T])
        return keys_T[drop_T]

    def _model(self) -> ModelMetadata:
        highest = self._highest
        if highest < 0:
            raise TraceError(f"{self.source}: no expert in any row")
        recorded = Recorded(sorted(self._rows_of_layer), highest, self._most_experts, self.num_experts)
        entry = facts_for(self.options.model, self.model_id, recorded, self.source)
        known = self.options.num_experts or self.num_experts or (None if entry is None else entry.experts)
        if known is not None and not highest < known <= MAX_EXPERTS:
            raise TraceError(f"{self.source}: expert id {highest}, expected below the number of experts, {known}")
        if entry is not None and self.options.layers is None:
            self._model_lacks = recorded.missing(entry)
        elif known is None:
            self._model_lacks = [INFERRED_EXPERTS]
        num_experts = known or highest + 1
        if self._most_experts > num_experts:
            raise TraceError(f"{self.source}: {self._most_experts} experts per token, but ids only up to {highest}")
        return ModelMetadata(
            id=self.model_id,
            architecture=self.architecture,
            num_layers=None if entry is None else entry.layers,
            moe_layers=recorded.layers,
            num_experts=num_experts,
            top_k=self._most_experts,
            renormalized=self.renormalized if entry is None or self.renormalized is not None else entry.renormalized,
        )

    def _model_gaps(self, model: ModelMetadata) -> list[str]:
        gaps = list(self._model_lacks)
        if self.options.layers is not None:
            gaps.append(f"only layers {','.join(map(str, model.moe_layers))} were imported")
        if not self._tokens:
            gaps.append("no prompts, outputs or vocabulary ids")
        return gaps

    def _record(self) -> RecordMetadata:
        if 0 < self._weighted_rows < self._rows:
            raise TraceError(f"{self.source}: {self._rows - self._weighted_rows:,} rows have no weights, but the others do")
        known = self._known_weights > 0
        if self._weighted_rows and not known:
            self.gaps.append("the source has no weight")
        # Not the final value: the number of empty slots is known once the rows are assembled.
        varies = self._fewest_experts < self._most_experts and not self.options.drop_incomplete
        return RecordMetadata(weights=known, empty_slots=int(varies))

    def _write_tables(self, losses: Losses) -> None:
        if self._tokens:
            tokens = self._token_table()
            write_table(self.directory / TOKENS_FILE, tokens.unify_dictionaries())
            for problem, found in content_hashes(tokens).items():
                # A source may know tokens of problems that it does not name.
                named = self.problems.setdefault(problem, ImportedProblem("unknown", str(problem)))
                named.further.setdefault(CONTENT_HASH, found)
        if self.problems:
            known = sorted(self.problems.keys() & losses.last_token.keys())
            further = sorted({name for p in known for name in self.problems[p].further} - set(PROBLEMS_SCHEMA.names))
            names = [*PROBLEMS_SCHEMA.names, *further]
            columns: dict[str, list[Any]] = {name: [self.problems[p].further.get(name) for p in known] for name in names}
            columns["problem_id"] = known
            columns["dataset"] = [self.problems[p].dataset for p in known]
            columns["source_key"] = [self.problems[p].source_key for p in known]
            arrays = {
                name: pa.array(values, PROBLEMS_SCHEMA.field(name).type if name in PROBLEMS_SCHEMA.names else None)
                for name, values in columns.items()
            }
            write_table(self.directory / PROBLEMS_FILE, pa.table(arrays))

    def _token_table(self) -> pa.Table:
        """What is known of tokens, sorted by problem and position."""
        texts = any("text" in columns for columns in self._tokens)
        names = [*TOKENS_SCHEMA.names, *(["text"] if texts else [])]
        schema = pa.schema([*TOKENS_SCHEMA, *([("text", pa.string())] if texts else [])])
        pieces = [
            pa.table({name: c.get(name, pa.nulls(len(c["token_id"]), pa.string())) for name in names}) for c in self._tokens
        ]
        return pa.concat_tables(pieces).cast(schema).sort_by([("problem_id", "ascending"), ("token_id", "ascending")])


def _equal(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    return np.asarray((first == second) | (np.isnan(first) & np.isnan(second)))


def _repeats(ids_TLK: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    ordered = np.sort(ids_TLK, axis=-1)
    return np.asarray(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != EMPTY)).any(-1))
