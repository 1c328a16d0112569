"""What a full cache evicts by: a rule and, for learned policies, the scores of a predictor and their shuffled control."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from analysis.documents.evaluation import CONTROL
from profiler.errors import SpecmoeError
from speculation.data.routes import Routes
from speculation.data.tasks import Task
from speculation.evaluation.evaluate import microseconds_per_prediction
from speculation.offload.plans import CHUNK_PROBABILITIES
from speculation.offload.requests import Requests
from speculation.offload.simulation.simulate import Setting, Workload, simulate
from speculation.offload.state import TIME_CONSTANT, Rule
from speculation.predictors.base import Predictor

# Requests that a policy is timed on.
TIMED_REQUESTS = 50_000
# Scores are held four times: of the tokens and of the steps, and both for the control.
MAX_SCORE_BYTES = 2 << 30


@dataclass(frozen=True)
class Evictor:
    """What a full cache evicts by.

    Attributes:
        name: Name in the results.
        rule: The rule.
        time_constant: Tokens over which `ewma` and `lfu-aged` forget.
        scores_SX: For learned policies: how soon each expert is used after each step, 0 to 1, float32 `[S, L * E]`.
        score_seconds: Time to score the experts of one layer, measured on this machine.
        is_control: Whether the scores are those of other tokens.
    """

    name: str
    rule: Rule
    time_constant: float = TIME_CONSTANT
    scores_SX: npt.NDArray[np.float32] | None = None
    score_seconds: float = 0.0
    is_control: bool = False

    @classmethod
    def of(cls, rule: Rule, time_constant: float = TIME_CONSTANT) -> Evictor:
        """A policy that needs no predictor."""
        return cls(rule.label, rule, time_constant)


def learned_evictors(predictor: Predictor, name: str, routes: Routes, requests: Requests) -> Iterator[Evictor]:
    """The policy that follows a predictor of reuse, and its shuffled control, which follows its scores of other tokens.

    Raises:
        SpecmoeError: The predictor was trained for another task.
    """
    if predictor.shape.task != Task.REUSE:
        raise SpecmoeError(
            f"{name} was trained for {predictor.shape.task}: a policy needs a run of 'specmoe train --task {Task.REUSE}'"
        )
    scores_TX = token_scores(predictor, routes)
    seconds = microseconds_per_prediction(predictor, routes) / 1e6
    yield Evictor(name, Rule.LEARNED, scores_SX=scores_by_step(scores_TX, requests), score_seconds=seconds)
    order = np.random.default_rng(0).permutation(len(routes))
    shuffled_SX = scores_by_step(scores_TX[order], requests)
    yield Evictor(f"{name}, {CONTROL}", Rule.LEARNED, scores_SX=shuffled_SX, score_seconds=seconds, is_control=True)


def scores_by_step(scores_TX: npt.NDArray[np.float32], requests: Requests) -> npt.NDArray[np.float32]:
    """The scores of experts in each step `[S, L * E]`, from those at each token `[T, L * E]`.

    Only what is known when the step begins is used: of a prompt's chunk, the scores at its first token; of draft tokens, those
    at the token before them. A step of several sequences combines their scores as if they were independent: one minus the
    product of `1 - score`.
    """
    scores_SX = scores_TX[requests.tokens_N[requests.first_S[:-1]]]
    for step in np.flatnonzero(requests.is_decode_S & (requests.sequences_S > 1)):
        entries = slice(requests.first_S[step], requests.first_S[step + 1])
        tokens = requests.tokens_N[entries][~requests.is_draft_N[entries]]
        scores_SX[step] = 1 - np.prod(1 - scores_TX[tokens], axis=0)
    return scores_SX


def policy_seconds(
    workload: Workload, evictor: Evictor, capacity: int, is_global: bool, slots: tuple[int, ...] | None = None
) -> float:
    """Time that a policy takes per request, its bookkeeping included: measured on this machine, on the first requests."""
    requests = workload.requests
    steps = max(1, min(requests.steps, TIMED_REQUESTS // requests.layers))
    few = Workload(requests.first_steps(steps), workload.popularity_LE)
    scores = None if evictor.scores_SX is None else evictor.scores_SX[:steps]
    setting = Setting(evictor.rule, capacity, is_global, slots=slots, time_constant=evictor.time_constant)
    _ = few.ahead, few.popularity
    took = []
    for _turn in range(2):
        began = time.perf_counter()
        simulate(few, setting, scores_SX=scores)
        took.append(time.perf_counter() - began)
    return min(took) / (steps * requests.layers)


def token_scores(predictor: Predictor, routes: Routes) -> npt.NDArray[np.float32]:
    """The predictor's scores at every token, `[T, L * E]`."""
    width = predictor.shape.layers * predictor.shape.experts
    most = MAX_SCORE_BYTES // (width * 4)
    if len(routes) > most:
        raise SpecmoeError(
            f"scores of {width:,} experts at {len(routes):,} tokens are too large: a learned policy is simulated for up to "
            f"{most:,} tokens of this model; choose a smaller part"
        )
    found_TX = np.empty((len(routes), width), dtype=np.float32)
    at_once = max(1, CHUNK_PROBABILITIES // width // 16)
    for start in range(0, len(routes), at_once):
        tokens = slice(start, min(start + at_once, len(routes)))
        found_TX[tokens] = predictor.probabilities(routes, tokens).reshape(-1, width)
    return found_TX
