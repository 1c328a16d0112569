"""Expert load: how often and with what weight each expert of a layer is used, and how even the load is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.counts.accumulator import Counts, Floats


@dataclass(frozen=True)
class LoadStatistics:
    """Load per MoE layer; arrays are `[L]`, those with the suffix `_LE` are `[L, E]`.

    share_LE: fraction of a layer's selections that went to each expert. mass_share_LE: fraction of the sum of routing weights;
    None if weights were not recorded. A layer without selections has zeros.
    entropy_bits: entropy of share_LE. entropy_share: entropy divided by log2(E), 1 for even load. coverage: fraction of experts
    used at all. max_over_mean: load of the busiest expert divided by the mean load. gini: mean absolute difference of two
    experts' loads divided by twice the mean, 0 for even load, (E-1)/E if one expert has all. cv: standard deviation divided by
    mean.
    """

    tokens: int
    counts_LE: Counts
    share_LE: Floats
    mass_share_LE: Floats | None
    entropy_bits: Floats
    entropy_share: Floats
    max_over_mean: Floats
    gini: Floats
    cv: Floats
    coverage: Floats


def load_statistics(counts_LE: Counts, tokens: int = 0, mass_LE: Floats | None = None) -> LoadStatistics:
    """Load statistics of selection counts. tokens: number of tokens counted; mass_LE: sums of routing weights, if recorded."""
    experts = counts_LE.shape[1]
    share_LE = normalized(counts_LE)
    entropy_bits = entropy(share_LE)
    ranked_LE = np.sort(share_LE, axis=1)
    used_L = counts_LE.sum(1) > 0
    # Sorted ascending, G = sum((2 i - E - 1) x_i) / (E sum(x)), i from 1.
    gini = (ranked_LE * (2 * np.arange(1, experts + 1) - experts - 1)).sum(1) / experts
    return LoadStatistics(
        tokens=tokens,
        counts_LE=counts_LE,
        share_LE=share_LE,
        mass_share_LE=None if mass_LE is None else normalized(mass_LE),
        entropy_bits=entropy_bits,
        entropy_share=entropy_bits / np.log2(experts) if experts > 1 else np.ones_like(entropy_bits),
        max_over_mean=share_LE.max(1) * experts,
        gini=gini,
        cv=np.where(used_L, share_LE.std(1) * experts, 0.0),
        coverage=(counts_LE > 0).mean(1),
    )


def normalized(counts: npt.NDArray[Any]) -> Floats:
    """Counts divided by their sum along the last axis; zeros where the sum is zero."""
    total = counts.sum(-1, keepdims=True)
    return np.asarray(np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0))


def entropy(probabilities: Floats) -> Floats:
    """Shannon entropy in bits along the last axis; 0 log 0 = 0."""
    logs = np.log2(probabilities, where=probabilities > 0, out=np.zeros_like(probabilities, dtype=np.float64))
    # Adding 0.0 turns the -0.0 of a certain outcome into 0.0.
    return np.asarray(-(probabilities * logs).sum(-1) + 0.0)


def binary_entropy(probabilities: Floats) -> Floats:
    """Entropy in bits of each event with the given probability; `entropy` of both outcomes would need far larger arrays."""
    bits: Floats = np.zeros(probabilities.shape)
    for each in (probabilities, 1 - probabilities):
        terms = np.log2(each, where=each > 0, out=np.zeros(each.shape))
        terms *= each
        bits -= terms
    bits += 0.0
    return bits
