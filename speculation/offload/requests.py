"""A trace as requests: which experts each layer needs at each step of the model."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from profiler.errors import SpecmoeError
from speculation.data.routes import Routes

# Prompt tokens that go through the model in one step, at most.
PREFILL_TOKENS = 512


@dataclass(frozen=True)
class Requests:
    """Requests in the order in which they are made: one for each layer of each step, for all experts that it needs at once.

    A step is one pass of the model over some tokens: a token of each running sequence, or a piece of one prompt.
    experts_N: flat; those of step s at layer l are `experts_N[starts_R[s * L + l] : starts_R[s * L + l + 1]]`, none twice, in
    order of the tokens and of their weights. tokens_N: places in the routes; those of step s from first_S[s] to first_S[s + 1].
    is_decode_S: whether a step's tokens are generated. leads_N: of tokens_N, those that are generated, or the last of a prompt.
    """

    layers: int
    num_experts: int
    top_k: int
    experts_N: npt.NDArray[np.int32]
    starts_R: npt.NDArray[np.int64]
    tokens_N: npt.NDArray[np.int64]
    first_S: npt.NDArray[np.int64]
    is_decode_S: npt.NDArray[np.bool_]
    leads_N: npt.NDArray[np.bool_]

    @property
    def steps(self) -> int:
        """S."""
        return len(self.is_decode_S)

    @property
    def tokens_S(self) -> npt.NDArray[np.int64]:
        """Tokens of each step."""
        return np.diff(self.first_S)


def requests_of(routes: Routes, num_experts: int, *, batch: int = 1) -> Requests:
    """The requests of a device that works on `batch` sequences at a time, each problem as soon as a place is free.

    A prompt is one step, or several of `PREFILL_TOKENS`, before its sequence joins the others. Raises `SpecmoeError` if `batch`
    is not positive.
    """
    if batch < 1:
        raise SpecmoeError(f"batch {batch}: expected at least 1")
    order_T, step_T, is_decode_S = _schedule(routes, batch)
    first_S = np.searchsorted(step_T, np.arange(len(is_decode_S) + 1))
    layers, top_k = routes.expert_ids_TLK.shape[1:]
    experts_N, starts_R = _unions(routes.expert_ids_TLK, order_T, first_S, num_experts)
    is_prompt_next_T = (np.diff(routes.problem_ids_T, append=-1) == 0) & np.append(~routes.is_decode_T[1:], False)
    leads_T = routes.is_decode_T | ~is_prompt_next_T
    return Requests(layers, num_experts, top_k, experts_N, starts_R, order_T, first_S, is_decode_S, leads_T[order_T])


def _schedule(routes: Routes, batch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Tokens in the order of their steps, the step of each, and which steps generate."""
    _, first_P, problem_T = np.unique(routes.problem_ids_T, return_index=True, return_inverse=True)
    decoded_P = np.bincount(problem_T, routes.is_decode_T, len(first_P)).astype(np.int64)
    # When each problem's first token is generated, in rounds of the batch: as soon as a place is free.
    free = [0] * min(batch, len(first_P))
    start_P = np.zeros(len(first_P), dtype=np.int64)
    for problem, tokens in enumerate(decoded_P.tolist()):
        start_P[problem] = heapq.heappop(free)
        heapq.heappush(free, int(start_P[problem]) + tokens)
    # The place of a token among those of its kind and problem.
    place_T = np.arange(len(routes)) - first_P[problem_T]
    before_T: npt.NDArray[np.int64] = np.cumsum(routes.is_decode_T) - routes.is_decode_T
    generated_T: npt.NDArray[np.int64] = before_T - before_T[first_P][problem_T]
    prompt_T = place_T - generated_T
    round_T = np.where(routes.is_decode_T, start_P[problem_T] + generated_T, start_P[problem_T])
    # Of one round: prompts first, each by itself; then all that generate, together.
    piece_T = np.where(routes.is_decode_T, 0, prompt_T // PREFILL_TOKENS)
    who_T = np.where(routes.is_decode_T, 0, problem_T)
    keys = (np.arange(len(routes)), piece_T, who_T, routes.is_decode_T, round_T)
    order_T = np.lexsort(keys)
    is_new_T = np.zeros(len(order_T), dtype=np.bool_)
    is_new_T[:1] = True
    for key in keys[1:]:
        is_new_T[1:] |= np.diff(key[order_T].astype(np.int64)) != 0
    step_T = np.cumsum(is_new_T) - 1
    return order_T, step_T, routes.is_decode_T[order_T[is_new_T]]


@numba.njit(cache=True, nogil=True)
def _unions(
    ids: npt.NDArray[Any], order: npt.NDArray[np.int64], first: npt.NDArray[np.int64], experts: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    steps, layers, top_k = len(first) - 1, ids.shape[1], ids.shape[2]
    found = np.empty(len(order) * layers * top_k, dtype=np.int32)
    starts = np.zeros(steps * layers + 1, dtype=np.int64)
    seen = np.full(experts, -1, dtype=np.int64)
    count = 0
    for step in range(steps):
        for layer in range(layers):
            request = step * layers + layer
            for rank in range(top_k):
                for place in range(first[step], first[step + 1]):
                    expert = ids[order[place], layer, rank]
                    if seen[expert] != request:
                        seen[expert] = request
                        found[count] = expert
                        count += 1
            starts[request + 1] = count
    return found[:count].copy(), starts
