"""Check and sort the (expert id, weight) pairs of tokens.

T tokens, L MoE layers, K experts per token, E experts. A slot that a source left empty (a dropped token) has the id E.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.errors import TraceError

# Up to this K, comparing column by column is faster than sorting row by row.
NETWORK_TOP_K = 8
# float16 bit patterns: infinity (NaNs are above it), and the sign bit.
INFINITY_BITS, SIGN_BIT = 0x7C00, 0x8000


def check_ids(expert_ids_TLK: npt.NDArray[np.integer[Any]], num_experts: int, what: str) -> None:
    """Raise `TraceError`, naming `what`, if an expert id is not in 0..E-1."""
    if expert_ids_TLK.size:
        lowest, highest = int(expert_ids_TLK.min()), int(expert_ids_TLK.max())
        if lowest < 0 or highest >= num_experts:
            raise TraceError(f"{what}: expert ids {lowest}..{highest}, expected 0..{num_experts - 1}")


def check_weights(weights_TLK: npt.NDArray[np.floating[Any]], what: str) -> npt.NDArray[np.float16]:
    """The weights as float16. Raises `TraceError`, naming `what`, if one is negative or not a finite float16."""
    if weights_TLK.size == 0:
        return weights_TLK.astype(np.float16)
    with np.errstate(over="ignore"):
        halves_TLK = np.ascontiguousarray(weights_TLK, dtype=np.float16)
    # The bits of a finite number that is not negative are below those of infinity. The only other valid value is -0.
    bits = halves_TLK.view(np.uint16)
    if bits.max() >= INFINITY_BITS and not (np.isfinite(halves_TLK).all() and (halves_TLK >= 0).all()):
        raise TraceError(f"{what}: a routing weight is negative, not a number, or above 65,504 (float16)")
    return halves_TLK


def refuse_repeats(expert_ids_TLK: npt.NDArray[Any], what: str, empty: int | None = None) -> None:
    """Raise `TraceError`, naming `what`, if a token has an expert twice in a layer. empty: the id of empty slots."""
    if has_repeats(expert_ids_TLK, empty).any():
        raise TraceError(f"{what}: a token has the same expert twice in a layer")


def sort_pairs(
    expert_ids_TLK: npt.NDArray[np.unsignedinteger[Any]], weights_TLK: npt.NDArray[np.float16]
) -> tuple[npt.NDArray[np.unsignedinteger[Any]], npt.NDArray[np.float16]]:
    """Both arrays `[T, L, K]` reordered along K by weight, descending; equal weights by expert id.

    Weights must not be negative: their bit patterns then sort as they do. Most routers return their choices in order, so only
    tokens and layers whose pairs are out of order, or have equal weights, are sorted.
    """
    top_k = expert_ids_TLK.shape[-1]
    ids_NK, weights_NK = expert_ids_TLK.reshape(-1, top_k), weights_TLK.reshape(-1, top_k)
    bits_NK = weights_NK.view(np.uint16)
    # The bits of a negative zero are above all others, so a row that contains one is always sorted, which makes it +0.
    sort_N = bits_NK[:, 0] >= SIGN_BIT
    for k in range(top_k - 1):
        sort_N |= bits_NK[:, k + 1] >= bits_NK[:, k]
    if sort_N.any():
        ids_NK, weights_NK = ids_NK.copy(), weights_NK.copy()
        ids_NK[sort_N], weights_NK[sort_N] = _sorted(ids_NK[sort_N], weights_NK[sort_N])
    return ids_NK.reshape(expert_ids_TLK.shape), weights_NK.reshape(weights_TLK.shape)


def _sorted(
    ids_NK: npt.NDArray[np.unsignedinteger[Any]], weights_NK: npt.NDArray[np.float16]
) -> tuple[npt.NDArray[np.unsignedinteger[Any]], npt.NDArray[np.float16]]:
    """Pairs sorted by one integer key each: the inverted bits of the weight, then the id."""
    # Adding zero turns -0 into +0.
    bits_NK = (weights_NK + np.float16(0)).view(np.uint16)
    keys_NK = (~bits_NK).astype(np.uint32) << 16 | ids_NK
    top_k = keys_NK.shape[-1]
    if top_k > NETWORK_TOP_K:
        keys_NK.sort(axis=-1)
    else:
        # Bubble sort of whole columns: a handful of vector operations, where np.sort would be called for every row.
        keys_KN = np.ascontiguousarray(keys_NK.T)
        for last in range(top_k - 1, 0, -1):
            for k in range(last):
                smaller = np.minimum(keys_KN[k], keys_KN[k + 1])
                np.maximum(keys_KN[k], keys_KN[k + 1], out=keys_KN[k + 1])
                keys_KN[k] = smaller
        keys_NK = np.ascontiguousarray(keys_KN.T)
    return (keys_NK & 0xFFFF).astype(ids_NK.dtype), (~(keys_NK >> 16).astype(np.uint16)).view(np.float16)


def empty_slots_last(expert_ids_TLK: npt.NDArray[np.unsignedinteger[Any]], empty: int) -> npt.NDArray[np.unsignedinteger[Any]]:
    """The ids reordered along K so that empty slots come last; the others keep their order."""
    order_TLK = np.argsort(expert_ids_TLK == empty, axis=-1, kind="stable")
    return np.take_along_axis(expert_ids_TLK, order_TLK, axis=-1)


def has_repeats(expert_ids_TLK: npt.NDArray[Any], empty: int | None = None) -> npt.NDArray[np.bool_]:
    """Which (token, layer) `[T, L]` contain an expert more than once. empty: the id of empty slots, which may repeat."""
    top_k = expert_ids_TLK.shape[-1]
    if top_k > NETWORK_TOP_K:
        ordered = np.sort(expert_ids_TLK, axis=-1)
        same = ordered[..., 1:] == ordered[..., :-1]
        return np.asarray((same if empty is None else same & (ordered[..., 1:] != empty)).any(-1))
    columns = [expert_ids_TLK[..., k] for k in range(top_k)]
    repeats = np.zeros(expert_ids_TLK.shape[:-1], dtype=np.bool_)
    for k, first in enumerate(columns):
        for second in columns[k + 1 :]:
            same = first == second
            repeats |= same if empty is None else same & (first != empty)
    return repeats
