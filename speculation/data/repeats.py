"""Find where the same tokens occurred earlier in a sequence.

The routes recorded at the earlier place are the best single predictor of the routes now.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

UNKNOWN_TOKEN = -1
# Lengths of the runs of tokens that are searched for. If several occurred before, the longest one is used.
RUN_LENGTHS = (1, 2, 4, 8)
# Odd constants with well mixed bits: the fractional part of the golden ratio, and a prime of xxHash64.
_MIX, _SPREAD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


@dataclass(frozen=True)
class Matches:
    """For each token, the latest earlier place in the same stretch where the same run of tokens ended.

    index_T: `[T]`, the index of the token at that place, or -1 without a match.
    order_T: `[T]`, 1 + the index in RUN_LENGTHS of the length of the matching run, or 0 without a match.
    by_length_TR: `[T, R]`, the same as `index_T` for each of the run lengths alone.
    """

    index_T: npt.NDArray[np.int64]
    order_T: npt.NDArray[np.int64]
    by_length_TR: npt.NDArray[np.int64]


def find_matches(token_keys_T: npt.NDArray[np.int64], first_T: npt.NDArray[np.int64]) -> Matches:
    """Find the match of every token. Unknown tokens match nothing.

    Runs are compared by 64-bit hashes. Two different runs collide in about 3 of 10^10 stretches of 10^5 tokens.

    token_keys_T: `[T]`, the identity of each token. first_T: `[T]`, the index of the first token of each token's stretch.
    """
    count = len(token_keys_T)
    index_T, order_T = np.full(count, -1), np.zeros(count, dtype=np.int64)
    by_length_TR = np.full((count, len(RUN_LENGTHS)), -1)
    depth_T = np.arange(count) - first_T
    # The number of consecutive known tokens that end here: a run must not contain an unknown token.
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
        by_length_TR[found, number - 1] = sorted_C[:-1][follows]
    return Matches(index_T, order_T, by_length_TR)
