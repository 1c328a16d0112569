"""Find long runs of tokens with identical routes: the dummy tokens of an engine's profiling pass, which loggers record too.

A dummy token is repeated thousands of times, so all of its rows have the same experts and the same weights, bit for bit. Text
that repeats itself has the same experts at most: each position attends to more tokens, so that the weights differ. Where the
weights say nothing (the source has none, every token has the same ones, or they were rounded to a few decimals), a run may be
text and is only reported.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from profiler.importers.rows import EMPTY
from profiler.trace.hashing import hash_rows

# The shortest run that counts. Profiling passes have hundreds to thousands of tokens.
MIN_RUN = 64
# Shorter runs of a route that was found to be a dummy's belong to the warm-up too (batches of CUDA graph capture).
MIN_KNOWN_RUN = 8
# A run is reported only if so few such runs are expected by chance, given how often routes repeat elsewhere in the source.
MAX_EXPECTED = 1e-6


@dataclass
class RouteFingerprints:
    """Hashes of the routes of all tokens, collected in pieces; 28 bytes per token, as a trace may have hundreds of millions."""

    _keys: list[npt.NDArray[np.int64]] = field(default_factory=list)
    _routes: list[npt.NDArray[np.uint64]] = field(default_factory=list)
    _weights: list[npt.NDArray[np.uint64]] = field(default_factory=list)
    _empty: list[npt.NDArray[np.int32]] = field(default_factory=list)

    def add(
        self, keys_T: npt.NDArray[np.int64], ids_TLK: npt.NDArray[np.int32], weights_TLK: npt.NDArray[np.float32] | None
    ) -> None:
        """Add tokens. keys_T: problem id << 32 | position. weights_TLK: None if the source has no weights."""
        ids_T = hash_rows(ids_TLK.reshape(len(keys_T), -1))
        weights_T = np.zeros_like(ids_T) if weights_TLK is None else hash_rows(weights_TLK.reshape(len(keys_T), -1))
        self._keys.append(keys_T)
        # The rotation keeps equal hashes of experts and weights from canceling out.
        self._routes.append(ids_T ^ (weights_T << np.uint64(1) | weights_T >> np.uint64(63)))
        self._weights.append(weights_T)
        self._empty.append((ids_TLK == EMPTY).sum((1, 2), dtype=np.int32))

    def sorted(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.int32]]:
        """The keys of all tokens, ascending; hashes of their routes, and of their weights alone; their empty slots: `[T]`."""
        if not self._keys:
            nothing = np.empty(0, np.uint64)
            return nothing.astype(np.int64), nothing, nothing, nothing.astype(np.int32)
        keys_T = np.concatenate(self._keys)
        order_T = np.argsort(keys_T, kind="stable")
        routes_T, weights_T = np.concatenate(self._routes)[order_T], np.concatenate(self._weights)[order_T]
        return keys_T[order_T], routes_T, weights_T, np.concatenate(self._empty)[order_T]


@dataclass(frozen=True)
class IdenticalRuns:
    """Which tokens `[T]` are in long runs of identical routes.

    dummy_T: runs whose weights show that they are not text. unclear_T: runs that the weights say nothing about.
    """

    dummy_T: npt.NDArray[np.bool_]
    unclear_T: npt.NDArray[np.bool_]


def find_identical_runs(
    keys_T: npt.NDArray[np.int64], routes_T: npt.NDArray[np.uint64], weights_T: npt.NDArray[np.uint64], *, rounded: bool = False
) -> IdenticalRuns:
    """Find the runs among tokens that are sorted by key; see `RouteFingerprints.sorted`.

    A run has at least `MIN_RUN` tokens of a problem, one after the other, with the same route at every layer. Where routes
    repeat often anyway (few experts, few layers), it must be so long that chance does not explain it.
    rounded: the weights have few decimals, so that those of text may be the same, too.
    """
    tokens = len(keys_T)
    nothing_T = np.zeros(tokens, dtype=np.bool_)
    problems_T = keys_T >> 32
    first_T = np.ones(tokens, dtype=np.bool_)
    first_T[1:] = (routes_T[1:] != routes_T[:-1]) | (problems_T[1:] != problems_T[:-1])
    starts_R = np.flatnonzero(first_T)
    lengths_R = np.diff(np.append(starts_R, tokens))
    long_R = lengths_R >= MIN_RUN
    if not long_R.any():
        return IdenticalRuns(nothing_T, nothing_T)
    others_T = ~np.repeat(long_R, lengths_R)
    others = int(others_T.sum())
    # Weights are evidence if those of the run are not what most other tokens have as well.
    common, counts = np.unique(weights_T[others_T], return_counts=True)
    is_evidence_R = ~np.isin(weights_T[starts_R], common[counts > others / 2]) & (others > 0 and not rounded)
    # How often a route follows itself: without the long runs, or, where these may be text, with a part of each.
    repeats, breaks = int((lengths_R[~long_R] - 1).sum()), int((~long_R).sum())
    with_long = repeats + (MIN_RUN - 1) * int(long_R.sum())
    log_repeat_R = np.log(
        np.where(is_evidence_R, (repeats + 1) / (repeats + breaks + 2), (with_long + 1) / (with_long + breaks + 2))
    )
    long_R &= np.log(tokens) + (lengths_R - 1) * log_repeat_R < np.log(MAX_EXPECTED)
    dummy_R, unclear_R = long_R & is_evidence_R, long_R & ~is_evidence_R
    known_R = np.isin(routes_T[starts_R], routes_T[starts_R[dummy_R]])
    # A run is a whole problem if it is the only run of that problem.
    begins_R = np.append(True, problems_T[starts_R[1:]] != problems_T[starts_R[:-1]])
    whole_R = begins_R & np.append(begins_R[1:], True)
    dummy_R |= known_R & (whole_R | (lengths_R >= MIN_KNOWN_RUN))
    return IdenticalRuns(np.repeat(dummy_R, lengths_R), np.repeat(unclear_R, lengths_R))
