"""How the expert load of two traces differs: by expert, by layer and by dataset, with intervals over problems.

Two halves of one trace differ as well, if only by their problems. Every figure is next to what such halves show. A half has
fewer problems, so its figures vary more than those of a whole trace: the control errs on the side of no difference.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from analysis.counts.accumulator import Floats
from analysis.statistics.domains import MIN_PROBLEMS, Blocks, bootstrap_sums
from analysis.statistics.load import entropy, normalized

# Random splits into halves, over which the control is averaged: the experts of one split are not independent of each other.
SPLITS = 4


@dataclass(frozen=True)
class DatasetDifference:
    """The difference of two traces on one dataset; see `LoadDifference` for `moved`.

    entropy: mean over layers of the load's entropy, divided by log2(E), of the first trace minus that of the second;
    entropy_low, entropy_high: its 95 % interval. problems: of both traces, or blocks of them.
    """

    dataset: str
    problems: tuple[int, int]
    moved: float
    moved_halves: float
    entropy: float
    entropy_low: float
    entropy_high: float


@dataclass(frozen=True)
class LoadDifference:
    """Expert load of the first trace minus that of the second.

    Attributes:
        first, second: Names of the traces.
        is_paired: Whether both have the same problems, which are then drawn together in the bootstrap.
        share: Share of the layer's selections, divided by an even share, of the first minus that of the second `[L, E]`.
        low, high: Its 95 % interval, by bootstrap over problems `[L, E]`.
        found: Number of experts whose interval does not contain 0.
        found_halves: The same number for two random halves of the first trace, and of the second, mean of SPLITS splits; `nan`
            with fewer than 2 * MIN_PROBLEMS problems.
        moved: Share of a layer's selections that would have to go to other experts to make the loads equal (total variation
            distance) `[L]`.
        moved_halves: The same for two halves of one trace, mean of SPLITS splits of both traces `[L]`.
        datasets: The difference on each dataset that both traces have, the largest first; then on all problems together.
    """

    first: str
    second: str
    is_paired: bool
    share: Floats
    low: Floats
    high: Floats
    found: int
    found_halves: tuple[float, float]
    moved: Floats
    moved_halves: Floats
    datasets: list[DatasetDifference]

    @property
    def is_found(self) -> npt.NDArray[np.bool_]:
        """Whether an expert's interval does not contain 0 `[L, E]`."""
        return (self.low > 0) | (self.high < 0)


def load_difference(
    first: str,
    second: str,
    ours: dict[str, Blocks],
    theirs: dict[str, Blocks],
    shape: tuple[int, int],
    seed: int = 0,
    *,
    is_paired: bool = False,
) -> LoadDifference | None:
    """Difference of two traces from their selections by dataset and problem `[B, L * E]`; shape: (L, E).

    is_paired: both traces have the same problems in the same order. None if a trace has fewer than MIN_PROBLEMS problems.
    """
    mine, other = (np.concatenate(list(blocks.values())) for blocks in (ours, theirs))
    if min(len(mine), len(other)) < MIN_PROBLEMS:
        return None
    is_paired = is_paired and [len(blocks) for blocks in ours.values()] == [len(blocks) for blocks in theirs.values()]
    low, high = _interval(_shares(mine, shape, seed), _shares(other, shape, seed if is_paired else seed + 1))
    halves = [_halves(blocks, seed) for blocks in (mine, other)]
    datasets = [
        _of_dataset(name, ours[name], theirs[name], shape, seed, is_paired=is_paired and len(ours[name]) == len(theirs[name]))
        for name in ours
        if name in theirs and min(len(ours[name]), len(theirs[name])) >= MIN_PROBLEMS
    ]
    share = _share(mine, shape) - _share(other, shape)
    return LoadDifference(
        first=first,
        second=second,
        is_paired=is_paired,
        share=share,
        low=low,
        high=high,
        found=int(((low > 0) | (high < 0)).sum()),
        found_halves=(_found(halves[0], shape, seed), _found(halves[1], shape, seed)),
        moved=_moved(mine, other, shape),
        moved_halves=np.mean([_moved(*pair, shape) for pairs in halves for pair in pairs], axis=0),
        datasets=[
            *sorted(datasets, key=lambda each: -each.moved),
            _of_dataset("all", mine, other, shape, seed, is_paired=is_paired),
        ],
    )


