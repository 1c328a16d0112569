"""A trace as requests: the experts that each layer needs in each step of the model."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from profiler.errors import SpecmoeError
from speculation.data.routes import Routes

# A longer prompt is prefilled in chunks of this size, one step each.
PREFILL_TOKENS = 512


@dataclass(frozen=True)
class Requests:
    """All requests in order: one for each layer of each step, for all the experts that the layer needs.

    A step is one forward pass over some tokens: one token of each running sequence, or a chunk of one prompt. S steps of L
    layers make R = S * L requests; N counts the entries of a flat array.

    Attributes:
        layers: L, the number of MoE layers.
        num_experts: E, the experts of a layer.
        top_k: K, the experts of a token.
        experts_N: Requested experts. Step s at layer l requests `experts_N[starts_R[s * L + l] : starts_R[s * L + l + 1]]`,
            without duplicates: the strongest expert of every token first, then the second strongest, and so on.
        starts_R: `[R + 1]`, where each request starts in `experts_N`.
        tokens_N: Indices of tokens in the routes. Step s has `tokens_N[first_S[s] : first_S[s + 1]]`.
        first_S: `[S + 1]`, where each step starts in `tokens_N`.
        is_decode_S: Whether a step decodes, else it prefills.
        problem_S: The index of each step's problem, counted over the problems of the routes; -1 if it has tokens of several.
        samples_next_N: For each entry of `tokens_N`, whether the model samples the next token from it: true for decoded tokens
            and for the last token of a prompt.
    """

    layers: int
    num_experts: int
    top_k: int
    experts_N: npt.NDArray[np.int32]
    starts_R: npt.NDArray[np.int64]
    tokens_N: npt.NDArray[np.int64]
    first_S: npt.NDArray[np.int64]
    is_decode_S: npt.NDArray[np.bool_]
    problem_S: npt.NDArray[np.int64]
    samples_next_N: npt.NDArray[np.bool_]

    @property
    def steps(self) -> int:
        """S, the number of steps."""
        return len(self.is_decode_S)

    @property
    def tokens_S(self) -> npt.NDArray[np.int64]:
        """Number of tokens in each step."""
        return np.diff(self.first_S)

    def first_steps(self, steps: int) -> Requests:
        """The first steps alone."""
        tokens, starts = int(self.first_S[steps]), self.starts_R[: steps * self.layers + 1]
        return replace(
            self,
            experts_N=self.experts_N[: starts[-1]],
            starts_R=starts,
            tokens_N=self.tokens_N[:tokens],
            first_S=self.first_S[: steps + 1],
            is_decode_S=self.is_decode_S[:steps],
            problem_S=self.problem_S[:steps],
            samples_next_N=self.samples_next_N[:tokens],
        )


def requests_of(routes: Routes, num_experts: int, *, batch: int = 1) -> Requests:
    """Schedule the problems of `routes` as continuous batching does, and list what each step requests.

    A problem starts as soon as fewer than `batch` sequences are running. Its prompt is prefilled alone, in one step or in
    several of `PREFILL_TOKENS`, before its sequence joins the others.

    Args:
        routes: The tokens to schedule.
        num_experts: E, the experts of a layer.
        batch: Sequences that are decoded at the same time.

    Raises:
        SpecmoeError: `batch` is not positive.
    """
    if batch < 1:
        raise SpecmoeError(f"batch {batch}: expected at least 1")
    order_T, step_T, is_decode_S = _schedule(routes, batch)
    first_S = np.searchsorted(step_T, np.arange(len(is_decode_S) + 1))
    layers, top_k = routes.expert_ids_TLK.shape[1:]
    experts_N, starts_R = _unions(routes.expert_ids_TLK, order_T, first_S, num_experts)
    is_prompt_next_T = (np.diff(routes.problem_ids_T, append=-1) == 0) & np.append(~routes.is_decode_T[1:], False)
    samples_next_T = routes.is_decode_T | ~is_prompt_next_T
    _, problem_T = np.unique(routes.problem_ids_T, return_inverse=True)
    problem_N = problem_T[order_T]
    lowest_S, highest_S = (reduce(problem_N, first_S[:-1]) for reduce in (np.minimum.reduceat, np.maximum.reduceat))
    return Requests(
        layers=layers,
        num_experts=num_experts,
        top_k=top_k,
        experts_N=experts_N,
        starts_R=starts_R,
        tokens_N=order_T,
        first_S=first_S,
        is_decode_S=is_decode_S,
        problem_S=np.where(lowest_S == highest_S, lowest_S, -1),
        samples_next_N=samples_next_T[order_T],
    )


def _schedule(routes: Routes, batch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Tokens in the order of their steps, the step of each of them, and which steps decode."""
    _, first_P, problem_T = np.unique(routes.problem_ids_T, return_index=True, return_inverse=True)
    decoded_P = np.bincount(problem_T, routes.is_decode_T, len(first_P)).astype(np.int64)
    # The round of the batch in which each problem's first token is decoded: as soon as the batch has a free place.
    free = [0] * min(batch, len(first_P))
    start_P = np.zeros(len(first_P), dtype=np.int64)
    for problem, tokens in enumerate(decoded_P.tolist()):
        start_P[problem] = heapq.heappop(free)
        heapq.heappush(free, int(start_P[problem]) + tokens)
    # Index of a token among its problem's decoded tokens, and among its prompt tokens.
    place_T = np.arange(len(routes)) - first_P[problem_T]
    before_T: npt.NDArray[np.int64] = np.cumsum(routes.is_decode_T) - routes.is_decode_T
    generated_T: npt.NDArray[np.int64] = before_T - before_T[first_P][problem_T]
    prompt_T = place_T - generated_T
    round_T = np.where(routes.is_decode_T, start_P[problem_T] + generated_T, start_P[problem_T])
    # Within a round, every prompt is prefilled in steps of its own; then all running sequences decode in one step.
    chunk_T = np.where(routes.is_decode_T, 0, prompt_T // PREFILL_TOKENS)
    prefilled_T = np.where(routes.is_decode_T, 0, problem_T)
    keys = (np.arange(len(routes)), chunk_T, prefilled_T, routes.is_decode_T, round_T)
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
