"""Do domains (datasets) use different experts? Distances between their loads, and experts that one prefers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from analysis.counts.accumulator import Floats
from analysis.counts.load import ProblemBlocks
from analysis.statistics.load import entropy, normalized

PERMUTATIONS = 20
BOOTSTRAPS = 400
DRAWN_BYTES = 32 << 20
# Fewer problems than this in a dataset make no interval.
MIN_PROBLEMS = 5
# An expert that a dataset uses less than this is not called its own, however much rarer others use it.
MIN_SHARE = 0.25

Blocks = npt.NDArray[np.float32]


@dataclass(frozen=True)
class DomainDistance:
    """Jensen-Shannon distance per MoE layer `[L]` between two datasets (0 equal, 1 disjoint; square root of bits).

    shuffled `[L]`: mean over permutations of the datasets' labels over the problems of both; what differing problems alone
    cause. shuffled_high `[L]`: the largest of them.
    """

    first: str
    second: str
    distance: Floats
    shuffled: Floats
    shuffled_high: Floats


def domain_distances(blocks: ProblemBlocks, datasets: tuple[str, ...], seed: int = 0) -> list[DomainDistance]:
    """Distances of every two datasets that have problems, in order of their names."""
    _, by_dataset = flat_blocks(blocks, datasets)
    return [
        distance_of(first, second, by_dataset[first], by_dataset[second], blocks.shape, seed)
        for first, second in combinations(by_dataset, 2)
    ]


def distance_of(
    first: str,
    second: str,
    ours: Blocks,
    theirs: Blocks,
    shape: tuple[int, int],
    seed: int = 0,
    *,
    paired: bool = False,
) -> DomainDistance:
    """Distance of the loads of two groups of problems, by their selections `[B, L * E]`; shape: L and E.

    paired: the groups have the same problems in the same order. Labels are then exchanged within pairs only: what differs
    between problems is on both sides, and is no part of the control.
    """
    is_first = np.arange(len(ours) + len(theirs)) < len(ours)
    random = np.random.default_rng((seed, len(ours), len(theirs)))
    if paired and len(ours) == len(theirs):
        exchanged = [np.tile(random.random(len(ours)) < 0.5, 2) ^ is_first for _ in range(PERMUTATIONS)]
    else:
        exchanged = [random.permutation(is_first) for _ in range(PERMUTATIONS)]
    labels = np.stack([is_first, *exchanged]).astype(np.float32)
    sums = [each[:, : len(ours)] @ ours + each[:, len(ours) :] @ theirs for each in (labels, 1 - labels)]
    found = jensen_shannon_distance(*(normalized(each.reshape(-1, *shape).astype(np.float64)) for each in sums))
    return DomainDistance(first, second, found[0], found[1:].mean(0), found[1:].max(0))


@dataclass(frozen=True)
class Specialist:
    """An expert that a dataset prefers. ratio: its share of the dataset's selections at the layer, over that in all others.

    low, high: 95 % interval of the ratio, by bootstrap over problems. share: in the dataset, over even load. layer: place among
    the MoE layers.
    """

    dataset: str
    layer: int
    expert: int
    ratio: float
    low: float
    high: float
    share: float


@dataclass(frozen=True)
class Specialization:
    """Of one dataset against all others: found, shuffled: experts whose interval is above 1, and above 1 with labels shuffled.

    `specialists`: the found, by the low end of the interval.
    """

    dataset: str
    problems: int
    found: int
    shuffled: int
    specialists: list[Specialist]


def specialization(blocks: ProblemBlocks, datasets: tuple[str, ...], seed: int = 0) -> list[Specialization]:
    """Experts that each dataset prefers; of datasets with at least MIN_PROBLEMS problems, against at least as many others."""
    _, by_dataset = flat_blocks(blocks, datasets)
    if len(by_dataset) < 2:
        return []
    labels = np.concatenate([np.full(len(counts), number) for number, counts in enumerate(by_dataset.values())])
    random = np.random.default_rng(seed)
    mixed = random.permutation(labels)
    result = []
    for number, dataset in enumerate(by_dataset):
        inside = labels == number
        if min(inside.sum(), (~inside).sum()) < MIN_PROBLEMS:
            continue
        found = _preferred(by_dataset, blocks.shape, inside, dataset, random)
        control = _preferred(by_dataset, blocks.shape, mixed == number, dataset, random)
        problems = int(blocks.problems[datasets.index(dataset)])
        result.append(Specialization(dataset, problems, len(found), len(control), found))
    return result


def _preferred(
    by_dataset: dict[str, Blocks],
    shape: tuple[int, int],
    is_inside: npt.NDArray[np.bool_],
    dataset: str,
    random: np.random.Generator,
) -> list[Specialist]:
    """Experts that the blocks `is_inside` `[B]` prefer; B goes through all datasets in their order."""
    inside, outside = (
        _weighted(by_dataset, each[None].astype(np.float32))[0].reshape(shape) for each in (is_inside, ~is_inside)
    )
    ratios = _share_ratio(inside, outside)
    drawn = [_bootstrap(by_dataset, part, random).reshape(-1, *shape) for part in (is_inside, ~is_inside)]
    # Layer by layer: replicates of all at once would be the largest arrays of the whole analysis.
    limits = [
        np.quantile(_share_ratio(*(each[:, layer] for each in drawn)), [0.025, 0.975], axis=0) for layer in range(shape[0])
    ]
    low, high = np.stack(limits, axis=1)
    share = normalized(inside.astype(np.float64)) * shape[1]
    own = np.argwhere((low > 1) & (share >= MIN_SHARE))
    specialists = [
        Specialist(dataset, int(n), int(e), float(ratios[n, e]), float(low[n, e]), float(high[n, e]), float(share[n, e]))
        for n, e in own
    ]
    return sorted(specialists, key=lambda found: -found.low)


def _bootstrap(
    by_dataset: dict[str, Blocks], is_drawn: npt.NDArray[np.bool_], random: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Sums over as many of the blocks `is_drawn`, with replacement, BOOTSTRAPS times; some at a time, as blocks may be many."""
    number = int(is_drawn.sum())
    equal = np.full(number, 1 / number)
    at_a_time = max(1, DRAWN_BYTES // (8 * len(is_drawn)))
    sums = []
    for start in range(0, BOOTSTRAPS, at_a_time):
        times = random.multinomial(number, equal, size=min(at_a_time, BOOTSTRAPS - start))
        weights = np.zeros((len(times), len(is_drawn)), dtype=np.float32)
        weights[:, is_drawn] = times
        sums.append(_weighted(by_dataset, weights))
    return np.concatenate(sums)


def _weighted(by_dataset: dict[str, Blocks], weights_nB: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Weighted sums `[n, L * E]` over the blocks of all datasets, which are never copied together."""
    ends = np.cumsum([len(counts) for counts in by_dataset.values()])
    parts = zip(np.split(weights_nB, ends[:-1], axis=1), by_dataset.values(), strict=True)
    return np.asarray(sum(weights @ counts for weights, counts in parts))


def _share_ratio(inside: npt.NDArray[np.float32], outside: npt.NDArray[np.float32]) -> Floats:
    """Ratio of shares along the last axis; half a selection is added to both, so that it is finite."""
    return np.asarray(normalized(inside.astype(np.float64) + 0.5) / normalized(outside.astype(np.float64) + 0.5))


def flat_blocks(blocks: ProblemBlocks, datasets: tuple[str, ...]) -> tuple[Blocks, dict[str, Blocks]]:
    """Selections of all datasets `[B, L * E]`, and of each that has any, as a part of that array."""
    keys = sorted(blocks.counts)
    flat: Blocks = np.empty((len(keys), int(np.prod(blocks.shape))), dtype=np.float32)
    for row, key in zip(flat, keys, strict=True):
        row[:] = blocks.counts[key].ravel()
    starts = np.searchsorted([dataset for dataset, _ in keys], range(len(datasets) + 1))
    parts = {name: flat[start:stop] for name, start, stop in zip(datasets, starts, starts[1:], strict=False)}
    return flat, {name: counts for name, counts in parts.items() if len(counts)}


def jensen_shannon_distance(p: Floats, q: Floats) -> Floats:
    """Square root of the Jensen-Shannon divergence in bits (Endres and Schindelin, 2003), along the last axis."""
    divergence = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
    return np.asarray(np.sqrt(np.maximum(divergence, 0)))
