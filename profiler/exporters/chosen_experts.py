"""Which experts to keep in fast memory, chosen from counts, and what the choice is worth on held-out problems.

Shape letters: L MoE layers, K experts per token, E experts, B batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.errors import SpecmoeError, UsageError
from profiler.exporters.counts import ExpertCounts


@dataclass(frozen=True)
class Budget:
    """How many experts to keep; exactly one of the three is given.

    Attributes:
        fraction: Share of all experts, 0 to 1.
        slots: Experts per layer; with a choice over all layers, on average.
        gigabytes: Size of the kept experts in GB (10^9 bytes), for an expert of known size.
    """

    fraction: float | None = None
    slots: int | None = None
    gigabytes: float | None = None

    def experts(self, layers: int, num_experts: int, expert_bytes: float | None) -> int:
        """The number of experts that fit, in all layers together, rounded down.

        Raises `SpecmoeError` if not exactly one is given, if it is out of range, or if the size of an expert is not known.
        """
        if sum(value is not None for value in (self.fraction, self.slots, self.gigabytes)) != 1:
            raise UsageError("how many experts to keep: expected exactly one of a fraction, slots per layer, and gigabytes")
        everything = layers * num_experts
        if self.fraction is not None:
            if not 0 <= self.fraction <= 1:
                raise UsageError(f"fraction {self.fraction}: expected 0 to 1")
            return int(self.fraction * everything + 1e-9)
        if self.slots is not None:
            if not 0 <= self.slots <= num_experts:
                raise SpecmoeError(f"{self.slots} slots per layer: expected 0 to {num_experts}, the experts of a layer")
            return self.slots * layers
        if expert_bytes is None:
            raise SpecmoeError(
                "a size in GB needs the size of an expert: name a model that 'specmoe models' lists, or give a fraction"
            )
        gigabytes = self.gigabytes or 0.0
        if not 0 <= gigabytes < 1e9:
            raise UsageError(f"{gigabytes} GB of experts: expected 0 or more")
        return min(everything, int(gigabytes * 1e9 / expert_bytes))


def choose_experts(score_LE: npt.NDArray[Any], experts: int, *, over_all_layers: bool = False) -> npt.NDArray[np.bool_]:
    """Choose the experts with the highest scores.

    Args:
        score_LE: Score of each expert `[L, E]`, such as its tokens. Of equal scores, the lower layer and expert come first.
        experts: Experts to keep in all layers together.
        over_all_layers: Rank the experts of all layers together. Otherwise every layer keeps `experts // L` of its own.

    Returns:
        Whether each expert is kept, bool `[L, E]`.
    """
    layers, _ = score_LE.shape
    kept_LE = np.zeros(score_LE.shape, dtype=np.bool_)
    if over_all_layers:
        kept_LE.reshape(-1)[np.argsort(-score_LE.reshape(-1), kind="stable")[:experts]] = True
    else:
        best_LE = np.argsort(-score_LE, axis=1, kind="stable")[:, : experts // layers]
        np.put_along_axis(kept_LE, best_LE, True, axis=1)
    return kept_LE


def choose_layers(counts: ExpertCounts, layers: int, batch: int) -> npt.NDArray[np.bool_]:
    """Choose whole layers: those that read the most distinct experts per step. Returns whether each is kept, bool `[L]`.

    With one token per step every layer reads K experts, so all layers are equal, and the last ones are kept, as
    llama.cpp's `--n-cpu-moe` does.
    """
    distinct_L = distinct_experts(counts, batch)
    order = np.lexsort((-np.arange(len(distinct_L)), -np.round(distinct_L, 9)))
    kept_L = np.zeros(len(distinct_L), dtype=np.bool_)
    kept_L[order[:layers]] = True
    return kept_L


def distinct_experts(counts: ExpertCounts, batch: int) -> npt.NDArray[np.float64]:
    """Expected distinct experts of B tokens at each layer `[L]`: the sum over experts of 1 - (1 - share of tokens)^B.

    Assumes that the tokens of a step are drawn independently; tokens of one text are more alike than that.
    """
    share_LE = np.minimum(1.0, counts.tokens_LE / max(1, counts.num_tokens))
    return np.asarray((1 - (1 - share_LE) ** batch).sum(1))


def hit_rate(kept_LE: npt.NDArray[np.bool_], counted_LE: npt.NDArray[Any]) -> float:
    """Share of the choices (or of the routing weight) in `counted_LE` that goes to kept experts."""
    total = counted_LE.sum()
    return float(counted_LE[kept_LE].sum() / total) if total else 0.0


def overlap(first_LE: npt.NDArray[Any], second_LE: npt.NDArray[Any]) -> float:
    """How alike two tables of loads are: the sum over experts of the smaller share of its layer's choices, mean of the layers.

    1 if every expert has the same share in both, 0 if no expert is chosen in both (1 - total variation distance).
    """
    first, second = (table / np.maximum(table.sum(1, keepdims=True), 1e-300) for table in (first_LE, second_LE))
    return float(np.minimum(first, second).sum(1).mean())
