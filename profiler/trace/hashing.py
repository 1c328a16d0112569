"""Hash rows of numbers, to find equal ones without comparing them with each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# The multipliers repeat for rows wider than this (a token of 1,000 layers and K = 64), with their high bits changed.
_MULTIPLIERS = np.random.default_rng(0).integers(0, 2**63, size=1 << 16, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
# Entries that are widened to 64 bits at a time: 8 MiB.
_ENTRIES_AT_A_TIME = 1 << 20


def hash_rows(values_NW: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """A 64-bit hash `[N]` of each row of `[N, W]`: equal rows have equal hashes, others almost never.

    values_NW: whole numbers, or floating-point numbers, which are compared bit for bit. Values can be chosen to collide.
    """
    rows, width = values_NW.shape
    bits_NW = np.ascontiguousarray(values_NW)
    if bits_NW.dtype.kind == "f":
        bits_NW = bits_NW.view(f"u{bits_NW.dtype.itemsize}")
    places_W = np.arange(width, dtype=np.uint64)
    factors_W = np.resize(_MULTIPLIERS, width) ^ (places_W // np.uint64(len(_MULTIPLIERS)) << np.uint64(40))
    hashes_N = np.empty(rows, dtype=np.uint64)
    step = max(1, _ENTRIES_AT_A_TIME // max(1, width))
    for start in range(0, rows, step):
        hashes_N[start : start + step] = bits_NW[start : start + step].astype(np.uint64) @ factors_W
    # The low bits of a sum of products depend on the low bits of the values only: spread them.
    hashes_N ^= hashes_N >> np.uint64(29)
    hashes_N *= np.uint64(0xBF58476D1CE4E5B9)
    return hashes_N
