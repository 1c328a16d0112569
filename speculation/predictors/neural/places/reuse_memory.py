"""The routes of training texts, looked up by the tokens of a new text: what was used after the same tokens there."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from speculation.data.repeats import UNKNOWN_TOKEN
from speculation.data.routes import Routes
from speculation.predictors.neural.places.text_memory import TextMemory

# Lengths of the runs of tokens that are looked up, and how many places are looked at for each.
LENGTHS = (1, 2, 3, 5)
PLACES = 16
# Tokens over which the use after a place fades, and how many tokens after it are looked at.
FADES = (3.0, 12.0)
AFTER_PLACE = 32
# For each length of a run, means over its places: whether the expert was used there, and how soon after it; and the number of
# places, which says how far to trust them.
PER_LENGTH = 1 + len(FADES) + 1
MEMORY_FEATURES = len(LENGTHS) * PER_LENGTH
_AFTER = np.exp(-np.arange(AFTER_PLACE)[:, None] / np.array(FADES)).astype(np.float32)
# As in `speculation.data.repeats`.
_MIX, _SPREAD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


class ReuseMemory(TextMemory):
    """Looks up the runs of tokens that end at a token, and what was used at and after the same runs in the texts."""

    @cached_property
    def _sorted(self) -> list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]]:
        """For each length, the hashes of all runs in ascending order, and where each ends."""
        hashes_MG, is_run_MG = _hashes(self.keys_M, self.first_M, np.arange(len(self.keys_M)))
        found = []
        for number in range(len(LENGTHS)):
            places = np.flatnonzero(is_run_MG[:, number])
            order = np.argsort(hashes_MG[places, number], kind="stable")
            found.append((hashes_MG[places[order], number], places[order]))
        return found

    def places(
        self, routes: Routes, tokens_T: npt.NDArray[np.int64], without_T: npt.NDArray[np.int32] | None = None
    ) -> npt.NDArray[np.int64]:
        """Where the runs of tokens that end at these tokens end in the memory, int64 `[T, len(LENGTHS), PLACES]`; -1 for none.

        If a run occurs more often, the places are spread evenly over all of them.

        Args:
            routes: The text that is looked up. Only its tokens are read, not its routes.
            tokens_T: The tokens.
            without_T: For each token, a problem in which nothing is looked up.
        """
        hashes_TG, is_run_TG = _hashes(routes.token_keys_T, routes.first_T, tokens_T)
        found_TGP = np.full((len(tokens_T), len(LENGTHS), PLACES), -1, dtype=np.int64)
        for number, (hashes, ends) in enumerate(self._sorted):
            begin_T, end_T = (np.searchsorted(hashes, hashes_TG[:, number], side) for side in ("left", "right"))
            count_T = np.where(is_run_TG[:, number], end_T - begin_T, 0)
            for place in range(PLACES):
                at_T = begin_T + place * np.maximum(count_T, PLACES) // PLACES
                has_T = place < count_T
                found_TGP[has_T, number, place] = ends[at_T[has_T]]
        if without_T is not None and len(self.keys_M):
            is_own_TGP = self.problem_ids_M[found_TGP] == without_T[:, None, None]
            found_TGP[is_own_TGP] = -1
        return found_TGP

    def add_features(self, places_TGP: npt.NDArray[np.int64], out_TLEF: npt.NDArray[np.float32]) -> None:
        """Add what followed these places to features of zeros, float32 `[T, L, E, MEMORY_FEATURES]`."""
        _add(self.expert_ids_MLK, self.ends_M, places_TGP, _AFTER, out_TLEF)


def _hashes(
    keys_T: npt.NDArray[np.int64], first_T: npt.NDArray[np.int64], tokens_N: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """Hashes of the runs that end at these tokens, for each length `[N, G]`, and whether there is a run of known tokens."""
    hash_N = np.zeros(len(tokens_N), dtype=np.uint64)
    is_run_N = np.ones(len(tokens_N), dtype=np.bool_)
    hashes, are_runs = [], []
    for back in range(LENGTHS[-1]):
        at_N = np.maximum(tokens_N - back, 0)
        is_run_N = is_run_N & (tokens_N - back >= first_T[tokens_N]) & (keys_T[at_N] != UNKNOWN_TOKEN)
        hash_N = (hash_N * _MIX) ^ (keys_T[at_N].astype(np.uint64) * _SPREAD)
        hash_N ^= hash_N >> np.uint64(29)
        if back + 1 in LENGTHS:
            hashes.append(hash_N)
            are_runs.append(is_run_N)
    return np.stack(hashes, axis=1), np.stack(are_runs, axis=1)


@numba.njit(cache=True, nogil=True)
def _add(
    ids: npt.NDArray[Any],
    ends: npt.NDArray[np.int64],
    places: npt.NDArray[np.int64],
    after: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32],
) -> None:
    layers, top_k = ids.shape[1:]
    experts = out.shape[2]
    # The latest place after which each expert was seen.
    seen = np.full((layers, experts), -1, dtype=np.int64)
    stamp = 0
    for n in range(len(places)):
        for number in range(places.shape[1]):
            count = 0
            for place in places[n, number]:
                count += place >= 0
            if not count:
                continue
            start, share = number * (2 + after.shape[1]), np.float32(1 / count)
            for place in places[n, number]:
                if place < 0:
                    continue
                stamp += 1
                for layer in range(layers):
                    for k in range(top_k):
                        out[n, layer, ids[place, layer, k], start] += share
                for at in range(place + 1, min(ends[place], place + 1 + len(after))):
                    for layer in range(layers):
                        for k in range(top_k):
                            expert = ids[at, layer, k]
                            if seen[layer, expert] != stamp:
                                seen[layer, expert] = stamp
                                for fade in range(after.shape[1]):
                                    out[n, layer, expert, start + 1 + fade] += share * after[at - place - 1, fade]
            out[n, :, :, start + 1 + after.shape[1]] = np.log1p(np.float32(count))
