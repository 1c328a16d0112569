"""`recommended` for one token at a time: the same results as the network, without PyTorch's overhead for a single token."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from speculation.data.history import History, Prediction
from speculation.data.ranking import rank_experts
from speculation.data.tasks import Task
from speculation.predictors.neural.places.place_attention import LEAST_RANK
from speculation.predictors.neural.streams.single_token import (
    Array,
    BlockWeights,
    Matrix,
    add_block,
    add_product,
    add_row,
    add_rows,
    apply_gelu,
    half_bits,
    layer_norm,
    stacked,
)

# The linear layers whose sum, with the position, is the state before the first layer.
_KNOWN = ("tokens", "last_all", "recent_all")
# Of the places: their routes `[P, S, L, K]`, whether they exist `[P, S]`, what they have in common with the token at the layers
# that are known `[P, L]`, and their scores `[G, L, P]` as far as they do not depend on the token's own routes.
Places = tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], Array, Array]


class StreamWeights:
    """The weights of a `Recommended` network for single tokens, copied once for all sequences.

    Args:
        network: The `RecommendedNetwork`.
        little_use: See `recommended.LITTLE_USE`.
    """

    def __init__(self, network: Any, little_use: float) -> None:
        weights = network.state_dict().items()
        arrays = {name: np.ascontiguousarray(tensor.detach().cpu().float().numpy()) for name, tensor in weights}
        self.network, self.shape, self.steps, self.little_use = network, network.shape, network.steps, np.float32(little_use)
        # For next-layer, layer l predicts layers from l + 1 on, and sees the hints about layer l + 1.
        self.ahead = int(self.shape.task == Task.NEXT_LAYER)
        self.layers = network.layers
        nothing = np.zeros((1, self.shape.layers, self.shape.layers), dtype=np.float32)
        about = slice(self.ahead, None)
        rank_K = np.maximum(arrays["places.rank"], np.float32(LEAST_RANK))
        # What the routes of the token itself, and the use at places (of all steps and heads; then the confidences), add to the
        # state.
        used = np.concatenate([arrays["used_layer"], arrays["confidence"]], axis=1)[about]
        context, blocks = stacked(arrays, "context", 2), stacked(arrays, "blocks", self.layers)
        table, recent, known, used, head, *rises_and_falls = half_bits(
            arrays["last.table"],
            np.ascontiguousarray(arrays["recent_layer"][about]),
            np.concatenate([arrays[f"{name}.weight"] for name in _KNOWN], axis=1),
            np.ascontiguousarray(used),
            np.ascontiguousarray(arrays["head"].transpose(0, 2, 1)),
            *(each for block in (context, blocks) for each in (block[2], block[4])),
        )
        known_bias = np.sum([arrays[f"{name}.bias"] for name in _KNOWN], axis=0)
        self.begin = (table, recent, known, known_bias, arrays["token.weight"], arrays["position.weight"])
        self.context, self.blocks = (
            (scale, shift, rises_and_falls[2 * n], rise_b, rises_and_falls[2 * n + 1], fall_b)
            for n, (scale, shift, _, rise_b, _, fall_b) in enumerate((context, blocks))
        )
        self.scores = tuple(
            arrays[f"places.{name}"] for name in ("last", "facts", "rise.weight", "rise.bias", "fall.weight", "fall.bias")
        )
        self.attention = (arrays.get("places.now", nothing), rank_K / rank_K.mean())
        self.added = (arrays.get("now.table", nothing[0]), used)
        self.head = (arrays["norm_scale"][:, 0].copy(), head, arrays["direct"], arrays["bias_LHE"])


class Stream:
    """Keeps the state of the current token of one sequence from layer to layer."""

    def __init__(self, weights: StreamWeights) -> None:
        self.weights = weights
        self.token, self.layer = -1, -1

    def begin(self, token: int, inputs: dict[str, npt.NDArray[Any]]) -> None:
        """Start a token. inputs: what `Recommended.inputs` returns for this single token; its own routes may be missing."""
        weights = self.weights
        self.token, self.layer = token, -1
        self._state, self._hints, scores_GLP = _begin(
            *(inputs[name][0] for name in ("last_ids", "last_weights", "recent", "rows")),
            int(inputs["position"][0]),
            inputs["place_facts"][0],
            inputs["place_last"][0],
            weights.begin,
            weights.context,
            weights.scores,
            weights.layers,
        )
        self._places = (inputs["place_ids"][0], inputs["place_exists"][0], np.zeros_like(inputs["place_last"][0]), scores_GLP)

    def next_layer(self, history: History) -> Prediction:
        """For next-layer: the experts of the layers after the history's last known layer."""
        shape, routes = self.weights.shape, history.routes
        ids_LK, weights_LK = routes.expert_ids_TLK[self.token], routes.weights_TLK[self.token]
        while self.layer < history.layer - 1:
            self._step(ids_LK, weights_LK, 0)
        return self._step(ids_LK, weights_LK, min(shape.horizon, shape.layers - 1 - history.layer))

    def all_layers(self) -> Prediction:
        """For the other tasks: the experts of every layer."""
        shape = self.weights.shape
        nothing = np.zeros((shape.layers, 0), dtype=np.uint8), np.zeros((shape.layers, 0), dtype=np.float16)
        layers = [self._step(*nothing, shape.horizon) for _ in range(shape.layers)]
        return Prediction(np.stack([layer.expert_ids for layer in layers]), np.stack([layer.scores for layer in layers]))

    def _step(self, ids_LK: npt.NDArray[Any], weights_LK: npt.NDArray[np.float16], hops: int) -> Prediction:
        """Add a layer to the state, and predict so many hops."""
        self.layer += 1
        weights, layer = self.weights, self.layer
        size = (hops, weights.shape.experts)
        found = Prediction(np.empty(size, dtype=np.int64), np.empty(size, dtype=np.float32))
        _step(
            layer,
            weights.ahead,
            ids_LK[layer].astype(np.int64),
            weights_LK[layer].astype(np.float32),
            self._state,
            self._hints[layer],
            self._places,
            weights.attention,
            weights.added,
            weights.blocks,
            weights.head,
            weights.little_use,
            found.expert_ids,
            found.scores,
        )
        return found


