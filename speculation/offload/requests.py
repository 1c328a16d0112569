"""A trace as requests: the experts that each layer needs in each step of the model."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from profiler.errors import SpecmoeError, UsageError
from speculation.data.routes import Routes

# A longer prompt is prefilled in chunks of this size, one step each.
PREFILL_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """Speculative decoding: a step verifies the drafted next tokens of a sequence together with its last token.

    A draft token is accepted if the one before it was, with the same probability every time. A step keeps the accepted tokens
    and the one that the model itself samples after them. A trace has no rejected tokens: those that the sequence really
    continued with stand in for them, so a step's experts are those of consecutive tokens.

    Attributes:
        tokens: Draft tokens per step and sequence; 0 decodes without drafts.
        acceptance: Probability that a draft token is accepted.
        seed: Seed of the draws.
    """

    tokens: int
    acceptance: float
    seed: int = 0


NO_DRAFTS = Drafting(tokens=0, acceptance=0.0)


@dataclass(frozen=True)
class Requests:
    """All requests in order: one for each layer of each step, for all the experts that the layer needs.

    A step is one forward pass over some tokens: one token of each running sequence and its draft tokens, or a chunk of one
    prompt. S steps of L layers make R = S * L requests; N counts the entries of a flat array.

    Attributes:
        layers: L, the number of MoE layers.
        num_experts: E, the experts of a layer.
        top_k: K, the experts of a token.
        experts_N: Requested experts. Step s at layer l requests `experts_N[starts_R[s * L + l] : starts_R[s * L + l + 1]]`,
            without duplicates: the strongest expert of every token first, then the second strongest, and so on.
        starts_R: `[R + 1]`, where each request starts in `experts_N`.
        tokens_N: Indices of tokens in the routes. Step s has `tokens_N[first_S[s] : first_S[s + 1]]`. A rejected draft token
            is one of a later step again.
        first_S: `[S + 1]`, where each step starts in `tokens_N`.
        is_decode_S: Whether a step decodes, else it prefills.
        problem_S: The index of each step's problem, counted over the problems of the routes; -1 if it has tokens of several.
        samples_next_N: For each entry of `tokens_N`, whether the model samples the next token from it: true for the last token
            of a prompt and for decoded tokens; of those that are verified together, for the last that is kept.
        is_draft_N: For each entry of `tokens_N`, whether it is a draft token: the routes of the token before it are not known
            ahead of its own.
        is_kept_N: For each entry of `tokens_N`, whether it is not a rejected draft token.
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
    is_draft_N: npt.NDArray[np.bool_]
    is_kept_N: npt.NDArray[np.bool_]

    @classmethod
    def decoded(
        cls, experts_N: npt.NDArray[np.int32], starts_R: npt.NDArray[np.int64], *, layers: int, num_experts: int, top_k: int
    ) -> Requests:
        """Requests of one sequence without a prompt, one token in each step.

        Args:
            experts_N, starts_R, layers, num_experts, top_k: see the attributes.
        """
        steps = (len(starts_R) - 1) // layers
        return cls(
            layers=layers,
            num_experts=num_experts,
            top_k=top_k,
            experts_N=experts_N,
            starts_R=starts_R,
            tokens_N=np.arange(steps),
            first_S=np.arange(steps + 1),
            is_decode_S=np.ones(steps, dtype=np.bool_),
            problem_S=np.zeros(steps, dtype=np.int64),
            samples_next_N=np.ones(steps, dtype=np.bool_),
            is_draft_N=np.zeros(steps, dtype=np.bool_),
            is_kept_N=np.ones(steps, dtype=np.bool_),
        )

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
            is_draft_N=self.is_draft_N[:tokens],
            is_kept_N=self.is_kept_N[:tokens],
        )

    @property
    def kept_S(self) -> npt.NDArray[np.int64]:
        """Number of tokens in each step, without rejected draft tokens."""
        return np.diff(np.append(0, np.cumsum(self.is_kept_N))[self.first_S])

    @property
    def sequences_S(self) -> npt.NDArray[np.int64]:
        """Number of tokens in each step, without draft tokens: of a step that decodes, one for each sequence."""
        return np.diff(np.append(0, np.cumsum(~self.is_draft_N))[self.first_S])


