"""What the task `reuse` predicts: how soon each expert is used again."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

# The time constant of the discount in tokens. With 4, 12 and 36 tokens, a cache of a quarter and of half of 32 experts kept
# nearly the same experts; a larger cache prefers a longer one.
FADE = 8.0
# Uses farther ahead than this many time constants count as none.
FARTHEST = 8


def discounted_use(
    expert_ids_TLK: npt.NDArray[Any],
    followers_T: npt.NDArray[np.int64],
    tokens_T: npt.NDArray[np.int64],
    experts: int,
    fade: float = FADE,
) -> npt.NDArray[np.float32]:
    """How soon every expert is used after a token, float32 `[T, L, E]`: `exp(-(n - 1) / fade)` for a next use n tokens later.

    The token's own use does not count. 0 if the expert is not used again in the stretch, or not within `FARTHEST` times `fade`.

    Args:
        expert_ids_TLK: The routes.
        followers_T: How many tokens of the same stretch follow each token.
        tokens_T: The tokens.
        experts: E.
        fade: The time constant in tokens.
    """
    found_TLE = np.zeros((len(tokens_T), expert_ids_TLK.shape[1], experts), dtype=np.float32)
    _look_ahead(expert_ids_TLK, followers_T, tokens_T, fade, found_TLE)
    return found_TLE


@numba.njit(cache=True, nogil=True)
def _look_ahead(
    ids: npt.NDArray[Any],
    followers: npt.NDArray[np.int64],
    tokens: npt.NDArray[np.int64],
    fade: float,
    out: npt.NDArray[np.float32],
) -> None:
    layers, top_k = ids.shape[1:]
    for n in range(len(tokens)):
        token = tokens[n]
        for ahead in range(1, min(followers[token], int(FARTHEST * fade)) + 1):
            value = np.exp(-(ahead - 1) / fade)
            for layer in range(layers):
                for k in range(top_k):
                    expert = ids[token + ahead, layer, k]
                    if out[n, layer, expert] == 0.0:
                        out[n, layer, expert] = value
