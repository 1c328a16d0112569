"""`recommended` one layer at a time: the same results as the network, without PyTorch's overhead for a single token."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from speculation.data.history import History

Array = npt.NDArray[np.float32]
EPSILON = 1e-5
# The linear layers whose sum, with the position, is the state before the first layer.
_KNOWN = ("tokens", "last_all", "recent_all")


class Stream:
    """Keeps the state of the current token of one sequence from layer to layer.

    Args:
        predictor: The `Recommended` to compute.
        little_use: See `recommended.LITTLE_USE`.
    """

    def __init__(self, predictor: Any, little_use: float) -> None:
        weights = predictor.network.state_dict().items()
        arrays = {name: np.ascontiguousarray(tensor.detach().cpu().float().numpy()) for name, tensor in weights}
        shape = predictor.shape
        self.predictor = predictor
        self._arrays = arrays
        self._shape, self._little_use = shape, little_use
        self._context = stacked(arrays, "context", 2)
        self._blocks = stacked(arrays, "blocks", shape.layers - 1)
        self._all = np.concatenate([arrays[f"{name}.weight"] for name in _KNOWN], axis=1)
        self._all_bias = np.sum([arrays[f"{name}.bias"] for name in _KNOWN], axis=0)
        # What the use at places adds to the state: the experts of both heads, then the confidences.
        self._used_layer = np.concatenate([arrays["used_layer"], arrays["confidence"]], axis=1)[1:]
        self._rank = arrays["places.rank"] / arrays["places.rank"].mean()
        self.token, self.layer = -1, -1

    def logits(self, history: History, inputs: dict[str, npt.NDArray[Any]] | None) -> Array:
        """Logits `[H, E]` at the history's last known layer. inputs: `Recommended.inputs` of a new token, otherwise None."""
        if inputs is not None:
            self._begin(inputs)
            self.token, self.layer = history.tokens - 1, -1
        arrays, shape = self._arrays, self._shape
        routes = history.routes
        ids_LK, weights_LK = routes.expert_ids_TLK[self.token], routes.weights_TLK[self.token].astype(np.float32)
        used_HGE = np.zeros((shape.horizon, len(self._scores_GLP), shape.experts), dtype=np.float32)
        while self.layer < history.layer:
            self.layer += 1
            layer = self.layer
            ids_K = ids_LK[layer].astype(np.int64)
            confidence = _attend(
                layer,
                ids_K,
                self._place_ids,
                self._exists_P,
                self._common_PL,
                self._scores_GLP,
                arrays["places.now"],
                self._rank,
                used_HGE,
            )
            hint = self._hints[layer] + np.concatenate([used_HGE[0].ravel(), confidence]) @ self._used_layer[layer]
            out = _step(
                layer,
                self._state,
                hint,
                ids_K + layer * shape.experts,
                weights_LK[layer],
                arrays["now.table"],
                *self._blocks,
                arrays["norm_scale"],
                arrays["head"],
            )
        direct_HE = np.einsum("hge,hg->he", np.log1p(used_HGE / np.float32(self._little_use)), arrays["direct"][layer])
        return np.asarray(out.reshape(direct_HE.shape) + direct_HE + arrays["bias_LHE"][self.layer])

    def _begin(self, inputs: dict[str, npt.NDArray[Any]]) -> None:
        arrays, experts = self._arrays, self._shape.experts
        last_LD = _embedded(inputs["last_ids"][0], inputs["last_weights"][0], arrays["last.table"], experts)
        recent = inputs["recent"][0]
        by_layer = np.ascontiguousarray(recent.transpose(1, 0, 2)).reshape(recent.shape[1], 1, -1)
        hints_LD = last_LD + np.matmul(by_layer, arrays["recent_layer"])[:, 0]
        recent_WD = recent.reshape(len(recent), -1) @ arrays["last.table"]
        known = [arrays["token.weight"][inputs["rows"][0]].ravel(), last_LD.sum(0), recent_WD.ravel()]
        state = self._all @ np.concatenate(known) + self._all_bias
        state += arrays["position.weight"][int(inputs["position"][0])]
        for number in range(len(self._context[0])):
            add_block(state, state, number, *self._context)
        self._state, self._hints = state, np.ascontiguousarray(hints_LD[1:])
        # The scores of the places as far as they do not depend on the token's own routes.
        facts_PF, last_PL = inputs["place_facts"][0], inputs["place_last"][0]
        hidden = facts_PF @ arrays["places.rise.weight"].T + arrays["places.rise.bias"]
        small = _gelu(hidden) @ arrays["places.fall.weight"].T + arrays["places.fall.bias"]
        facts_PG = facts_PF @ arrays["places.facts"].T + small
        self._scores_GLP = np.ascontiguousarray(arrays["places.last"] @ last_PL.T + facts_PG.T[:, None])
        self._place_ids = inputs["place_ids"][0, :, 0]
        self._exists_P = inputs["place_exists"][0, :, 0]
        self._common_PL = np.zeros_like(last_PL)


def stacked(arrays: dict[str, Array], name: str, count: int) -> tuple[Array, ...]:
    """The weights of `count` blocks called `name.0`, `name.1`, ..., stacked: what `add_block` takes."""
    parts = ("norm.weight", "norm.bias", "rise.weight", "rise.bias", "fall.weight", "fall.bias")
    return tuple(np.stack([arrays[f"{name}.{number}.{part}"] for number in range(count)]) for part in parts)


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
    layer: int,
    ids_K: npt.NDArray[np.int64],
    place_ids: npt.NDArray[np.int64],
    exists: npt.NDArray[np.bool_],
    common: Array,
    scores: Array,
    now: Array,
    rank: Array,
    used: Array,
) -> Array:
    """Write the use `[H, G, E]` at the places at the layers after this one; return the confidences `[G * 2]`."""
    places, layers, top_k = place_ids.shape
    horizon, heads = used.shape[:2]
    used[:] = 0
    confidence = np.zeros(2 * heads, dtype=np.float32)
    for p in range(places):
        same = 0
        for k in range(top_k):
            for j in range(top_k):
                same += ids_K[k] == place_ids[p, layer, j]
        common[p, layer] = same / top_k
    share = np.empty(places, dtype=np.float32)
    for head in range(heads):
        # The score of "none of them" is 0.
        highest = np.float32(0)
        for p in range(places):
            share[p] = scores[head, layer, p]
            for known in range(layer + 1):
                share[p] += now[head, layer, known] * common[p, known]
            if exists[p]:
                highest = max(highest, share[p])
        total = math.exp(-highest)
        for p in range(places):
            share[p] = math.exp(share[p] - highest) if exists[p] else np.float32(0)
            total += share[p]
        for p in range(places):
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
    state: Array,
    hint: Array,
    rows: npt.NDArray[np.int64],
    weights: Array,
    now: Array,
    scale: Array,
    shift: Array,
    rise: Array,
    rise_b: Array,
    fall: Array,
    fall_b: Array,
    norm_scale: Array,
    head: Array,
) -> Array:
    total = max(weights.sum(), np.float32(1e-6))
    for k in range(len(rows)):
        state += weights[k] / total * now[rows[k]]
    add_block(state, state + hint, layer, scale, shift, rise, rise_b, fall, fall_b)
    logits: Array = np.dot(normalized(state + hint) * norm_scale[layer, 0], head[layer])
    return logits
