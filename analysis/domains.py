"""Do domains (datasets) use different experts? Distances between their loads, and experts that one prefers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from analysis.accumulator import Floats
from analysis.load import ProblemBlocks, entropy, normalized

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
    by_dataset = flat_blocks(blocks, datasets)
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
    counts = np.concatenate([ours, theirs])
    is_first = np.arange(len(counts)) < len(ours)
    random = np.random.default_rng((seed, len(ours), len(theirs)))
    if paired and len(ours) == len(theirs):
        exchanged = [np.tile(random.random(len(ours)) < 0.5, 2) ^ is_first for _ in range(PERMUTATIONS)]
    else:
        exchanged = [random.permutation(is_first) for _ in range(PERMUTATIONS)]
    labels = np.stack([is_first, *exchanged]).astype(np.float32)
    sums = [normalized((each @ counts).reshape(-1, *shape).astype(np.float64)) for each in (labels, 1 - labels)]
    found = jensen_shannon_distance(*sums)
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
class Specialisation:
    """Of one dataset against all others: found, shuffled: experts whose interval is above 1, and above 1 with labels shuffled.

    `specialists`: the found, by the low end of the interval.
    """

    dataset: str
    problems: int
    found: int
    shuffled: int
    specialists: list[Specialist]


def specialisation(blocks: ProblemBlocks, datasets: tuple[str, ...], seed: int = 0) -> list[Specialisation]:
    """Experts that each dataset prefers; of datasets with at least MIN_PROBLEMS problems, against at least as many others."""
    by_dataset = flat_blocks(blocks, datasets)
    if len(by_dataset) < 2:
        return []
    everything = np.concatenate(list(by_dataset.values()))
    labels = np.concatenate([np.full(len(counts), number) for number, counts in enumerate(by_dataset.values())])
    random = np.random.default_rng(seed)
    mixed = random.permutation(labels)
    result = []
    for number, dataset in enumerate(by_dataset):
        inside = labels == number
        if min(inside.sum(), (~inside).sum()) < MIN_PROBLEMS:
            continue
        found = _preferred(blocks, everything[inside], everything[~inside], dataset, random)
        control = _preferred(blocks, everything[mixed == number], everything[mixed != number], dataset, random)
        problems = int(blocks.problems[datasets.index(dataset)])
        result.append(Specialisation(dataset, problems, len(found), len(control), found))
    return result


def _preferred(
    blocks: ProblemBlocks, inside: Blocks, outside: Blocks, dataset: str, random: np.random.Generator
) -> list[Specialist]:
    shape = blocks.shape
    ratios = _share_ratio(inside.sum(0).reshape(shape), outside.sum(0).reshape(shape))
    drawn = [_bootstrap(part, random).reshape(-1, *shape) for part in (inside, outside)]
    # Layer by layer: replicates of all at once would be the largest arrays of the whole analysis.
    limits = [
        np.quantile(_share_ratio(*(each[:, layer] for each in drawn)), [0.025, 0.975], axis=0) for layer in range(shape[0])
    ]
    low, high = np.stack(limits, axis=1)
    share = normalized(inside.sum(0, dtype=np.float64).reshape(shape)) * shape[1]
    own = np.argwhere((low > 1) & (share >= MIN_SHARE))
    specialists = [
        Specialist(dataset, int(n), int(e), float(ratios[n, e]), float(low[n, e]), float(high[n, e]), float(share[n, e]))
        for n, e in own
    ]
    return sorted(specialists, key=lambda found: -found.low)


def _bootstrap(blocks: Blocks, random: np.random.Generator) -> npt.NDArray[np.float32]:
    """Sums over as many blocks drawn with replacement, BOOTSTRAPS times; some of these at a time, as blocks may be many."""
    equal = np.full(len(blocks), 1 / len(blocks))
    at_a_time = max(1, DRAWN_BYTES // (8 * len(blocks)))
    sizes = [min(at_a_time, BOOTSTRAPS - start) for start in range(0, BOOTSTRAPS, at_a_time)]
    return np.concatenate([random.multinomial(len(blocks), equal, size=n).astype(np.float32) @ blocks for n in sizes])


def _share_ratio(inside: npt.NDArray[np.float32], outside: npt.NDArray[np.float32]) -> Floats:
    """Ratio of shares along the last axis; half a selection is added to both, so that it is finite."""
    return np.asarray(normalized(inside.astype(np.float64) + 0.5) / normalized(outside.astype(np.float64) + 0.5))


def flat_blocks(blocks: ProblemBlocks, datasets: tuple[str, ...]) -> dict[str, Blocks]:
    """Selections of each dataset that has any, `[B, L * E]`."""
    flat = {
        name: blocks.of_dataset(number).reshape(-1, np.prod(blocks.shape)).astype(np.float32)
        for number, name in enumerate(datasets)
    }
    return {name: counts for name, counts in flat.items() if len(counts)}


def jensen_shannon_distance(p: Floats, q: Floats) -> Floats:
    """Square root of the Jensen-Shannon divergence in bits (Endres and Schindelin, 2003), along the last axis."""
    divergence = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
    return np.asarray(np.sqrt(np.maximum(divergence, 0)))