def requests_of(routes: Routes, num_experts: int, *, batch: int = 1, drafting: Drafting = NO_DRAFTS) -> Requests:
    """Schedule the problems of `routes` as continuous batching does, and list what each step requests.

    A problem starts as soon as fewer than `batch` sequences are running. Its prompt is prefilled alone, in one step or in
    several of `PREFILL_TOKENS`, before its sequence joins the others.

    Args:
        routes: The tokens to schedule.
        num_experts: E, the experts of a layer.
        batch: Sequences that are decoded at the same time.
        drafting: Draft tokens that each step verifies besides. Default: none.

    Raises:
        SpecmoeError: `batch` is not positive, the number of draft tokens is negative, or the acceptance no probability.
    """
    if batch < 1:
        raise SpecmoeError(f"batch {batch}: expected at least 1")
    if drafting.tokens < 0 or not 0 <= drafting.acceptance <= 1:
        raise UsageError(
            f"{drafting.tokens} draft tokens, acceptance {drafting.acceptance}: expected 0 or more tokens, and a probability"
        )
    # N entries: every prompt token once, every decoded token in each step that computes it.
    windows = _windows(routes, drafting)
    order_N, step_N, is_decode_S = _schedule(routes, batch, windows)
    tokens_N = windows.tokens_N[order_N]
    first_S = np.searchsorted(step_N, np.arange(len(is_decode_S) + 1))
    layers, top_k = routes.expert_ids_TLK.shape[1:]
    experts_N, starts_R = _unions(routes.expert_ids_TLK, tokens_N, first_S, num_experts)
    is_prompt_next_T = (np.diff(routes.problem_ids_T, append=-1) == 0) & np.append(~routes.is_decode_T[1:], False)
    ends_prompt_T = ~routes.is_decode_T & ~is_prompt_next_T
    _, problem_T = np.unique(routes.problem_ids_T, return_inverse=True)
    lowest_S, highest_S = (reduce(problem_T[tokens_N], first_S[:-1]) for reduce in (np.minimum.reduceat, np.maximum.reduceat))
    return Requests(
        layers=layers,
        num_experts=num_experts,
        top_k=top_k,
        experts_N=experts_N,
        starts_R=starts_R,
        tokens_N=tokens_N,
        first_S=first_S,
        is_decode_S=is_decode_S,
        problem_S=np.where(lowest_S == highest_S, lowest_S, -1),
        samples_next_N=np.where(routes.is_decode_T[tokens_N], windows.is_last_kept_N[order_N], ends_prompt_T[tokens_N]),
        is_draft_N=windows.place_N[order_N] > 0,
        is_kept_N=windows.is_kept_N[order_N],
    )


@dataclass(frozen=True)
class _Windows:
    """The tokens that are verified together: of N entries, the token, its place among them, and its problem's step.

    Entries are in the order of problems and windows. Prompt tokens are on their own, in step 0.
    """

    tokens_N: npt.NDArray[np.int64]
    place_N: npt.NDArray[np.int64]
    step_N: npt.NDArray[np.int64]
    is_kept_N: npt.NDArray[np.bool_]
    is_last_kept_N: npt.NDArray[np.bool_]


