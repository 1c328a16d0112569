"""What importers pass to a `Target`: rows in any order, and facts of problems; and the options that a user sets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from profiler.errors import TraceError

EMPTY = -1
"""The expert id of a slot without an expert, between importer and `Target`."""

# Limit on what is decoded at once: a source that needs more is refused, so that it cannot exhaust the memory.
MAX_PIECE_BYTES = 512 << 20
MAX_LAYER = 32_767


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Facts that a source may lack, and which part of it to import.

    model: the model's name, used where the source has none. layers: import only these; None for all.
    num_experts: experts per layer; None to use the source's number or, without one, the highest id plus one.
    drop_incomplete: leave out tokens routed to fewer than K experts, instead of recording empty slots.
    identical_runs: what becomes of long runs of tokens with identical routes, such as an engine's warm-up. auto: drop them
        where the weights show that they are not text. drop: drop all of them. keep: keep them.
    command: the command line, for the metadata.
    """

    model: str = "unknown"
    num_experts: int | None = None
    layers: tuple[int, ...] | None = None
    drop_incomplete: bool = False
    identical_runs: Literal["auto", "drop", "keep"] = "auto"
    command: tuple[str, ...] = ()


@dataclass
class ImportedRows:
    """N rows, each the experts of one (problem, token, layer); arrays `[N]` and `[N, K]`.

    expert_ids_NK: `EMPTY` in slots without an expert. weights_NK: None if the source has no weights; NaN where one is unknown.
    """

    problem_ids_N: npt.NDArray[np.integer[Any]]
    token_ids_N: npt.NDArray[np.integer[Any]]
    layers_N: npt.NDArray[np.integer[Any]]
    expert_ids_NK: npt.NDArray[np.integer[Any]]
    weights_NK: npt.NDArray[np.floating[Any]] | None

    def where(self, keep_N: npt.NDArray[np.bool_]) -> ImportedRows:
        """Select rows by a mask."""
        weights_NK = None if self.weights_NK is None else self.weights_NK[keep_N]
        return ImportedRows(
            self.problem_ids_N[keep_N], self.token_ids_N[keep_N], self.layers_N[keep_N], self.expert_ids_NK[keep_N], weights_NK
        )


@dataclass
class ImportedProblem:
    """What a source knows about a problem besides its routing.

    further: values of the other columns of `problems.parquet`, by name; None where unknown.
    """

    dataset: str
    source_key: str
    further: dict[str, Any] = field(default_factory=dict)


def running_count(keys_N: npt.NDArray[np.int64], counts: dict[int, int]) -> npt.NDArray[np.int64]:
    """How often each key occurred before, in this block and in earlier ones; updates `counts`."""
    order_N = np.argsort(keys_N, kind="stable")
    keys, starts, sizes = np.unique(keys_N[order_N], return_index=True, return_counts=True)
    before = np.array([counts.get(key, 0) for key in keys.tolist()], dtype=np.int64)
    running_N = np.empty(len(keys_N), dtype=np.int64)
    running_N[order_N] = np.arange(len(keys_N)) - np.repeat(starts - before, sizes)
    counts.update(zip(keys.tolist(), (before + sizes).tolist(), strict=True))
    return running_N


def layers_with_experts(routes: Iterable[npt.NDArray[Any]], source: Path) -> tuple[list[int], list[str]]:
    """The MoE layers of arrays `[T, L, K]` in which dense layers are all 0 or -1, and a line for the gaps if there are any.

    Raises `TraceError`, naming `source`, if no layer has experts.
    """
    layers: set[int] = set()
    count = 0
    for ids_TLK in routes:
        layers |= set(np.flatnonzero((ids_TLK > 0).any((0, 2))).tolist())
        count = max(count, ids_TLK.shape[1])
    if not layers:
        raise TraceError(f"{source}: no sample has routed experts, or every layer is 0 or -1 throughout, as dense layers are")
    dense = ",".join(str(layer) for layer in range(count) if layer not in layers)
    return sorted(layers), [f"layers that are 0 or -1 throughout were taken as dense: {dense}"] if dense else []
