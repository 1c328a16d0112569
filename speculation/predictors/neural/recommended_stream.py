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


class Stream:
    """Keeps the state of the current token of one sequence from layer to layer. predictor: the `Recommended` to compute."""

    def __init__(self, predictor: Any) -> None:
        weights = predictor.network.state_dict().items()
        arrays = {name: np.ascontiguousarray(tensor.detach().cpu().float().numpy()) for name, tensor in weights}
        self.predictor = predictor
        self._arrays = arrays
        self._experts, self._horizon = predictor.shape.experts, predictor.shape.horizon
        self._context = stacked(arrays, "context", 2)
        self._blocks = stacked(arrays, "blocks", predictor.shape.layers - 1)
        self._all = np.concatenate(
            [arrays["tokens.weight"], arrays["last_all.weight"], arrays["match_all.weight"], 5 * arrays["recent_all.weight"]],
            axis=1,
        )
        names = ("tokens", "last_all", "match_all", "recent_all")
        self._all_bias = np.sum([arrays[f"{name}.bias"] for name in names], axis=0)
        self.token, self.layer = -1, -1

    def logits(self, history: History, inputs: dict[str, npt.NDArray[Any]] | None) -> Array:
        """Logits `[H, E]` at the history's last known layer. inputs: `Recommended.inputs` of a new token, otherwise None."""
        if inputs is not None:
            self._begin(inputs)
            self.token, self.layer = history.tokens - 1, -1
        arrays = self._arrays
        routes = history.routes
        ids_LK, weights_LK = routes.expert_ids_TLK[self.token], routes.weights_TLK[self.token].astype(np.float32)
        while self.layer < history.layer:
            self.layer += 1
            out = _step(
                self.layer,
                self._state,
                self._hints,
                ids_LK[self.layer].astype(np.int64) + self.layer * self._experts,
                weights_LK[self.layer],
                arrays["now.table"],
                *self._blocks,
                arrays["norm_scale"],
                arrays["head"],
            )
        return np.asarray(out.reshape(self._horizon, self._experts) + arrays["bias_LHE"][self.layer])

    def _begin(self, inputs: dict[str, npt.NDArray[Any]]) -> None:
        arrays = self._arrays
        order = int(inputs["order"][0])
        last_LD = _embedded(inputs["last_ids"][0], inputs["last_weights"][0], arrays["last.table"], self._experts)
        match_LD = _embedded(inputs["match_ids"][0, 0], inputs["match_weights"][0, 0], arrays["matches.0.table"], self._experts)
        match_LD *= arrays["trust"][order]
        recent = inputs["recent"][0]
        by_layer = np.ascontiguousarray(recent.transpose(1, 0, 2)).reshape(recent.shape[1], 1, -1)
        hints_LD = last_LD + match_LD + np.matmul(by_layer, arrays["recent_layer"])[:, 0]
        known = [arrays["token.weight"][inputs["rows"][0]].ravel(), last_LD.sum(0), match_LD.sum(0), recent.ravel()]
        state = self._all @ np.concatenate(known) + self._all_bias
        state += arrays["order.weight"][order] + arrays["position.weight"][int(inputs["position"][0])]
        for number in range(len(self._context[0])):
            add_block(state, state, number, *self._context)
        self._state, self._hints = state, np.ascontiguousarray(hints_LD[1:])


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
def add_block(
    state: Array, seen: Array, n: int, scale: Array, shift: Array, rise: Array, rise_b: Array, fall: Array, fall_b: Array
) -> None:
    """Add what block n computes from `seen` `[D]` to `state` `[D]`."""
    hidden = np.dot(rise[n], normalized(seen) * scale[n] + shift[n]) + rise_b[n]
    for i in range(len(hidden)):
        hidden[i] *= np.float32(0.5) * (np.float32(1) + np.float32(math.erf(hidden[i] * np.float32(math.sqrt(0.5)))))
    state += np.dot(fall[n], hidden) + fall_b[n]


@numba.njit(cache=True, nogil=True, fastmath=True)
def _step(
    layer: int,
    state: Array,
    hints: Array,
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
    add_block(state, state + hints[layer], layer, scale, shift, rise, rise_b, fall, fall_b)
    logits: Array = np.dot(normalized(state + hints[layer]) * norm_scale[layer, 0], head[layer])
    return logits
