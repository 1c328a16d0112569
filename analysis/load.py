"""Expert load: how often each expert of a layer is used, and how evenly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LoadStatistics:
    """Per MoE layer; all arrays `[L]` but `share_LE` `[L, E]`, the fraction of selections that went to each expert.

    entropy_bits: entropy of the share; entropy_share: the same over log2(E), 1 for perfectly even load.
    max_over_mean: load of the busiest expert over the mean load. coverage: fraction of experts used at all.
    """

    share_LE: Floats
    entropy_bits: Floats
    entropy_share: Floats
    max_over_mean: Floats
    coverage: Floats


def count_experts(expert_ids_TLK: npt.NDArray[Any], num_experts: int) -> Counts:
    """Selections per layer and expert `[L, E]`; empty slots (id E) are not counted."""
    layers, ids = expert_ids_TLK.shape[1], num_experts + 1
    index_TLK = expert_ids_TLK.astype(np.int64) + ids * np.arange(layers)[:, None]
    return np.bincount(index_TLK.reshape(-1), minlength=layers * ids).reshape(layers, ids)[:, :num_experts]


def load_statistics(counts_LE: Counts) -> LoadStatistics:
    """Evenness of `counts_LE` `[L, E]`; every layer needs at least one selection."""
    experts = counts_LE.shape[1]
    share_LE = counts_LE / counts_LE.sum(1, keepdims=True)
    entropy_bits = entropy(share_LE)
    return LoadStatistics(
        share_LE=share_LE,
        entropy_bits=entropy_bits,
        entropy_share=entropy_bits / np.log2(experts) if experts > 1 else np.ones_like(entropy_bits),
        max_over_mean=share_LE.max(1) * experts,
        coverage=(counts_LE > 0).mean(1),
    )


def entropy(probabilities: Floats) -> Floats:
    """Shannon entropy in bits along the last axis; 0 log 0 = 0."""
    logs = np.log2(probabilities, where=probabilities > 0, out=np.zeros_like(probabilities, dtype=np.float64))
    # Adding 0.0 turns the -0.0 of a certain outcome into 0.0.
    return np.asarray(-(probabilities * logs).sum(-1) + 0.0)