@numba.njit(cache=True, nogil=True, fastmath=True)
def _begin(
    last_ids: npt.NDArray[np.int64],
    last_weights: Array,
    recent: Array,
    rows: npt.NDArray[np.int64],
    position: int,
    facts: Array,
    last_common: Array,
    weights: tuple[Matrix, Matrix, Matrix, Array, Array, Array],
    context: BlockWeights,
    score_weights: tuple[Array, Array, Array, Array, Array, Array],
    predicted: int,
) -> tuple[Array, Array, Array]:
    """The state `[D]` before the first layer, the hints for each layer `[L, D]`, and the scores of the places `[G, L, P]`."""
    table, recent_layer, known, known_bias, token, position_table = weights
    layers, top_k = last_ids.shape
    windows, _, experts = recent.shape
    width, token_width = table.shape[1], token.shape[1]
    ahead = layers - len(recent_layer)
    # What the state is computed from: the tokens, the last token's routes, and the recent use, embedded as these are.
    seen = np.zeros(known.shape[1], dtype=np.float32)
    for place in range(len(rows)):
        for i in range(token_width):
            seen[place * token_width + i] = token[rows[place], i]
    last = seen[len(rows) * token_width : len(rows) * token_width + width]
    windows_from = len(rows) * token_width + width
    hints = np.zeros((layers - ahead, width), dtype=np.float32)
    for layer in range(layers):
        own = np.zeros(width, dtype=np.float32)
        for k in range(top_k):
            add_row(own, table[layer * experts + last_ids[layer, k]], last_weights[layer, k])
        last += own
        if layer >= ahead:
            hints[layer - ahead] += own
        for w in range(windows):
            use = recent[w, layer]
            add_rows(
                seen[windows_from + w * width : windows_from + (w + 1) * width],
                table[layer * experts : (layer + 1) * experts],
                use,
            )
            if layer >= ahead:
                add_rows(hints[layer - ahead], recent_layer[layer - ahead, w * experts : (w + 1) * experts], use)
    state = known_bias + position_table[position]
    add_product(state, known, seen)
    for number in range(len(context[0])):
        add_block(state, state.copy(), number, *context)
    by_layer, by_fact, rise, rise_bias, fall, fall_bias = score_weights
    scores = np.empty((len(by_layer), layers, len(facts)), dtype=np.float32)
    for p in range(len(facts)):
        hidden = rise_bias.copy()
        add_product(hidden, rise, facts[p])
        apply_gelu(hidden)
        of_facts = fall_bias.copy()
        add_product(of_facts, by_fact, facts[p])
        add_product(of_facts, fall, hidden)
        for head in range(len(by_layer)):
            column = np.zeros(layers, dtype=np.float32)
            add_product(column, by_layer[head], last_common[p])
            for layer in range(layers):
                scores[head, layer, p] = column[layer] + of_facts[head]
    return state, hints, scores


