"""What an import could not keep: tokens that were dropped, by reason, and positions without rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from profiler.capture.sealing import Missing
from profiler.errors import counted
from profiler.importers.identical_runs import MIN_RUN


@dataclass
class Losses:
    """The tokens that an import kept, and those that it dropped, by reason.

    last_token: the highest position of each problem that has tokens.
    """

    tokens: int = 0
    last_token: dict[int, int] = field(default_factory=dict)
    incomplete: int = 0
    incomplete_problems: set[int] = field(default_factory=set)
    contradicted: int = 0
    repeated: int = 0
    unknown_weights: int = 0
    short: int = 0
    identical: int = 0
    identical_kept: int = 0
    empty_slots: int = 0

    def count(self, keys_T: npt.NDArray[np.int64]) -> None:
        """Count kept tokens. keys_T: problem id << 32 | position, ascending."""
        self.tokens += len(keys_T)
        problems_T = keys_T >> 32
        # Keys ascend: the last of a problem is its highest position.
        last_T = np.append(np.diff(problems_T) > 0, True)[: len(keys_T)]
        for problem, token in zip(problems_T[last_T].tolist(), (keys_T[last_T] & 0xFFFFFFFF).tolist(), strict=True):
            self.last_token[problem] = max(self.last_token.get(problem, -1), token)

    def count_incomplete(self, keys: npt.NDArray[np.int64]) -> None:
        """Count tokens that lack rows at some layer."""
        self.incomplete += len(keys)
        self.incomplete_problems |= set(np.unique(keys >> 32).tolist())

    def gaps(self) -> list[str]:
        """Describe the dropped tokens, a line for each reason."""
        left_out = self.incomplete + self.contradicted + self.repeated + self.unknown_weights + self.short + self.identical
        of = f"of {self.tokens + left_out:,} tokens"
        reasons = [
            (
                self.incomplete,
                f"lacked rows at some layer and were dropped, in {counted(len(self.incomplete_problems), 'problem')}",
            ),
            (self.contradicted, "had two different rows at a layer and were dropped"),
            (self.repeated, "named an expert twice at a layer and were dropped"),
            (self.unknown_weights, "had an unknown weight and were dropped"),
            (self.short, "went to fewer than K experts and were dropped"),
            (
                self.identical,
                f"were dropped: they are in runs of {MIN_RUN} or more with the same experts and weights at every layer, as the "
                "dummy tokens of an engine's warm-up are",
            ),
            (
                self.identical_kept,
                f"were kept although they are in runs of {MIN_RUN} or more with the same route at every layer: a warm-up, or "
                "text that repeats itself",
            ),
        ]
        return [f"{count:,} {of} {reason}" for count, reason in reasons if count]


def holes(missing: Missing, dropped_keys: npt.NDArray[np.int64]) -> list[str]:
    """Positions without rows: the beginnings of problems (prompts that were not recorded), and others.

    dropped_keys: problem id << 32 | position of tokens that had rows, ascending; their positions do not count.
    """
    late = beginnings = holes = others = 0
    for problem, whole_G2 in missing.items():
        gaps_G2 = _without(whole_G2, dropped_keys, problem)
        if not len(gaps_G2):
            continue
        first = int(gaps_G2[0, 1]) if gaps_G2[0, 0] == 0 else 0
        rest = int((gaps_G2[:, 1] - gaps_G2[:, 0]).sum()) - first
        late, beginnings = late + (first > 0), beginnings + first
        others, holes = others + (rest > 0), holes + rest
    found = []
    if late:
        found.append(
            f"{counted(late, 'problem')} without the first positions, {beginnings:,} in all: prompts not recorded, or only "
            "in part"
        )
    if others:
        found.append(f"{counted(holes, 'further position')} of {counted(others, 'problem')} without rows")
    return found


def _without(gaps_G2: npt.NDArray[np.int64], dropped_keys: npt.NDArray[np.int64], problem: int) -> npt.NDArray[np.int64]:
    """The gaps of a problem, minus the positions of its dropped tokens."""
    first, end = np.searchsorted(dropped_keys, [problem << 32, (problem + 1) << 32])
    positions = dropped_keys[first:end] & 0xFFFFFFFF
    if not len(positions):
        return gaps_G2
    # Each dropped position is missing, so it lies in one of the gaps and splits it.
    starts = np.sort(np.concatenate([gaps_G2[:, 0], positions + 1]))
    ends = np.sort(np.concatenate([gaps_G2[:, 1], positions]))
    keep = ends > starts
    return np.stack([starts[keep], ends[keep]], axis=1)
