"""How many cache slots each layer should have, from the curves of its hits in training."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from profiler.errors import SpecmoeError
from speculation.offload.state import Integers


def even_slots(layers: int, total: int) -> Integers:
    """Divide `total` slots evenly, `[L]`. The first layers get one more if it cannot be done.

    Example:
        >>> even_slots(3, 8).tolist()
        [3, 3, 2]
    """
    return total // layers + (np.arange(layers) < total % layers).astype(np.int64)


def best_slots(hits_LC: npt.NDArray[np.int64], total: int) -> Integers:
    """Divide `total` slots among layers so that the sum of their hits is largest, `[L]`.

    Dynamic programming over the layers, in L * total * C steps. It is exact for any curves, whereas giving one slot after the
    other to the layer that gains most is exact only if each slot of a layer gains no more than the one before.

    Args:
        hits_LC: Hits of each layer with c slots, `[L, C]`; see `HitCurves.hits_LC`.
        total: Slots of all layers together.

    Raises:
        SpecmoeError: There are fewer than 0 slots, or more than experts.

    Example:
        >>> best_slots(np.array([[0, 5, 6, 7], [0, 0, 9, 10]]), 3).tolist()
        [1, 2]
    """
    layers, sizes = hits_LC.shape
    if not 0 <= total <= layers * (sizes - 1):
        raise SpecmoeError(f"{total} slots: expected 0 to {layers * (sizes - 1)}, which have room for every expert")
    slots_L: Integers = _allocate(np.ascontiguousarray(hits_LC, dtype=np.int64), total)
    return slots_L


def hits_of(hits_LC: npt.NDArray[np.int64], slots_L: Integers) -> int:
    """The hits of layers with these numbers of slots."""
    return int(hits_LC[np.arange(len(slots_L)), slots_L].sum())


@numba.njit(cache=True, nogil=True)
def _allocate(hits: Integers, total: int) -> Integers:
    layers, sizes = hits.shape
    # The most hits of the layers so far with exactly so many slots; negative if they have no room for so many.
    best = np.full(total + 1, -1, dtype=np.int64)
    best[0] = 0
    chosen = np.zeros((layers, total + 1), dtype=np.int32)
    for layer in range(layers):
        before = best.copy()
        best[:] = -1
        for slots in range(total + 1):
            for own in range(min(sizes - 1, slots) + 1):
                if before[slots - own] >= 0 and before[slots - own] + hits[layer, own] > best[slots]:
                    best[slots] = before[slots - own] + hits[layer, own]
                    chosen[layer, slots] = own
    found = np.zeros(layers, dtype=np.int64)
    left = total
    for layer in range(layers - 1, -1, -1):
        found[layer] = chosen[layer, left]
        left -= found[layer]
    return found