def _of_dataset(
    name: str, ours: Blocks, theirs: Blocks, shape: tuple[int, int], seed: int, *, is_paired: bool
) -> DatasetDifference:
    drawn = [_shares(ours, shape, seed), _shares(theirs, shape, seed if is_paired else seed + 1)]
    samples = _evenness(drawn[0]) - _evenness(drawn[1])
    halves = [_moved(*pair, shape) for blocks in (ours, theirs) for pair in _halves(blocks, seed)]
    difference = _evenness(_share(ours, shape)[None]) - _evenness(_share(theirs, shape)[None])
    # Entropy is lower in every bootstrap sample than in the trace, the more so the fewer problems: only the spread counts.
    low, high = difference[0] + np.quantile(samples, [0.025, 0.975]) - samples.mean()
    return DatasetDifference(
        dataset=name,
        problems=(len(ours), len(theirs)),
        moved=float(_moved(ours, theirs, shape).mean()),
        moved_halves=float(np.mean(halves)),
        entropy=float(difference[0]),
        entropy_low=float(low),
        entropy_high=float(high),
    )


def _share(blocks: Blocks, shape: tuple[int, int]) -> Floats:
    """Share of each expert, divided by an even share `[L, E]`."""
    return normalized(blocks.sum(0, dtype=np.float64).reshape(shape)) * shape[1]


def _shares(blocks: Blocks, shape: tuple[int, int], seed: int) -> Floats:
    """`_share` of bootstrap samples `[N, L, E]`; with one seed, of the same problems in each group of as many."""
    everything = np.ones(len(blocks), dtype=np.bool_)
    sums = bootstrap_sums({"": blocks}, everything, np.random.default_rng((seed, len(blocks))))
    return normalized(sums.reshape(-1, *shape)) * shape[1]


def _interval(ours: Floats, theirs: Floats) -> tuple[Floats, Floats]:
    """The 95 % interval of the difference `[L, E]`, layer by layer, as the quantiles of all would need several copies."""
    limits = [np.quantile(ours[:, layer] - theirs[:, layer], [0.025, 0.975], axis=0) for layer in range(ours.shape[1])]
    low, high = np.stack(limits, axis=1)
    return low, high


def _evenness(share_NLE: Floats) -> Floats:
    """Mean over layers of the entropy of the load, divided by its maximum `[N]`."""
    experts = share_NLE.shape[-1]
    bits = entropy(share_NLE / experts) / np.log2(experts) if experts > 1 else np.ones(share_NLE.shape[:-1])
    return np.asarray(bits.mean(-1))


def _moved(ours: Blocks, theirs: Blocks, shape: tuple[int, int]) -> Floats:
    """Total variation distance of the loads `[L]`."""
    return np.asarray(np.abs(_share(ours, shape) - _share(theirs, shape)).sum(1) / (2 * shape[1]))


def _halves(blocks: Blocks, seed: int) -> list[tuple[Blocks, Blocks]]:
    """Random halves of the problems, SPLITS times."""
    random = np.random.default_rng((seed, len(blocks), 2))
    orders = [random.permutation(len(blocks)) for _ in range(SPLITS)]
    middle = len(blocks) // 2
    return [(blocks[order[:middle]], blocks[order[middle:]]) for order in orders]


def _found(halves: list[tuple[Blocks, Blocks]], shape: tuple[int, int], seed: int) -> float:
    """Number of experts whose interval of the difference does not contain 0, mean over pairs of halves."""
    if len(halves[0][0]) < MIN_PROBLEMS:
        return float("nan")
    limits = [_interval(_shares(one, shape, seed), _shares(other, shape, seed + 1)) for one, other in halves]
    return float(np.mean([((low > 0) | (high < 0)).sum() for low, high in limits]))
