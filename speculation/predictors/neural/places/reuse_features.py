"""What the reuse of an expert is predicted from: its recent use, and what followed earlier occurrences of the same tokens."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from speculation.data.repeats import RUN_LENGTHS

# Tokens over which recent use fades, and how many tokens back it is summed.
FADES = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
WINDOW = 256
# Tokens over which the use after an earlier occurrence fades, and how many tokens after it are looked at.
MATCH_FADES = (3.0, 12.0, 48.0)
AFTER_MATCH = 96
# For each expert: faded sums, the time since the last use; and for each length of a run, whether it was used at the place of
# the match, and how soon after it.
FEATURES = len(FADES) + 1 + len(RUN_LENGTHS) * (1 + len(MATCH_FADES))
# Among them, the faded sum over 16 tokens; and for each run length, the use at the match and the use that fades over 12 tokens.
RECENT = FADES.index(16.0)
AT_MATCH = slice(len(FADES) + 1, FEATURES, 1 + len(MATCH_FADES))
SOON_AFTER = slice(len(FADES) + 3, FEATURES, 1 + len(MATCH_FADES))
# The weight of a use that many tokens after a match, `[AFTER_MATCH, len(MATCH_FADES)]`.
AFTER = np.exp(-np.arange(AFTER_MATCH)[:, None] / np.array(MATCH_FADES)).astype(np.float32)


def reuse_features(
    expert_ids_TLK: npt.NDArray[Any],
    first_T: npt.NDArray[np.int64],
    match_TR: npt.NDArray[np.int64],
    tokens_T: npt.NDArray[np.int64],
    experts: int,
) -> npt.NDArray[np.float32]:
    """The features of every expert before the routes of a token are known, float32 `[T, L, E, FEATURES]`.

    Args:
        expert_ids_TLK: The routes; only those of earlier tokens of the same stretch are read.
        first_T: The first token of each token's stretch.
        match_TR: For each token and run length, the latest earlier place where the same run of tokens ended; -1 without one.
        tokens_T: The tokens to compute the features of.
        experts: E.
    """
    layers = expert_ids_TLK.shape[1]
    found_TLEF = np.zeros((len(tokens_T), layers, experts, FEATURES), dtype=np.float32)
    _compute(expert_ids_TLK, first_T, match_TR, tokens_T, np.array(FADES), AFTER, found_TLEF)
    return found_TLEF


@numba.njit(cache=True, nogil=True)
def _compute(
    ids: npt.NDArray[Any],
    first: npt.NDArray[np.int64],
    match: npt.NDArray[np.int64],
    tokens: npt.NDArray[np.int64],
    fades: npt.NDArray[np.float64],
    after: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32],
) -> None:
    layers, top_k = ids.shape[1:]
    # The weight of a use that many tokens ago, as a mean per token.
    weights = np.empty((WINDOW, len(fades)), dtype=np.float32)
    for back in range(WINDOW):
        weights[back] = np.exp(-back / fades) / fades
    for n in range(len(tokens)):
        token = tokens[n]
        begin = max(first[token], token - WINDOW)
        for at in range(token - 1, begin - 1, -1):
            back = token - 1 - at
            for layer in range(layers):
                for k in range(top_k):
                    row = out[n, layer, ids[at, layer, k]]
                    if row[len(fades)] == 0.0:
                        row[len(fades)] = back + 1
                    for fade in range(len(fades)):
                        row[fade] += weights[back, fade]
        add_matches(ids, match[token], token, after, out[n])
        for layer in range(layers):
            for expert in range(out.shape[2]):
                row = out[n, layer, expert]
                for fade in range(len(fades)):
                    # Scaled to about -2 to 2.
                    row[fade] = np.log(row[fade] + np.float32(0.01)) + np.float32(2.5)
                since = row[len(fades)] if row[len(fades)] > 0 else np.float32(token - begin + 20)
                row[len(fades)] = np.log(since) - np.float32(2.0)


@numba.njit(cache=True, nogil=True)
def add_matches(
    ids: npt.NDArray[Any],
    match: npt.NDArray[np.int64],
    token: int,
    after: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32],
) -> None:
    """Add what followed earlier occurrences of a token to its features, which are zero there.

    Args:
        ids: The routes `[T, L, K]`.
        match: For each run length, the latest earlier place where the same run of tokens ended; -1 without one.
        token: The token.
        after: The weight of a use that many tokens after a match, `[AFTER_MATCH, len(MATCH_FADES)]`.
        out: The features `[L, E, FEATURES]`, changed.
    """
    layers, top_k = ids.shape[1:]
    per_run = 1 + after.shape[1]
    for run in range(len(match)):
        place = match[run]
        start = len(FADES) + 1 + run * per_run
        if place < 0:
            continue
        if run and match[run - 1] == place:
            # A longer run often ends at the same place.
            for layer in range(layers):
                for expert in range(out.shape[1]):
                    # Not as an array: numba would compile the text of an error about shapes, for four seconds.
                    for feature in range(start, start + per_run):
                        out[layer, expert, feature] = out[layer, expert, feature - per_run]
            continue
        for layer in range(layers):
            for k in range(top_k):
                out[layer, ids[place, layer, k], start] = 1.0
        for at in range(place + 1, min(token, place + 1 + len(after))):
            for layer in range(layers):
                for k in range(top_k):
                    row = out[layer, ids[at, layer, k]]
                    if row[start + 1] == 0.0:
                        for fade in range(after.shape[1]):
                            row[start + 1 + fade] = after[at - place - 1, fade]
