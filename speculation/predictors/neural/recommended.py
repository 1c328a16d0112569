"""The best predictor of this project: a residual network over the layers that sees the routes of earlier occurrences of the
same tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from speculation.data.history import History, Prediction
from speculation.data.repeats import RUN_LENGTHS
from speculation.data.routes import Routes
from speculation.data.tasks import Shape, Task
from speculation.predictors.features import recent_use, token_rows
from speculation.predictors.neural.base import Block, NeuralPredictor, PairEmbedding, relative_weights
from speculation.predictors.neural.recommended_stream import Stream
from speculation.predictors.options import TrainingOptions

# This token and the two before it.
TOKENS_BACK = 3
POSITIONS = 16


class Recommended(NeuralPredictor):
    """Predicts each layer from five inputs:

    - the token's routes so far (next-layer only);
    - the routes of the last known token;
    - the routes at the latest earlier place where the same run of tokens ended (`speculation.data.repeats`);
    - the recent use of every expert;
    - the identity of the token and of the two before it.

    A state passes through one residual block per layer, like the model's own residual stream, and the routes of each layer are
    added to it.
    """

    name: ClassVar[str] = "recommended"
    about: ClassVar[str] = (
        "residual blocks over the layers; routes so far, of the last token, and of earlier occurrences of the same tokens"
    )
    source: ClassVar[str] = "this project (docs/predictors.md)"
    sees: ClassVar[str] = "all routes that the task allows, which tokens they are"
    default_width: ClassVar[int] = 256
    token_width: ClassVar[int] = 64
    # The width of a block's hidden layer, as a multiple of the state's.
    times: ClassVar[int] = 2
    # Tokens over which the recent use of experts is averaged.
    windows: ClassVar[tuple[int, ...]] = (4, 16, 128)
    defaults: ClassVar[TrainingOptions] = TrainingOptions(epochs=7, batch_tokens=512, dropout=0.2)

    def build(self, vocabulary_size: int) -> nn.Module:
        return RecommendedNetwork(
            self.shape, vocabulary_size, self.config.width, self.token_width, self.times, len(self.windows)
        )

    def predict(self, history: History) -> Prediction:
        """Predict as every predictor does, but reuse the state of the layers below instead of computing it again."""
        if self.shape.task != Task.NEXT_LAYER:
            return super().predict(history)
        self.check(history)
        stream = history.cache.get(self.name)
        if stream is None or stream.predictor is not self:
            stream = history.cache[self.name] = Stream(self)
        is_new = stream.token != history.tokens - 1 or stream.layer >= history.layer
        inputs = self.inputs(history.routes, np.array([history.tokens - 1])) if is_new else None
        logits_HE = stream.logits(history, inputs)[: self.shape.layers - 1 - history.layer]
        return Prediction.of(1 / (1 + np.exp(-logits_HE)))

    def inputs(self, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        shape = self.shape
        match, order_T = routes.matches.index_T[tokens_T], routes.matches.order_T[tokens_T]
        known_T = tokens_T if shape.task == Task.NEXT_TOKEN else routes.previous_T[tokens_T]
        steps = np.arange(1, shape.horizon + 1) if shape.task == Task.NEXT_TOKEN else np.zeros(1, dtype=np.int64)
        # The routes that followed the match. Beyond the current token, assume that the tokens since the match repeat.
        cycle_T = np.maximum(tokens_T - match, 1)
        ahead_TS = (steps - 1) % cycle_T[:, None] + 1 if shape.task == Task.NEXT_TOKEN else steps[None]
        match_TS = np.where(order_T[:, None] > 0, match[:, None] + ahead_TS, -1)
        back_TB = tokens_T[:, None] - np.arange(TOKENS_BACK)
        is_there_TB = back_TB >= routes.first_T[tokens_T, None]
        rows_TB = token_rows(self.keys, routes.token_keys_T[np.maximum(back_TB, 0)].reshape(-1)).reshape(back_TB.shape)
        last_ids, last_weights = _routes_at(routes, known_T[:, None])
        match_ids, match_weights = _routes_at(routes, match_TS)
        position_T = np.log2(routes.token_ids_T[tokens_T] + 1.0).astype(np.int64)
        arrays = {
            "last_ids": last_ids[:, 0],
            "last_weights": last_weights[:, 0],
            "match_ids": match_ids,
            "match_weights": match_weights,
            "order": order_T,
            "rows": np.where(is_there_TB, rows_TB, 0),
            "recent": recent_use(routes, tokens_T, known_T, shape.experts, self.windows),
            "position": np.minimum(position_T, POSITIONS - 1),
        }
        if shape.task == Task.NEXT_LAYER:
            arrays["now_ids"] = routes.expert_ids_TLK[tokens_T].astype(np.int64)
            arrays["now_weights"] = relative_weights(routes.weights_TLK[tokens_T])
        return arrays


def _routes_at(routes: Routes, index_TS: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Expert ids and relative weights at these tokens `[T, S, L, K]`; weights are zero where the index is -1."""
    weights_TSLK = relative_weights(routes.weights_TLK[index_TS]) * (index_TS >= 0)[..., None, None]
    return routes.expert_ids_TLK[index_TS].astype(np.int64), weights_TSLK.astype(np.float32)


