"""`recommended` one layer at a time: the same results as the network, without PyTorch's overhead for a single token."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from speculation.data.history import History
from speculation.predictors.neural.place_attention import LEAST_RANK

Array = npt.NDArray[np.float32]
# The weights of blocks: see `stacked`.
BlockWeights = tuple[Array, Array, Array, Array, Array, Array]
# The routes `[P, L, K]` at the places, whether they exist `[P]`, what they have in common with the token at the layers that are
# known `[P, L]`, and their scores `[G, L, P]` as far as they do not depend on the token's own routes.
PlaceArrays = tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], Array, Array]
EPSILON = 1e-5
# The linear layers whose sum, with the position, is the state before the first layer.
_KNOWN = ("tokens", "last_all", "recent_all")


class StreamWeights:
    """The weights of a `Recommended` network for single tokens, copied once for all sequences.

    Args:
        network: The `RecommendedNetwork`, for next-layer.
        little_use: See `recommended.LITTLE_USE`.
    """

    def __init__(self, network: Any, little_use: float) -> None:
        weights = network.state_dict().items()
        arrays = {name: np.ascontiguousarray(tensor.detach().cpu().float().numpy()) for name, tensor in weights}
        self.network, self.shape, self.little_use = network, network.shape, little_use
        self.arrays = arrays
        self.context = stacked(arrays, "context", 2)
        self.blocks = stacked(arrays, "blocks", self.shape.layers - 1)
        self.all = np.concatenate([arrays[f"{name}.weight"] for name in _KNOWN], axis=1)
        self.all_bias = np.sum([arrays[f"{name}.bias"] for name in _KNOWN], axis=0)
        # What the routes of a layer, and the use at places (the experts of all heads, then the confidences), add to the state.
        used_layer = np.concatenate([arrays["used_layer"], arrays["confidence"]], axis=1)[1:]
        self.added = (arrays["now.table"], np.ascontiguousarray(used_layer))
        rank_K = np.maximum(arrays["places.rank"], np.float32(LEAST_RANK))
        self.attention = (arrays["places.now"], rank_K / rank_K.mean())
        self.head = (arrays["norm_scale"][:, 0].copy(), arrays["head"], arrays["direct"], arrays["bias_LHE"])


class Stream:
    """Keeps the state of the current token of one sequence from layer to layer."""

    def __init__(self, weights: StreamWeights) -> None:
        self.weights = weights
        self.token, self.layer = -1, -1

    def logits(self, history: History, inputs: dict[str, npt.NDArray[Any]] | None) -> Array:
        """Logits `[H, E]` at the history's last known layer. inputs: `Recommended.inputs` of a new token, otherwise None."""
        if inputs is not None:
            self._begin(inputs)
            self.token, self.layer = history.tokens - 1, -1
        routes, weights = history.routes, self.weights
        ids_LK, weights_LK = routes.expert_ids_TLK[self.token], routes.weights_TLK[self.token].astype(np.float32)
        out_HE = np.zeros((weights.shape.horizon, weights.shape.experts), dtype=np.float32)
        while self.layer < history.layer:
            self.layer += 1
            _step(
                self.layer,
                ids_LK[self.layer].astype(np.int64),
                weights_LK[self.layer],
                self._state,
                self._hints[self.layer],
                self._places,
                weights.attention,
                weights.added,
                weights.blocks,
                weights.head,
                weights.little_use,
                out_HE,
            )
        return out_HE

    def _begin(self, inputs: dict[str, npt.NDArray[Any]]) -> None:
        weights, arrays, experts = self.weights, self.weights.arrays, self.weights.shape.experts
        last_LD = _embedded(inputs["last_ids"][0], inputs["last_weights"][0], arrays["last.table"], experts)
        recent = inputs["recent"][0]
        by_layer = np.ascontiguousarray(recent.transpose(1, 0, 2)).reshape(recent.shape[1], 1, -1)
        hints_LD = last_LD + np.matmul(by_layer, arrays["recent_layer"])[:, 0]
        recent_WD = recent.reshape(len(recent), -1) @ arrays["last.table"]
        known = [arrays["token.weight"][inputs["rows"][0]].ravel(), last_LD.sum(0), recent_WD.ravel()]
        state = weights.all @ np.concatenate(known) + weights.all_bias
        state += arrays["position.weight"][int(inputs["position"][0])]
        for number in range(len(weights.context[0])):
            add_block(state, state, number, *weights.context)
        self._state, self._hints = state, np.ascontiguousarray(hints_LD[1:])
        # The scores of the places as far as they do not depend on the token's own routes.
        facts_PF, last_PL = inputs["place_facts"][0], inputs["place_last"][0]
        hidden = facts_PF @ arrays["places.rise.weight"].T + arrays["places.rise.bias"]
        small = _gelu(hidden) @ arrays["places.fall.weight"].T + arrays["places.fall.bias"]
        facts_PG = facts_PF @ arrays["places.facts"].T + small
        scores_GLP = np.ascontiguousarray(arrays["places.last"] @ last_PL.T + facts_PG.T[:, None])
        ids_PLK, exists_P = inputs["place_ids"][0, :, 0], inputs["place_exists"][0, :, 0]
        self._places = (ids_PLK, exists_P, np.zeros_like(last_PL), scores_GLP)


