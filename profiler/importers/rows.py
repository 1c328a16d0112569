"""What importers hand over: rows in any order, and what else a source knows; and what a user adds to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

EMPTY = -1
"""An expert id of a slot without an expert, between importer and `Target`."""

# A source that decodes to more in one piece is refused rather than swallowed.
MAX_PIECE_BYTES = 512 << 20
MAX_LAYER = 32_767


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What a source does not say, or not all of what it has.

    model: what it is called, where the source does not say. layers: import only these.
    num_experts: experts per layer; None: the source's word, or the highest id plus one.
    drop_incomplete: leave out tokens that went to fewer than K experts, instead of recording empty slots.
    command: for the metadata.
    """

    model: str = "unknown"
    num_experts: int | None = None
    layers: tuple[int, ...] | None = None
    drop_incomplete: bool = False
    command: tuple[str, ...] = ()


@dataclass
class Rows:
    """N rows, each a (problem, token, layer) with its experts; arrays `[N]` and `[N, K]`.

    expert_ids_NK: `EMPTY` where there is none. weights_NK: None if the source has none; NaN where it does not know one.
    """

    problem_ids_N: npt.NDArray[np.integer[Any]]
    token_ids_N: npt.NDArray[np.integer[Any]]
    layers_N: npt.NDArray[np.integer[Any]]
    expert_ids_NK: npt.NDArray[np.integer[Any]]
    weights_NK: npt.NDArray[np.floating[Any]] | None

    def where(self, keep_N: npt.NDArray[np.bool_]) -> Rows:
        """Only these rows."""
        weights_NK = None if self.weights_NK is None else self.weights_NK[keep_N]
        return Rows(
            self.problem_ids_N[keep_N], self.token_ids_N[keep_N], self.layers_N[keep_N], self.expert_ids_NK[keep_N], weights_NK
        )


@dataclass
class ProblemFacts:
    """What a source knows of a problem besides its routing; None where it does not."""

    dataset: str
    source_key: str
    further: dict[str, Any] = field(default_factory=dict)
