"""`reuse` one token at a time: the same scores as the network, but only what a token changes is computed, and without PyTorch's
overhead for a single token."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from speculation.data.history import History
from speculation.data.tasks import Shape
from speculation.predictors.neural.base import relative_weights
from speculation.predictors.neural.places.reuse_features import (
    AFTER,
    AT_MATCH,
    FADES,
    FEATURES,
    RECENT,
    SOON_AFTER,
    WINDOW,
    add_matches,
)
from speculation.predictors.neural.streams.single_token import Array, add_block, layer_norm, stacked


class RecentUse:
    """The recent use of every expert in one text: sums in which each use fades with its age.

    A token changes only the sums of its own experts, and those of the experts that leave the window; all others fade alike.

    Attributes:
        tokens: The number of tokens whose routes are added.
    """

    def __init__(self, shape: Shape) -> None:
        self.tokens = 0
        self._sums_LEF = np.zeros((shape.layers, shape.experts, len(FADES)))
        self._last_LE = np.full((shape.layers, shape.experts), -1, dtype=np.int64)
        fades = np.array(FADES)
        self._weights = np.stack([1 / fades, np.exp(-1 / fades), np.exp(-WINDOW / fades) / fades])

    def advance(self, expert_ids_TLK: npt.NDArray[Any], tokens: int) -> None:
        """Add the routes of the tokens from `self.tokens` to before `tokens`.

        Args:
            expert_ids_TLK: The routes of the text from its first token.
            tokens: How many tokens to know then.
        """
        _add_uses(expert_ids_TLK, self.tokens, tokens, *self._weights, self._sums_LEF, self._last_LE)
        self.tokens = max(self.tokens, tokens)

    def features(self, expert_ids_TLK: npt.NDArray[Any], match_R: npt.NDArray[np.int64], out_LEF: Array) -> None:
        """Write what `reuse_features` computes for the token after those that are known.

        Args:
            expert_ids_TLK: The routes of the text from its first token.
            match_R: For each run length, the latest earlier place where the run that ends at this token ended; -1 without one.
            out_LEF: float32 `[L, E, at least FEATURES]`, changed.
        """
        token, sums = self.tokens, len(FADES)
        # NumPy's logarithm computes several numbers at a time, numba's does not.
        out_LEF[..., :sums] = np.log(self._sums_LEF.astype(np.float32) + np.float32(0.01)) + np.float32(2.5)
        begin = max(0, token - WINDOW)
        since_LE = np.where(self._last_LE >= begin, token - self._last_LE, token - begin + 20)
        out_LEF[..., sums] = np.log(since_LE.astype(np.float32)) - np.float32(2.0)
        out_LEF[..., sums + 1 : FEATURES] = 0
        add_matches(expert_ids_TLK, match_R, token, AFTER, out_LEF)


class ReuseStream:
    """Scores the experts for the tokens of one text, in order.

    Args:
        predictor: The `Reuse` to compute. Its weights are read once.
    """

    def __init__(self, predictor: Any) -> None:
        weights = predictor.network.state_dict().items()
        arrays = {name: np.ascontiguousarray(tensor.detach().cpu().float().numpy()) for name, tensor in weights}
        shape = predictor.shape
        self.predictor = predictor
        self._arrays = arrays
        self._recent = RecentUse(shape)
        self._blocks = stacked(arrays, "blocks", 2)
        self._hints = np.concatenate(
            [arrays["tokens.weight"], *(scale * arrays[f"hints.{n}.weight"] for n, scale in enumerate((0.2, 1.0, 1.0)))], axis=1
        )
        self._offset_L1 = np.arange(shape.layers)[:, None] * shape.experts
        self._first = np.ascontiguousarray(arrays["first.weight"].T)
        self._second = np.ascontiguousarray(arrays["second.weight"].T)
        self._own = arrays["own"].reshape(-1, len(arrays["context.bias"])) + arrays["first.bias"] + arrays["context.bias"]
        self._bias = arrays["head.bias"] + arrays["third.bias"] + arrays["bias_LHE"].reshape(-1)
        self._features_LEF = np.zeros((shape.layers, shape.experts, len(self._first)), dtype=np.float32)

    def scores(self, history: History) -> Array:
        """The discounted next use of every expert after the current token, float32 `[L, E]`."""
        routes, token = history.routes, history.tokens - 1
        now_T = np.array([token])
        arrays, features_LEF = self._arrays, self._features_LEF
        self._recent.advance(routes.expert_ids_TLK, token)
        self._recent.features(routes.expert_ids_TLK, routes.matches.by_length_TR[token], features_LEF)
        if self.predictor.memory_bytes:
            memory = self.predictor.memory
            features_LEF[..., FEATURES:] = 0
            memory.add_features(memory.places(routes, now_T), features_LEF[None, :, :, FEATURES:])
        words = arrays["token.weight"][self.predictor.token_rows(routes, now_T)[0]].ravel()
        state = arrays["tokens.bias"] + self._hints @ np.concatenate(
            [words, *_hints_of(features_LEF.reshape(len(self._own), -1))]
        )
        if token:
            rows_LK = routes.expert_ids_TLK[token - 1] + self._offset_L1
            state += relative_weights(routes.weights_TLK[token - 1]).ravel() @ arrays["last.table"][rows_LK.ravel()]
        for number in range(len(self._blocks[0])):
            add_block(state, state, number, *self._blocks)
        logits = _logits(
            layer_norm(state) * arrays["norm.weight"] + arrays["norm.bias"],
            features_LEF.reshape(len(self._own), -1),
            self._first,
            self._own,
            arrays["context.weight"],
            self._second,
            arrays["second.bias"],
            arrays["third.weight"][0],
            arrays["head.weight"],
            self._bias,
        )
        scores_LE: Array = (1 / (1 + np.exp(-logits))).reshape(features_LEF.shape[:2])
        return scores_LE


@numba.njit(cache=True, nogil=True)
def _add_uses(
    ids: npt.NDArray[Any],
    begin: int,
    end: int,
    added: npt.NDArray[np.float64],
    kept: npt.NDArray[np.float64],
    leaving: npt.NDArray[np.float64],
    sums: npt.NDArray[np.float64],
    last: npt.NDArray[np.int64],
) -> None:
    layers, top_k = ids.shape[1:]
    for token in range(begin, end):
        for layer in range(layers):
            for expert in range(sums.shape[1]):
                for fade in range(len(kept)):
                    sums[layer, expert, fade] *= kept[fade]
            for k in range(top_k):
                expert = ids[token, layer, k]
                last[layer, expert] = token
                for fade in range(len(kept)):
                    sums[layer, expert, fade] += added[fade]
                if token >= WINDOW:
                    for fade in range(len(kept)):
                        sums[layer, ids[token - WINDOW, layer, k], fade] -= leaving[fade]


@numba.njit(cache=True, nogil=True)
def _hints_of(features: Array) -> Array:
    """The hints about every expert that the state of a token is computed from `[3, L * E]`, from the features `[L * E, F]`."""
    found = np.zeros((3, len(features)), dtype=np.float32)
    for x in range(len(features)):
        found[0, x] = features[x, RECENT]
        for at in range(AT_MATCH.start, AT_MATCH.stop, AT_MATCH.step):
            found[1, x] = max(found[1, x], features[x, at])
        for after in range(SOON_AFTER.start, SOON_AFTER.stop, SOON_AFTER.step):
            found[2, x] = max(found[2, x], features[x, after])
    return found


@numba.njit(cache=True, nogil=True, fastmath=True)
def _logits(
    state: Array,
    features: Array,
    first: Array,
    own: Array,
    context: Array,
    second: Array,
    second_bias: Array,
    third: Array,
    head: Array,
    bias: Array,
) -> Array:
    """The logits of all experts `[L * E]`, from the normalized state `[D]` and the features `[L * E, F]`."""
    shared = np.dot(context, state)
    hidden = np.dot(features, first)
    for x in range(len(hidden)):
        for i in range(len(shared)):
            hidden[x, i] = max(hidden[x, i] + own[x, i] + shared[i], np.float32(0))
    logits: Array = np.dot(head, state) + bias
    hidden = np.dot(hidden, second)
    for x in range(len(hidden)):
        total = np.float32(0)
        for i in range(len(third)):
            total += third[i] * max(hidden[x, i] + second_bias[i], np.float32(0))
        logits[x] += total
    return logits