@numba.njit(cache=True, nogil=True, fastmath=True)
def _attend(layer: int, ahead: int, places: Places, attention: tuple[Array, Array], used: Array, confidence: Array) -> None:
    """Write the use `[H, G, E]` at the places, and the confidences `[S, G, 2]`."""
    place_ids, exists, common, scores = places
    now, rank = attention
    count, steps, layers, top_k = place_ids.shape
    horizon, heads = used.shape[:2]
    share = np.empty(count, dtype=np.float32)
    for step in range(steps):
        for head in range(heads):
            # The score of "none of them" is 0.
            highest = np.float32(0)
            for p in range(count):
                share[p] = scores[head, layer, p]
                if ahead:
                    for known in range(layer + 1):
                        share[p] += now[head, layer, known] * common[p, known]
                if exists[p, step]:
                    highest = max(highest, share[p])
            total = np.float32(math.exp(-highest))
            for p in range(count):
                share[p] = np.float32(math.exp(share[p] - highest)) if exists[p, step] else np.float32(0)
                total += share[p]
            most = np.float32(0)
            for p in range(count):
                if share[p] == 0:
                    continue
                share[p] /= total
                most = max(most, share[p])
                # For next-layer, hops are layers ahead; else, each step is a hop.
                for hop in range(0 if ahead else step, min(horizon, layers - 1 - layer) if ahead else step + 1):
                    for k in range(top_k):
                        expert = place_ids[p, step, layer + ahead + (hop if ahead else 0), k]
                        used[hop, head, expert] += share[p] * rank[k]
            confidence[step, head, 0] = math.tanh((highest + math.log(total)) / 10)
            confidence[step, head, 1] = most


@numba.njit(cache=True, nogil=True, fastmath=True)
def _step(
    layer: int,
    ahead: int,
    ids_K: npt.NDArray[np.int64],
    weights_K: Array,
    state: Array,
    hint: Array,
    places: Places,
    attention: tuple[Array, Array],
    added: tuple[Array, Matrix],
    blocks: BlockWeights,
    head: tuple[Array, Matrix, Array, Array],
    little_use: np.float32,
    ranked: npt.NDArray[np.int64],
    scores: Array,
) -> None:
    """Add a layer to the state, and rank the experts `[H, E]` for as many hops as `ranked` and `scores` have rows."""
    horizon, experts = head[3].shape[1:]
    now, used_layer = added
    norm_scale, weights, direct, bias = head
    place_ids, _, common, _ = places
    heads, top_k = direct.shape[2], place_ids.shape[3]
    steps = place_ids.shape[1]
    if ahead:
        total = max(weights_K.sum(), np.float32(1e-6))
        for k in range(top_k):
            state += weights_K[k] / total * now[layer * experts + ids_K[k]]
        for p in range(len(place_ids)):
            same = 0
            for k in range(top_k):
                for j in range(top_k):
                    same += ids_K[k] == place_ids[p, 0, layer, j]
            common[p, layer] = same / top_k
    used = np.zeros((horizon, heads, experts), dtype=np.float32)
    confidence = np.zeros((steps, heads, 2), dtype=np.float32)
    _attend(layer, ahead, places, attention, used, confidence)
    seen_uses = steps * heads * experts
    hint = hint.copy()
    add_rows(hint, used_layer[layer], used.ravel()[:seen_uses])
    add_rows(hint, used_layer[layer, seen_uses:], confidence.ravel())
    add_block(state, state + hint, layer, *blocks)
    scaled = layer_norm(state + hint) * norm_scale[layer]
    for hop in range(len(ranked)):
        logits = bias[layer, hop].copy()
        add_product(logits, weights[layer, hop * experts : (hop + 1) * experts], scaled)
        for g in range(heads):
            for expert in range(experts):
                if used[hop, g, expert] > 0:
                    logits[expert] += direct[layer, hop, g] * np.float32(math.log1p(used[hop, g, expert] / little_use))
        for expert in range(experts):
            logits[expert] = np.float32(1) / (np.float32(1) + np.float32(math.exp(-logits[expert])))
        rank_experts(logits, ranked[hop], scores[hop])
