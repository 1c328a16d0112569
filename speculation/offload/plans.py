"""Which experts are prefetched, and when: predictions turned into a plan for the simulation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from profiler.errors import UsageError
from speculation.data.routes import Routes
from speculation.data.tasks import Shape, Task
from speculation.offload.requests import Requests
from speculation.predictors.base import Predictor

# Bounds the memory of one chunk of predictions: this many float32 probabilities, E per token, layer and horizon.
CHUNK_PROBABILITIES = 1 << 25


class PrefetchPlan(NamedTuple):
    """Experts to prefetch, in the order in which their transfers are queued.

    A step has L + 1 points at which prefetches are queued: before its first layer, and after each of its layers. S steps make
    Q = S * (L + 1) points; N counts the entries of a flat array. The entries that are queued after layer l of step s (l = -1:
    before the first layer) are those from `starts_Q[s * (L + 1) + l + 1]` up to the next entry of `starts_Q`.

    Attributes:
        starts_Q: `[Q + 1]`, where the entries of each point start.
        layers_N: Layer of each entry; L and above are the layers of the next step.
        experts_N: Expert of each entry.
        scores_N: Probability with which each entry is predicted; 1 where none is known. It matters to the policy `learned`
            only, which evicts nothing that is worth more.
    """

    starts_Q: npt.NDArray[np.int64]
    layers_N: npt.NDArray[np.int32]
    experts_N: npt.NDArray[np.int32]
    scores_N: npt.NDArray[np.float32]


@dataclass(frozen=True)
class RankedExperts:
    """The m likeliest experts of each prediction: `ids_TLHM` `[T, L, H, m]`, -1 for none, and their probabilities."""

    ids_TLHM: npt.NDArray[np.int32]
    scores_TLHM: npt.NDArray[np.float32]


def no_plan(requests: Requests) -> PrefetchPlan:
    """A plan that prefetches nothing."""
    empty = np.zeros(0, dtype=np.int32)
    return PrefetchPlan(
        np.zeros(requests.steps * (requests.layers + 1) + 1, dtype=np.int64), empty, empty, np.zeros(0, dtype=np.float32)
    )


def ranked(predictor: Predictor, routes: Routes, experts: int, threshold: float = 0.0) -> RankedExperts:
    """The `experts` likeliest experts of each prediction whose probability is at least `threshold`."""
    shape = predictor.shape
    per_token = shape.layers * shape.horizon * shape.experts
    most = min(experts, shape.experts)
    ids, scores = [], []
    at_once = max(1, CHUNK_PROBABILITIES // per_token)
    for start in range(0, len(routes), at_once):
        found_TLHE = predictor.probabilities(routes, slice(start, start + at_once))
        order = np.argpartition(-found_TLHE, most - 1, axis=-1)[..., :most]
        best = np.take_along_axis(found_TLHE, order, -1)
        inner = np.argsort(-best, axis=-1, kind="stable")
        best = np.take_along_axis(best, inner, -1)
        chosen = np.take_along_axis(order, inner, -1)
        ids.append(np.where(best >= threshold, chosen, -1).astype(np.int32))
        scores.append(best.astype(np.float32))
    return RankedExperts(np.concatenate(ids), np.concatenate(scores))


def plan_of(best: RankedExperts, shape: Shape, requests: Requests) -> PrefetchPlan:
    """Plan to prefetch what a predictor predicts.

    When the predictions of a task are made, and for which layers:

    - next-layer: after layer l, for layers l + 1 to l + H.
    - whole-path: before the first layer, for all layers.
    - next-token: after the last layer, for all layers of the next step; later steps are left out.

    Nearer layers come first. Within a layer, the probabilities of all tokens of a step are added up, and the experts with the
    largest sums come first. Only the experts of decoded tokens are predicted: the tokens of a prompt pass each layer together,
    so the previous token's routes, which predictors condition on, are not known in time. The same holds for draft tokens.
    """
    layers, hops = shape.layers, shape.horizon
    point_LH = np.empty((layers, hops), dtype=np.int64)
    target_LH = np.full((layers, hops), -1, dtype=np.int64)
    for hop in range(1, hops + 1):
        if shape.task == Task.NEXT_LAYER:
            point_LH[:, hop - 1] = np.arange(layers) + 1
            target_LH[:, hop - 1] = shape.target_layers(hop)
        elif shape.task == Task.WHOLE_PATH:
            point_LH[:, hop - 1] = 0
            target_LH[:, hop - 1] = np.arange(layers)
        else:
            point_LH[:, hop - 1] = layers
            target_LH[:, hop - 1] = layers + np.arange(layers) if hop == 1 else -1
    is_decode_N = np.repeat(requests.is_decode_S, requests.tokens_S) & ~requests.is_draft_N
    predicts_N = requests.samples_next_N if shape.task == Task.NEXT_TOKEN else is_decode_N
    return _plan_predictions(best, point_LH, target_LH, requests, predicts_N)


def popularity_plan(
    probability_LE: npt.NDArray[np.floating[Any]], experts: int, horizon: int, requests: Requests
) -> PrefetchPlan:
    """Plan to prefetch the most popular experts of each layer, `horizon` layers ahead, also across the end of a step."""
    top_LM = np.argsort(-probability_LE, axis=1, kind="stable")[:, :experts].astype(np.int32)
    counts_R = np.full(requests.steps * requests.layers, top_LM.shape[1])
    chosen_N = np.tile(top_LM.reshape(-1), requests.steps)
    scores_N = np.tile(np.take_along_axis(probability_LE, top_LM, 1).reshape(-1), requests.steps)
    return _plan_ahead(chosen_N, scores_N, counts_R, horizon, requests.layers)


def oracle_plan(requests: Requests, horizon: int) -> PrefetchPlan:
    """Plan to prefetch exactly what is requested, `horizon` layers ahead, also across the end of a step.

    A perfect predictor with this horizon would prefetch the same.
    """
    certain_N = np.ones(len(requests.experts_N))
    return _plan_ahead(requests.experts_N, certain_N, np.diff(requests.starts_R), horizon, requests.layers)


def _plan_ahead(
    experts_N: npt.NDArray[np.int32],
    scores_N: npt.NDArray[np.floating[Any]],
    counts_R: npt.NDArray[np.int64],
    horizon: int,
    layers: int,
) -> PrefetchPlan:
    """Plan to prefetch the experts of each request `horizon` layers ahead: `counts_R[r]` consecutive entries of `experts_N`,
    with their probabilities `scores_N`.
    """
    if not 1 <= horizon <= layers:
        raise UsageError(f"horizon {horizon}: expected 1 to {layers} layers ahead")
    # No request is `horizon` layers before the first ones, so these are not prefetched.
    earlier = np.arange(max(0, len(counts_R) - horizon))
    step, layer = np.divmod(earlier, layers)
    counts = counts_R[horizon:]
    starts = np.zeros(len(counts_R) // layers * (layers + 1) + 1, dtype=np.int64)
    np.add.at(starts, step * (layers + 1) + layer + 2, counts)
    return PrefetchPlan(
        np.cumsum(starts),
        np.repeat(layer + horizon, counts).astype(np.int32),
        experts_N[int(counts_R[:horizon].sum()) :].astype(np.int32),
        scores_N[int(counts_R[:horizon].sum()) :].astype(np.float32),
    )


def _plan_predictions(
    best: RankedExperts,
    point_LH: npt.NDArray[np.int64],
    target_LH: npt.NDArray[np.int64],
    requests: Requests,
    predicts_N: npt.NDArray[np.bool_],
) -> PrefetchPlan:
    points = requests.layers + 1
    # Predictions in the order of their points, nearer targets first.
    layer_G, hop_G = np.nonzero(target_LH >= 0)
    order = np.lexsort((target_LH[layer_G, hop_G], point_LH[layer_G, hop_G]))
    layer_G, hop_G = layer_G[order], hop_G[order]
    return PrefetchPlan(
        *_merge_tokens(
            best.ids_TLHM,
            best.scores_TLHM,
            requests.tokens_N,
            predicts_N,
            requests.first_S,
            layer_G,
            hop_G,
            point_LH[layer_G, hop_G],
            target_LH[layer_G, hop_G],
            points,
            requests.num_experts,
        )
    )


@numba.njit(cache=True, nogil=True)
def _merge_tokens(
    ids: npt.NDArray[np.int32],
    scores: npt.NDArray[np.float32],
    tokens: npt.NDArray[np.int64],
    predicts: npt.NDArray[np.bool_],
    first: npt.NDArray[np.int64],
    layer_of: npt.NDArray[np.int64],
    hop_of: npt.NDArray[np.int64],
    point_of: npt.NDArray[np.int64],
    target_of: npt.NDArray[np.int64],
    points: int,
    experts: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    steps, most = len(first) - 1, ids.shape[3]
    starts = np.zeros(steps * points + 1, dtype=np.int64)
    room = int(predicts.sum()) * len(layer_of) * most
    layers_out, experts_out = np.empty(room, dtype=np.int32), np.empty(room, dtype=np.int32)
    scores_out = np.empty(room, dtype=np.float32)
    score = np.zeros(experts)
    seen = np.full(experts, -1, dtype=np.int64)
    found = np.empty(experts, dtype=np.int64)
    count, stamp = 0, 0
    for step in range(steps):
        group = 0
        for point in range(points):
            while group < len(layer_of) and point_of[group] == point:
                number = 0
                for place in range(first[step], first[step + 1]):
                    for rank in range(most if predicts[place] else 0):
                        expert = ids[tokens[place], layer_of[group], hop_of[group], rank]
                        if expert < 0:
                            continue
                        if seen[expert] != stamp:
                            seen[expert] = stamp
                            score[expert] = 0.0
                            found[number] = expert
                            number += 1
                        score[expert] += scores[tokens[place], layer_of[group], hop_of[group], rank]
                stamp += 1
                # Insertion sort: the experts are few, and those of a single token are already in order.
                for right in range(1, number):
                    moved = found[right]
                    left = right
                    while left > 0 and score[found[left - 1]] < score[moved]:
                        found[left] = found[left - 1]
                        left -= 1
                    found[left] = moved
                for rank in range(number):
                    layers_out[count] = target_of[group]
                    experts_out[count] = found[rank]
                    scores_out[count] = min(1.0, score[found[rank]])
                    count += 1
                group += 1
            starts[step * points + point + 1] = count
    return starts, layers_out[:count].copy(), experts_out[:count].copy(), scores_out[:count].copy()