def stacked(arrays: dict[str, Array], name: str, count: int) -> BlockWeights:
    """The weights of `count` blocks called `name.0`, `name.1`, ..., stacked: what `add_block` takes."""
    parts = ("norm.weight", "norm.bias", "rise.weight", "rise.bias", "fall.weight", "fall.bias")
    scale, shift, rise, rise_b, fall, fall_b = (
        np.stack([arrays[f"{name}.{number}.{part}"] for number in range(count)]) for part in parts
    )
    return scale, shift, rise, rise_b, fall, fall_b


@numba.njit(cache=True, nogil=True, fastmath=True)
def _embedded(ids_LK: npt.NDArray[np.int64], weights_LK: Array, table: Array, experts: int) -> Array:
    layers, top_k = ids_LK.shape
    out = np.zeros((layers, table.shape[1]), dtype=np.float32)
    for layer in range(layers):
        for k in range(top_k):
            out[layer] += weights_LK[layer, k] * table[layer * experts + ids_LK[layer, k]]
    return out


@numba.njit(cache=True, nogil=True, fastmath=True)
def normalized(values: Array) -> Array:
    """A state `[D]` with mean 0 and variance 1: a LayerNorm without its scale and shift."""
    centered = values - np.float32(values.mean())
    deviation = math.sqrt((centered * centered).mean() + EPSILON)
    scaled: Array = centered * np.float32(1 / deviation)
    return scaled


@numba.njit(cache=True, nogil=True, fastmath=True)
def _gelu(hidden: Array) -> Array:
    out = np.empty_like(hidden)
    for i in range(hidden.size):
        value = hidden.flat[i]
        out.flat[i] = value * np.float32(0.5) * (np.float32(1) + np.float32(math.erf(value * np.float32(math.sqrt(0.5)))))
    return out


@numba.njit(cache=True, nogil=True, fastmath=True)
def _attend(
    layer: int, ids_K: npt.NDArray[np.int64], places: PlaceArrays, attention: tuple[Array, Array], used: Array
) -> Array:
    """Write the use `[H, G, E]` at the places at the layers after this one; return the confidences `[G * 2]`."""
    place_ids, exists, common, scores = places
    now, rank = attention
    count, layers, top_k = place_ids.shape
    horizon, heads = used.shape[:2]
    used[:] = 0
    confidence = np.zeros(2 * heads, dtype=np.float32)
    for p in range(count):
        same = 0
        for k in range(top_k):
            for j in range(top_k):
                same += ids_K[k] == place_ids[p, layer, j]
        common[p, layer] = same / top_k
    share = np.empty(count, dtype=np.float32)
    for head in range(heads):
        # The score of "none of them" is 0.
        highest = np.float32(0)
        for p in range(count):
            share[p] = scores[head, layer, p]
            for known in range(layer + 1):
                share[p] += now[head, layer, known] * common[p, known]
            if exists[p]:
                highest = max(highest, share[p])
        total = math.exp(-highest)
        for p in range(count):
            share[p] = math.exp(share[p] - highest) if exists[p] else np.float32(0)
            total += share[p]
        for p in range(count):
            share[p] /= total
            for hop in range(min(horizon, layers - 1 - layer)):
                for k in range(top_k):
                    used[hop, head, place_ids[p, layer + hop + 1, k]] += share[p] * rank[k]
        confidence[2 * head] = math.tanh((highest + math.log(total)) / 10)
        confidence[2 * head + 1] = share.max()
    return confidence


@numba.njit(cache=True, nogil=True, fastmath=True)
def add_block(
    state: Array, seen: Array, n: int, scale: Array, shift: Array, rise: Array, rise_b: Array, fall: Array, fall_b: Array
) -> None:
    """Add what block n computes from `seen` `[D]` to `state` `[D]`."""
    hidden = _gelu(np.dot(rise[n], normalized(seen) * scale[n] + shift[n]) + rise_b[n])
    state += np.dot(fall[n], hidden) + fall_b[n]


@numba.njit(cache=True, nogil=True, fastmath=True)
def _step(
    layer: int,
    ids_K: npt.NDArray[np.int64],
    weights_K: Array,
    state: Array,
    hint: Array,
    places: PlaceArrays,
    attention: tuple[Array, Array],
    added: tuple[Array, Array],
    block: BlockWeights,
    head: tuple[Array, Array, Array, Array],
    little_use: float,
    out: Array,
) -> None:
    """Add a layer to the state, and write the logits `[H, E]` of the layers after it to `out`."""
    horizon, experts = out.shape
    now, used_layer = added
    norm_scale, weights, direct, bias = head
    heads = direct.shape[2]
    inputs = np.empty(used_layer.shape[1], dtype=np.float32)
    used = np.zeros((horizon, heads, experts), dtype=np.float32)
    inputs[heads * experts :] = _attend(layer, ids_K, places, attention, used)
    inputs[: heads * experts] = used[0].ravel()
    total = max(weights_K.sum(), np.float32(1e-6))
    for k in range(len(ids_K)):
        state += weights_K[k] / total * now[layer * experts + ids_K[k]]
    hint = hint + np.dot(inputs, used_layer[layer])
    add_block(state, state + hint, layer, *block)
    out[:] = np.dot(normalized(state + hint) * norm_scale[layer], weights[layer]).reshape(horizon, experts) + bias[layer]
    for hop in range(horizon):
        for g in range(heads):
            for expert in range(experts):
                if used[hop, g, expert] > 0:
                    out[hop, expert] += direct[layer, hop, g] * math.log1p(used[hop, g, expert] / little_use)
