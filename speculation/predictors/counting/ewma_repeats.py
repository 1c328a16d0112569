"""A formula for how soon each expert is used again: its faded use, and what followed the same tokens earlier in the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import numba
import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression

from profiler.errors import SpecmoeError
from speculation.data.next_use import discounted_use
from speculation.data.routes import Routes, RouteSource, each_group
from speculation.data.tasks import Shape, Task
from speculation.predictors.base import Arrays, Predictor, expected_array
from speculation.predictors.options import Epochs, Progress, TrainingOptions

# Tokens over which a use fades, as in the policy `ewma`, and how many tokens back uses are summed: older ones weigh less than
# 1 %.
FADE = 24.0
WINDOW = 120
# What a use right after an earlier occurrence of the same tokens adds, tokens over which it fades, and how many tokens after
# the occurrence are looked at. Chosen on 120 training problems of gpt-oss-20b, where 8 to 12 uses make little difference.
REPEAT, REPEAT_FADE, AFTER_MATCH = 12.0, 8.0, 12
# Points of the table that turns the sum into a score.
POINTS = 65
FITTED_TOKENS = 20_000


class EwmaRepeats(Predictor):
    """Ranks experts by `sum over uses of exp(-age / 24) + 12 exp(-n / 8)`.

    n is after how many further tokens the expert was used when the same run of tokens, the longest that occurred before, last
    occurred in the text; without such a use within 12 tokens, the second term is 0. A table that is counted on the training
    tokens turns the sum into the discounted next use that it stands for. It does not change the ranking.
    """

    name: ClassVar[str] = "ewma-repeats"
    about: ClassVar[str] = "a formula: the faded use of each expert, and its use after the latest occurrence of the same tokens"
    source: ClassVar[str] = "this project (docs/results/offload.md)"
    sees: ClassVar[str] = "all earlier routes, which tokens repeat"
    tasks: ClassVar[frozenset[Task]] = frozenset({Task.REUSE})

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self._sums_P = np.linspace(0, 1, POINTS, dtype=np.float32)
        self._scores_P = self._sums_P

    def fit(
        self,
        train: RouteSource,
        validation: RouteSource | None,
        options: TrainingOptions,
        on_progress: Progress,
        out: Path | None = None,
    ) -> Epochs:
        sums, truths = [], []
        random = np.random.default_rng(options.seed)
        for routes in each_group(train):
            share = min(len(routes), max(1, FITTED_TOKENS * len(routes) // len(train)))
            tokens_T = np.sort(random.choice(len(routes), share, replace=False))
            sums.append(self._sums(routes, tokens_T).ravel())
            truths.append(discounted_use(routes.expert_ids_TLK, routes.followers_T, tokens_T, self.shape.experts).ravel())
        sum_N, true_N = np.concatenate(sums), np.concatenate(truths)
        order_N = np.argsort(sum_N, kind="stable")
        # Means of equally many sums.
        parts = [part for part in np.array_split(order_N, POINTS) if len(part)]
        at_P, mean_P = (np.array([values[part].mean(dtype=np.float64) for part in parts]) for values in (sum_N, true_N))
        at_P[0], at_P[-1] = sum_N.min(), sum_N.max()
        points = np.linspace(0, len(parts) - 1, POINTS).astype(np.int64)
        self._sums_P = at_P[points].astype(np.float32)
        # A small slope, so that a larger sum has a larger score also where the means are equal.
        self._scores_P = (isotonic_regression(mean_P[points]).x + np.linspace(0, 1e-4, POINTS)).astype(np.float32)
        return []

    def probabilities(self, routes: Routes, tokens: slice) -> npt.NDArray[np.float32]:
        sums_TLE = self._sums(routes, np.arange(*tokens.indices(len(routes))))
        return np.interp(sums_TLE, self._sums_P, self._scores_P).astype(np.float32)[:, :, None]

    def _sums(self, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """The sum that experts are ranked by, `[T, L, E]`."""
        matches = routes.matches
        match_T = np.where(matches.order_T[tokens_T] > 0, matches.index_T[tokens_T], -1)
        found_TLE = np.zeros((len(tokens_T), self.shape.layers, self.shape.experts), dtype=np.float32)
        _add(routes.expert_ids_TLK, routes.first_T, match_T, tokens_T, found_TLE)
        return found_TLE

    def arrays(self) -> Arrays:
        return {"sums_P": self._sums_P, "scores_P": self._scores_P}

    @classmethod
    def restore(cls, shape: Shape, settings: dict[str, Any], arrays: Arrays) -> Self:
        predictor = cls(shape)
        predictor._sums_P, predictor._scores_P = (expected_array(arrays, name, (POINTS,)) for name in ("sums_P", "scores_P"))
        for name, values in (("sums_P", predictor._sums_P), ("scores_P", predictor._scores_P)):
            if (np.diff(values) < 0).any():
                raise SpecmoeError(f"stored predictor: array {name!r} falls, expected ascending numbers")
        return predictor


@numba.njit(cache=True, nogil=True)
def _add(
    ids: npt.NDArray[Any],
    first: npt.NDArray[np.int64],
    match: npt.NDArray[np.int64],
    tokens: npt.NDArray[np.int64],
    out: npt.NDArray[np.float32],
) -> None:
    layers, top_k = ids.shape[1:]
    weights = np.exp(-np.arange(WINDOW) / FADE)
    repeats = REPEAT * np.exp(-np.arange(AFTER_MATCH) / REPEAT_FADE)
    # The latest token for which each expert's use after a match was added.
    added = np.full(out.shape[1:], -1, dtype=np.int64)
    for n in range(len(tokens)):
        token = tokens[n]
        for at in range(max(first[token], token - WINDOW), token):
            for layer in range(layers):
                for k in range(top_k):
                    out[n, layer, ids[at, layer, k]] += weights[token - 1 - at]
        if match[n] < 0:
            continue
        for at in range(match[n] + 1, min(token, match[n] + 1 + AFTER_MATCH)):
            for layer in range(layers):
                for k in range(top_k):
                    expert = ids[at, layer, k]
                    if added[layer, expert] != n:
                        added[layer, expert] = n
                        out[n, layer, expert] += repeats[at - match[n] - 1]
