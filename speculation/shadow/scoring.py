"""Score predictors on single requests, and keep the scores of the last requests and of all.

The recall is that of `specmoe evaluate`: hits and experts are summed, then divided.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from profiler.errors import SpecmoeError
from profiler.live.shadow_stream import ShadowRequest
from profiler.trace.rows import check_ids, check_weights, sort_pairs
from speculation.data.routes import Routes
from speculation.data.tasks import targets
from speculation.evaluation.evaluate import predictions
from speculation.evaluation.metrics import true_ranks
from speculation.predictors.base import Predictor

Counts = npt.NDArray[np.int64]


def routes_of_request(request: ShadowRequest, num_experts: int) -> Routes:
    """The routes of a finished request, as a trace of it would give them.

    Raises:
        TraceError: Rows are not routing of a model with so many experts.
    """
    check_ids(request.expert_ids_TLK, num_experts, "live request")
    weights_TLK = check_weights(request.weights_TLK, "live request")
    ids_TLK, weights_TLK = sort_pairs(request.expert_ids_TLK.astype(np.uint8 if num_experts <= 256 else np.uint16), weights_TLK)
    index_T = np.arange(len(ids_TLK))
    starts_T = np.diff(request.positions_T, prepend=-2) != 1
    return Routes(
        expert_ids_TLK=ids_TLK,
        weights_TLK=weights_TLK,
        problem_ids_T=np.zeros(len(ids_TLK), dtype=np.int32),
        token_ids_T=request.positions_T,
        token_keys_T=request.vocab_ids_T.astype(np.int64),
        is_decode_T=request.positions_T >= request.prompt_tokens,
        first_T=np.maximum.accumulate(np.where(starts_T, index_T, 0)),
    )


def joined(pieces: list[Routes]) -> Routes:
    """The routes of several requests, one after the other; each is a problem of its own."""
    sizes = [len(piece) for piece in pieces]
    starts = np.cumsum([0, *sizes[:-1]])
    fields = [name for name in Routes.__dataclass_fields__ if name not in {"router", "problem_ids_T", "first_T"}]
    return Routes(
        **{name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in fields},
        problem_ids_T=np.repeat(np.arange(len(pieces), dtype=np.int32), sizes),
        first_T=np.concatenate([piece.first_T + start for piece, start in zip(pieces, starts, strict=True)]),
    )


@dataclass(frozen=True)
class Hits:
    """Of one predictor: experts among its K most likely that were selected, and all that were selected, by horizon and layer.

    hits_HL, selected_HL: `[H, L]`; the layer is that of the predicted experts.
    """

    hits_HL: Counts
    selected_HL: Counts

    def __add__(self, other: Hits) -> Hits:
        return Hits(self.hits_HL + other.hits_HL, self.selected_HL + other.selected_HL)

    def __sub__(self, other: Hits) -> Hits:
        return Hits(self.hits_HL - other.hits_HL, self.selected_HL - other.selected_HL)

    @property
    def recall_H(self) -> list[float]:
        """recall@K at each horizon; `nan` where nothing was predicted."""
        return _divided(self.hits_HL.sum(1), self.selected_HL.sum(1))

    @property
    def recall_L(self) -> list[float]:
        """recall@K of each layer, at horizon 1; `nan` where nothing was predicted."""
        return _divided(self.hits_HL[0], self.selected_HL[0])


def count_hits(predictor: Predictor, routes: Routes) -> Hits:
    """Compare the predictions of all tokens with what was selected.

    Raises:
        SpecmoeError: A predicted probability is not finite.
    """
    shape = predictor.shape
    hits_HL, selected_HL = (np.zeros((shape.horizon, shape.layers), dtype=np.int64) for _ in range(2))
    for tokens_T, probabilities_TLHE in predictions(predictor, routes):
        for hop in range(1, shape.horizon + 1):
            true = targets(routes, shape, tokens_T, hop)
            token_N, layer_N = np.nonzero(true.is_valid_TL)
            scores_NE = probabilities_TLHE[token_N, layer_N, hop - 1]
            if not np.isfinite(scores_NE).all():
                raise SpecmoeError(f"{predictor.name} predicts NaN or infinity on live traffic")
            ranks_NK = true_ranks(scores_NE, true.ids_TLK[token_N, layer_N])
            target_N = shape.target_layers(hop)[layer_N]
            hits_N = (ranks_NK < shape.top_k).sum(1)
            hits_HL[hop - 1] += np.bincount(target_N, hits_N, shape.layers).astype(np.int64)
            selected_HL[hop - 1] += shape.top_k * np.bincount(target_N, minlength=shape.layers)
    return Hits(hits_HL, selected_HL)


@dataclass(frozen=True)
class ScoredRequest:
    """A request, what each predictor hit in it, and the scores of a learned policy at its tokens `[T, L * E]`."""

    routes: Routes
    hits: Mapping[str, Hits]
    scores_TX: npt.NDArray[np.float32] | None = None


class Scores:
    """The scores of the last requests, with at most `window_tokens` tokens together (but at least one request), and of all.

    Attributes:
        window: The last requests, the oldest first.
        total: By predictor, the hits in all requests.
        recent: By predictor, the hits in those of the window.
        tokens, requests: Of all requests.
        window_tokens: Of those of the window.
    """

    def __init__(self, window_tokens: int) -> None:
        self._most = window_tokens
        self.window: deque[ScoredRequest] = deque()
        self.total: dict[str, Hits] = {}
        self.recent: dict[str, Hits] = {}
        self.tokens = self.requests = self.window_tokens = 0

    def add(self, scored: ScoredRequest) -> None:
        """Add the newest request; the oldest leave the window as needed."""
        self.window.append(scored)
        self.requests += 1
        self.tokens += len(scored.routes)
        self.window_tokens += len(scored.routes)
        for name, hits in scored.hits.items():
            self.total[name] = self.total[name] + hits if name in self.total else hits
            self.recent[name] = self.recent[name] + hits if name in self.recent else hits
        while self.window_tokens > self._most and len(self.window) > 1:
            oldest = self.window.popleft()
            self.window_tokens -= len(oldest.routes)
            for name, hits in oldest.hits.items():
                self.recent[name] = self.recent[name] - hits


def _divided(hits: Counts, of: Counts) -> list[float]:
    with np.errstate(invalid="ignore", divide="ignore"):
        found: list[float] = (hits / of).tolist()
    return found
