"""Where the same tokens occurred before: the routes that followed them then are the best single guess."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

UNKNOWN_TOKEN = -1
# Lengths of the runs of tokens that are looked for; the longest that occurred before counts.
RUN_LENGTHS = (1, 2, 4, 8)
# Odd constants with well mixed bits (the fractional parts of the golden ratio, and of xxHash).
_MIX, _SPREAD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


@dataclass(frozen=True)
class Matches:
    """For each token `[T]`: index_T, of the latest earlier token of the same stretch at which the same run of tokens ended; -1
    if there is none. order_T: 1 + the number of the run's length in RUN_LENGTHS; 0 if there is none.
    """

    index_T: npt.NDArray[np.int64]
    order_T: npt.NDArray[np.int64]


def find_matches(token_keys_T: npt.NDArray[np.int64], first_T: npt.NDArray[np.int64]) -> Matches:
    """Matches of every token; first_T: index of the first token of its stretch. Unknown tokens match nothing.

    Runs are compared by hashes of 64 bits: different ones would be taken for the same in 3 of 10^10 stretches of 10^5 tokens.
    """
    count = len(token_keys_T)
    index_T, order_T = np.full(count, -1), np.zeros(count, dtype=np.int64)
    depth_T = np.arange(count) - first_T
    # How many known tokens end here, without a gap: a run with an unknown one is none.
    last_unknown_T = np.maximum.accumulate(np.where(token_keys_T == UNKNOWN_TOKEN, np.arange(count), -1))
    known_T = np.minimum(depth_T + 1, np.arange(count) - last_unknown_T)
    hash_T = np.zeros(count, dtype=np.uint64)
    keys_T = token_keys_T.astype(np.uint64)
    done = 0
    for number, length in enumerate(RUN_LENGTHS, start=1):
        for back in range(done, length):
            shifted_T = np.zeros(count, dtype=np.uint64)
            shifted_T[back:] = keys_T[: max(0, count - back)]
            hash_T = (hash_T * _MIX) ^ (shifted_T * _SPREAD + np.uint64(back + 1))
            hash_T ^= hash_T >> np.uint64(29)
        done = length
        candidates = np.flatnonzero(known_T >= length)
        order = np.lexsort((candidates, hash_T[candidates], first_T[candidates]))
        sorted_C = candidates[order]
        follows = (np.diff(hash_T[sorted_C]) == 0) & (np.diff(first_T[sorted_C]) == 0)
        found = sorted_C[1:][follows]
        index_T[found], order_T[found] = sorted_C[:-1][follows], number
    return Matches(index_T, order_T)