class RecommendedNetwork(nn.Module):
    """See `Recommended`. D is the width of the state."""

    def __init__(self, shape: Shape, vocabulary_size: int, width: int, token_width: int, times: int, windows: int) -> None:
        super().__init__()
        layers, experts = shape.layers, shape.experts
        self.shape = shape
        self.steps = shape.horizon if shape.task == Task.NEXT_TOKEN else 1
        self.now = PairEmbedding(layers, experts, width) if shape.task == Task.NEXT_LAYER else None
        self.last = PairEmbedding(layers, experts, width)
        self.matches = nn.ModuleList(PairEmbedding(layers, experts, width) for _ in range(self.steps))
        # The weight of a match, by `Matches.order_T`: the length of the matching run. Entry 0 is for tokens without a match.
        self.trust = nn.Parameter(torch.ones(len(RUN_LENGTHS) + 1))
        self.unknown = UnknownTokenDropout(0.1)
        self.order = nn.Embedding(len(RUN_LENGTHS) + 1, width)
        self.position = nn.Embedding(POSITIONS, width)
        self.token = nn.Embedding(vocabulary_size, token_width)
        self.tokens = nn.Linear(TOKENS_BACK * token_width, width)
        self.recent_all = nn.Linear(windows * layers * experts, width)
        self.recent_layer = nn.Parameter(torch.randn(layers, windows * experts, width) * 0.1)
        self.last_all = nn.Linear(width, width)
        self.match_all = nn.Linear(width, width)
        for embedding in (self.order, self.position, self.token):
            nn.init.normal_(embedding.weight, std=0.3)
        self.context = nn.ModuleList(Block(width, times) for _ in range(2))
        # For next-layer, nothing is predicted from the last layer.
        self.layers = layers - (shape.task == Task.NEXT_LAYER)
        self.blocks = nn.ModuleList(Block(width, times) for _ in range(self.layers))
        self.norm_scale = nn.Parameter(torch.ones(layers, 1, width))
        self.head = nn.Parameter(torch.randn(layers, width, shape.horizon * experts) * 0.02)
        self.bias_LHE = nn.Parameter(torch.zeros(layers, shape.horizon, experts))

    def forward(
        self,
        last_ids: torch.Tensor,
        last_weights: torch.Tensor,
        match_ids: torch.Tensor,
        match_weights: torch.Tensor,
        order: torch.Tensor,
        rows: torch.Tensor,
        recent: torch.Tensor,
        position: torch.Tensor,
        now_ids: torch.Tensor | None = None,
        now_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits `[T, L, H, E]`, from the arrays that `Recommended.inputs` returns."""
        tokens, shape = len(order), self.shape
        last_TLD = self.last(last_ids, last_weights)
        trust_T11 = self.trust[order][:, None, None]
        match_TLD = sum(
            (matched(match_ids[:, step], match_weights[:, step]) * trust_T11 for step, matched in enumerate(self.matches)),
            torch.zeros_like(last_TLD),
        )
        by_layer = recent.transpose(1, 2).reshape(tokens, shape.layers, -1)
        recent_TLD = torch.einsum("tli,lid->tld", by_layer, self.recent_layer)
        state_TD = (
            self.tokens(self.token(self.unknown(rows)).view(tokens, -1))
            + self.order(order)
            + self.position(position)
            + self.last_all(last_TLD.sum(1))
            + self.match_all(match_TLD.sum(1))
            # Scaled because the means are of the order of 1 / E. 5 was the first value tried.
            + self.recent_all(5 * recent.reshape(tokens, -1))
        ).float()
        for block in self.context:
            state_TD = state_TD + block(state_TD)
        hints_TLD = last_TLD + match_TLD + recent_TLD
        if self.now is not None and now_ids is not None:
            now_TLD = self.now(now_ids, now_weights)
            # Layer l sees the hints about layer l + 1, which it predicts first.
            hints_TLD = hints_TLD[:, 1:]
        states = []
        for layer, block in enumerate(self.blocks):
            hint_TD = hints_TLD[:, layer]
            if self.now is not None:
                state_TD = state_TD + now_TLD[:, layer]
            state_TD = state_TD + block(state_TD + hint_TD)
            states.append(state_TD + hint_TD)
        states_LTD = nn.functional.layer_norm(torch.stack(states), state_TD.shape[-1:]) * self.norm_scale[: self.layers]
        logits_LTO = torch.bmm(states_LTD, self.head[: self.layers])
        logits_TLHE = logits_LTO.transpose(0, 1).reshape(tokens, self.layers, shape.horizon, shape.experts).float()
        if self.layers < shape.layers:
            logits_TLHE = nn.functional.pad(logits_TLHE, (0, 0, 0, 0, 0, 1))
        return logits_TLHE + self.bias_LHE


class UnknownTokenDropout(nn.Module):
    """Replaces random token rows with row 0, that of unknown tokens, during training.

    New texts contain tokens without their own embedding; the network must learn to predict without one.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return rows
        return rows * (torch.rand(rows.shape, device=rows.device) >= self.share)
