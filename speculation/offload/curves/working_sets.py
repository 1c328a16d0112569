"""Working sets: how many experts of a layer are used within some consecutive tokens, or by one step of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from speculation.data.routes import Routes
from speculation.offload.requests import Requests
from speculation.offload.state import Integers


@dataclass(frozen=True)
class WorkingSets:
    """How many windows (or steps) use how many experts of each layer.

    Attributes:
        windows_LE: Windows of each layer that use e distinct experts, for e from 0 to E: `[L, E + 1]`.
    """

    windows_LE: Integers

    @property
    def windows(self) -> int:
        """Number of windows; every layer has the same ones."""
        return int(self.windows_LE[0].sum())

    @property
    def mean_L(self) -> npt.NDArray[np.float64]:
        """Mean number of experts, by layer; NaN without windows."""
        sizes = np.arange(self.windows_LE.shape[1])
        return np.asarray(self.windows_LE @ sizes / (self.windows or np.nan))

    def percentile_L(self, percent: int) -> Integers:
        """The fewest experts that suffice for at least this percentage of the windows of each layer; 0 without windows."""
        return _percentile(self.windows_LE, percent)

    def percentile(self, percent: int) -> int:
        """The same over the windows of all layers together."""
        return int(_percentile(self.windows_LE.sum(0, keepdims=True), percent)[0])


def window_sets(routes: Routes, num_experts: int, tokens: int) -> WorkingSets:
    """Count the experts that `tokens` consecutive generated tokens of a problem use, in every such window.

    Windows overlap: one begins at each token. A window has no gap in the positions of its tokens, so that a problem with fewer
    generated tokens has none.
    """
    # Tokens of one stretch, prompt and generated tokens apart, have equal numbers.
    is_new_T = np.ones(len(routes), dtype=np.bool_)
    is_new_T[1:] = (np.diff(routes.first_T) != 0) | (np.diff(routes.is_decode_T.astype(np.int8)) != 0)
    starts_T = np.maximum.accumulate(np.where(is_new_T, np.arange(len(routes)), 0))
    return WorkingSets(_count_windows(routes.expert_ids_TLK, starts_T, routes.is_decode_T, num_experts, tokens))


def step_sets(requests: Requests, batch: int) -> WorkingSets:
    """Count the experts that a layer needs in each step that decodes `batch` tokens, one of each sequence."""
    is_full_S = requests.is_decode_S & (requests.tokens_S == batch)
    lengths_SL = np.diff(requests.starts_R).reshape(-1, requests.layers)[is_full_S]
    sizes = requests.num_experts + 1
    return WorkingSets(np.stack([np.bincount(column, minlength=sizes) for column in lengths_SL.T]))


def _percentile(windows_LE: Integers, percent: int) -> Integers:
    reached_LE = np.cumsum(windows_LE, axis=1)
    return np.asarray((reached_LE * 100 >= reached_LE[:, -1:] * percent).argmax(1))


@numba.njit(cache=True, nogil=True)
def _count_windows(
    ids: npt.NDArray[Any], starts: Integers, is_decode: npt.NDArray[np.bool_], num_experts: int, tokens: int
) -> Integers:
    """`[L, E + 1]`: windows by their number of experts. starts `[T]`: the first token that a window with this one may have."""
    layers, top_k = ids.shape[1:]
    windows = np.zeros((layers, num_experts + 1), dtype=np.int64)
    uses = np.zeros((layers, num_experts), dtype=np.int64)
    used = np.zeros(layers, dtype=np.int64)
    for token in range(len(ids)):
        if not is_decode[token]:
            continue
        if starts[token] == token:
            uses[:] = 0
            used[:] = 0
        leaving = token - tokens
        for layer in range(layers):
            for rank in range(top_k):
                expert = ids[token, layer, rank]
                used[layer] += uses[layer, expert] == 0
                uses[layer, expert] += 1
            if leaving >= starts[token]:
                for rank in range(top_k):
                    expert = ids[leaving, layer, rank]
                    uses[layer, expert] -= 1
                    used[layer] -= uses[layer, expert] == 0
            if leaving + 1 >= starts[token]:
                windows[layer, used[layer]] += 1
    return windows
