"""Do domains (datasets) use different experts? Distances between their loads, and the experts that a domain prefers."""

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
# A bootstrap over fewer problems than this gives no usable interval.
MIN_PROBLEMS = 5
# Share over even load. A dataset does not specialize in an expert that it uses less, however rarely other datasets use it.
MIN_SHARE = 0.25

Blocks = npt.NDArray[np.float32]


@dataclass(frozen=True)
class DomainDistance:
    """Jensen-Shannon distance per MoE layer `[L]` between two datasets (0 equal, 1 disjoint; square root of bits).

    shuffled `[L]`: mean distance over permutations of the dataset labels over the problems of both; this is the distance that
    differences between problems alone cause. shuffled_high `[L]`: the largest of these distances.
    """

    first: str
    second: str
    distance: Floats
    shuffled: Floats
    shuffled_high: Floats


def domain_distances(blocks: ProblemBlocks, datasets: tuple[str, ...], seed: int = 0) -> list[DomainDistance]:
    """Distance of each pair of datasets that have problems, in the order of `datasets`."""
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
    """Distance between the loads of two groups of problems, from their selections `[B, L * E]`; shape: (L, E).

    paired: the groups have the same problems in the same order. The control then exchanges labels within pairs only: each
    problem is on both sides, so differences between problems do not enter the control.
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
    """An expert that a dataset prefers.

    ratio: the expert's share of the dataset's selections at the layer, divided by its share in all other datasets. low, high:
    95 % interval of the ratio, by bootstrap over problems. share: its share in the dataset, divided by an even share. layer:
    index among the MoE layers.
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
    """Specialized experts of one dataset, compared with all other datasets.

    found: number of experts whose interval lies above 1. shuffled: the same number with dataset labels shuffled over problems.
    specialists: the experts found, sorted by the low end of the interval, highest first.
    """

    dataset: str
    problems: int
    found: int
    shuffled: int
    specialists: list[Specialist]


def specialization(blocks: ProblemBlocks, datasets: tuple[str, ...], seed: int = 0) -> list[Specialization]:
    """The experts that each dataset prefers, where both the dataset and all others together have at least MIN_PROBLEMS blocks
    of problems."""
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
    """Experts that the blocks in `is_inside` `[B]` prefer; B runs over all datasets in their order."""
    inside, outside = (
        _weighted(by_dataset, each[None].astype(np.float32))[0].reshape(shape) for each in (is_inside, ~is_inside)
    )
    ratios = _share_ratio(inside, outside)
    drawn = [bootstrap_sums(by_dataset, part, random).reshape(-1, *shape) for part in (is_inside, ~is_inside)]
    # Layer by layer: the replicates of all layers at once would be the largest arrays of the whole analysis.
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


def bootstrap_sums(
    by_dataset: dict[str, Blocks], is_drawn: npt.NDArray[np.bool_], random: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Draw BOOTSTRAPS samples of the blocks in `is_drawn` `[B]`, with replacement and of the same size; sums `[n, L * E]`.

    Samples are drawn in batches of limited size, since there may be many blocks.
    """
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
    """Weighted sums `[n, L * E]` over the blocks of all datasets, without concatenating them; some weight is not zero."""
    ends = np.cumsum([len(counts) for counts in by_dataset.values()])
    parts = zip(np.split(weights_nB, ends[:-1], axis=1), by_dataset.values(), strict=True)
    return np.asarray(sum(weights @ counts for weights, counts in parts if weights.any()))


def _share_ratio(inside: npt.NDArray[np.float32], outside: npt.NDArray[np.float32]) -> Floats:
    """Ratio of shares along the last axis; half a selection is added to every count so that the ratio is finite."""
    return np.asarray(normalized(inside.astype(np.float64) + 0.5) / normalized(outside.astype(np.float64) + 0.5))


def flat_blocks(blocks: ProblemBlocks, datasets: tuple[str, ...]) -> tuple[Blocks, dict[str, Blocks]]:
    """Selections of all datasets `[B, L * E]`, and of each dataset that has any, as a view of that array."""
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
