"""Features that several predictors compute from routes: expert frequency, last known token, recent use, frequent tokens."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from analysis.counts.kernels import HALVES
from analysis.counts.load import count_experts
from profiler.errors import SpecmoeError
from speculation.data.repeats import UNKNOWN_TOKEN
from speculation.data.routes import Routes, RouteSource, each_group
from speculation.data.tasks import Shape, Task
from speculation.predictors.base import Arrays

# Keeps the log-odds of experts that are never or always used finite.
SMALLEST_PROBABILITY = 1e-4


def log_odds(probability: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
    """The log-odds of probabilities, elementwise; those of 0 and 1 are finite."""
    clipped = np.clip(probability, SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    return np.asarray(np.log(clipped / (1 - clipped)))


def recent_use(
    routes: Routes, tokens_T: npt.NDArray[np.int64], known_T: npt.NDArray[np.int64], experts: int, windows: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """The mean relative weight of each expert over the last known tokens of the stretch, `[T, W, L, E]`.

    tokens_T: the tokens to compute it for. known_T: for each, the last token whose routes are known, or -1. windows: the W
    window lengths in ascending order; each window holds at most that many tokens.
    """
    layers = routes.expert_ids_TLK.shape[1]
    use_TWLE = np.zeros((len(tokens_T), len(windows), layers, experts), dtype=np.float32)
    _add_recent(
        routes.expert_ids_TLK,
        routes.weights_TLK.view(np.uint16),
        HALVES,
        known_T,
        routes.first_T[tokens_T],
        np.array(windows),
        use_TWLE,
    )
    return use_TWLE


@numba.njit(cache=True, nogil=True)
def _add_recent(
    ids: npt.NDArray[Any],
    weight_bits: npt.NDArray[np.uint16],
    halves: npt.NDArray[np.float64],
    known_T: npt.NDArray[np.int64],
    first_T: npt.NDArray[np.int64],
    windows: npt.NDArray[np.int64],
    use: npt.NDArray[np.float32],
) -> None:
    layers, top_k = ids.shape[1:]
    for n in range(len(known_T)):
        last = known_T[n]
        if last < 0:
            continue
        begin = last + 1
        for w in range(len(windows)):
            # Each window continues from the sums of the shorter one.
            end, begin = begin, max(first_T[n], last + 1 - windows[w])
            if w > 0:
                use[n, w] = use[n, w - 1]
            for t in range(begin, end):
                for layer in range(layers):
                    total = 1e-6
                    for k in range(top_k):
                        total += halves[weight_bits[t, layer, k]]
                    for k in range(top_k):
                        use[n, w, layer, ids[t, layer, k]] += halves[weight_bits[t, layer, k]] / total
        for w in range(len(windows)):
            use[n, w] /= np.float32(last + 1 - max(first_T[n], last + 1 - windows[w]))


def frequent_tokens(source: RouteSource, max_tokens: int, min_count: int) -> npt.NDArray[np.int64]:
    """The keys of the `max_tokens` most frequent tokens that occur at least `min_count` times, ascending."""
    found = [np.unique(routes.token_keys_T, return_counts=True) for routes in each_group(source)]
    keys, place_N = np.unique(np.concatenate([keys for keys, _ in found]), return_inverse=True)
    counts = np.bincount(place_N, np.concatenate([counts for _, counts in found]), len(keys)).astype(np.int64)
    keys, counts = keys[keys != UNKNOWN_TOKEN], counts[keys != UNKNOWN_TOKEN]
    keys, counts = keys[counts >= min_count], counts[counts >= min_count]
    return np.sort(keys[np.argsort(-counts, kind="stable")[: max(0, max_tokens)]])


def token_rows(keys: npt.NDArray[np.int64], token_keys_T: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The table row of each token: 1 + its index in `keys` (ascending), or 0 if it is not in `keys`."""
    if not len(keys):
        return np.zeros(len(token_keys_T), dtype=np.int64)
    found_T = np.minimum(np.searchsorted(keys, token_keys_T), len(keys) - 1)
    return np.where(keys[found_T] == token_keys_T, found_T + 1, 0)


def stored_keys(arrays: Arrays, max_tokens: int) -> npt.NDArray[np.int64]:
    """The token keys of a stored predictor. Raises `SpecmoeError` if they are invalid, or more than `max_tokens`."""
    keys = arrays.get("keys")
    if keys is None or keys.ndim != 1 or keys.dtype != np.int64 or len(keys) > max_tokens or (np.diff(keys) <= 0).any():
        raise SpecmoeError(f"stored predictor: expected 'keys' of at most {max_tokens} tokens, ascending")
    return keys


def expert_frequency(source: RouteSource, shape: Shape) -> npt.NDArray[np.float32]:
    """The share of tokens that select each expert, `[L, E]`; each row sums to K."""
    counts_LE = sum(count_experts(routes.expert_ids_TLK, shape.experts) for routes in each_group(source))
    return np.asarray(counts_LE / len(source), dtype=np.float32)


def at_targets(values_LX: npt.NDArray[Any], shape: Shape) -> npt.NDArray[Any]:
    """Arrange values by layer `[L, ...]` by the predictions about it `[L, H, ...]`; zero if the target layer does not exist."""
    ahead_LHX = np.zeros((shape.layers, shape.horizon, *values_LX.shape[1:]), dtype=values_LX.dtype)
    for hop in range(1, shape.horizon + 1):
        layers_L = shape.target_layers(hop)
        ahead_LHX[layers_L >= 0, hop - 1] = values_LX[layers_L[layers_L >= 0]]
    return ahead_LHX


def last_known(routes: Routes, shape: Shape, tokens_T: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """For each token, the index of the last token whose routes the task sees at every layer; -1 if no token is known yet."""
    return tokens_T if shape.task == Task.NEXT_TOKEN else routes.previous_T[tokens_T]