def _windows(routes: Routes, drafting: Drafting) -> _Windows:
    decoded_D = np.flatnonzero(routes.is_decode_T)
    _, first_P, problem_D = np.unique(routes.problem_ids_T[decoded_D], return_index=True, return_inverse=True)
    left_D = np.append(first_P, len(decoded_D))[problem_D + 1] - np.arange(len(decoded_D))
    # What a window that starts at each token would keep. Only the draws of tokens that start one are used.
    accepted_D = _accepted(drafting, len(decoded_D))
    kept_D = np.minimum(1 + accepted_D, left_D)
    start_W = _window_starts(kept_D)
    length_W = np.minimum(1 + drafting.tokens, left_D[start_W])
    window_N = np.repeat(np.arange(len(start_W)), length_W)
    place_N = np.arange(len(window_N)) - np.repeat(np.cumsum(length_W) - length_W, length_W)
    problem_W = problem_D[start_W]
    step_W = np.arange(len(start_W)) - np.searchsorted(problem_W, problem_W)
    kept_N = kept_D[start_W][window_N]
    prompt = np.flatnonzero(~routes.is_decode_T)
    none = np.zeros(len(prompt), dtype=np.int64)
    return _Windows(
        tokens_N=np.concatenate([prompt, decoded_D[start_W[window_N] + place_N]]),
        place_N=np.concatenate([none, place_N]),
        step_N=np.concatenate([none, step_W[window_N]]),
        is_kept_N=np.concatenate([none == 0, place_N < kept_N]),
        is_last_kept_N=np.concatenate([none != 0, place_N == kept_N - 1]),
    )


def _accepted(drafting: Drafting, count: int) -> npt.NDArray[np.int64]:
    """Draws of how many draft tokens are accepted before the first that is rejected."""
    random = np.random.default_rng(drafting.seed)
    if drafting.acceptance >= 1:
        return np.full(count, drafting.tokens)
    return np.minimum(random.geometric(1 - drafting.acceptance, count) - 1, drafting.tokens)


@numba.njit(cache=True, nogil=True)
def _window_starts(kept: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where windows start that follow each other, if one that starts at i ends at i + kept[i]."""
    starts = np.empty(len(kept), dtype=np.int64)
    count, start = 0, 0
    while start < len(kept):
        starts[count] = start
        count += 1
        start += kept[start]
    return starts[:count].copy()


def _schedule(
    routes: Routes, batch: int, windows: _Windows
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Entries in the order of their steps, the step of each of them, and which steps decode."""
    tokens_N = windows.tokens_N
    _, first_P, problem_T = np.unique(routes.problem_ids_T, return_index=True, return_inverse=True)
    problem_N, is_decode_N = problem_T[tokens_N], routes.is_decode_T[tokens_N]
    decodes_P = np.zeros(len(first_P), dtype=np.int64)
    np.maximum.at(decodes_P, problem_N[is_decode_N], windows.step_N[is_decode_N] + 1)
    # The round of the batch in which each problem's first token is decoded: as soon as the batch has a free place.
    free = [0] * min(batch, len(first_P))
    start_P = np.zeros(len(first_P), dtype=np.int64)
    for problem, steps in enumerate(decodes_P.tolist()):
        start_P[problem] = heapq.heappop(free)
        heapq.heappush(free, int(start_P[problem]) + steps)
    # Index of a token among its problem's prompt tokens.
    place_T = np.arange(len(routes)) - first_P[problem_T]
    before_T: npt.NDArray[np.int64] = np.cumsum(routes.is_decode_T) - routes.is_decode_T
    prompt_T = place_T - (before_T - before_T[first_P][problem_T])
    # Within a round, every prompt is prefilled in steps of its own; then all running sequences decode in one step.
    round_N = start_P[problem_N] + windows.step_N
    chunk_N = np.where(is_decode_N, 0, prompt_T[tokens_N] // PREFILL_TOKENS)
    prefilled_N = np.where(is_decode_N, 0, problem_N)
    keys = (tokens_N, chunk_N, prefilled_N, is_decode_N, round_N)
    order_N = np.lexsort(keys)
    is_new_N = np.zeros(len(order_N), dtype=np.bool_)
    is_new_N[:1] = True
    for key in keys[1:]:
        is_new_N[1:] |= np.diff(key[order_N].astype(np.int64)) != 0
    step_N = np.cumsum(is_new_N) - 1
    return order_N, step_N, is_decode_N[order_N[is_new_N]]


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
