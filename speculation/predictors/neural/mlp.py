"""A residual MLP over routes: the token's at layers <= l, and the preceding token's."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from speculation.data.routes import Routes
from speculation.data.tasks import Shape, Task
from speculation.predictors.features import token_rows
from speculation.predictors.neural.base import NeuralPredictor, RouterInputEmbedding, relative_weights
from speculation.predictors.options import TrainingOptions

TOKEN_WIDTH = 16
BLOCKS = 2


class MlpPredictor(NeuralPredictor):
    """Inputs for layer l: the token's routes at layers <= l, all routes of the preceding token, and the token's identity.

    One network serves all layers; a head per layer gives E logits for each of the H layers ahead.
    """

    name: ClassVar[str] = "mlp"
    about: ClassVar[str] = "residual MLP over the routes of layers <= l, the preceding token's routes and the token"
    source: ClassVar[str] = "the usual small architecture, applied to routes"
    sees: ClassVar[str] = "routes of layers <= l, of the preceding token, which token it is; optionally router inputs"
    default_width: ClassVar[int] = 80
    tasks: ClassVar[frozenset[Task]] = frozenset({Task.NEXT_LAYER})
    can_take_router_inputs: ClassVar[bool] = True
    defaults: ClassVar[TrainingOptions] = TrainingOptions(epochs=30, batch_tokens=256, warm_up=0.05)

    def build(self, vocabulary_size: int) -> nn.Module:
        return RouteNetwork(self.shape, vocabulary_size, self.config.width, self.config.hidden)

    def inputs(self, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        previous_T = routes.previous_T[tokens_T]
        # A first token has no predecessor: index -1 reads another token's routes, whose weights are set to zero.
        has_previous_T = (previous_T >= 0).astype(np.float32)
        inputs: dict[str, npt.NDArray[Any]] = {
            "ids_TLK": routes.expert_ids_TLK[tokens_T].astype(np.int64),
            "weights_TLK": relative_weights(routes.weights_TLK[tokens_T]) * self.shape.top_k,
            "previous_ids_TLK": routes.expert_ids_TLK[previous_T].astype(np.int64),
            "previous_weights_TLK": relative_weights(routes.weights_TLK[previous_T])
            * (self.shape.top_k * has_previous_T)[:, None, None],
            "token_row_T": token_rows(self.keys, routes.token_keys_T[tokens_T]),
        }
        return inputs | self.hidden_of(routes, tokens_T)


class RouteNetwork(nn.Module):
    """A residual MLP over sums of (layer, expert) embeddings, weighted by the routing weights.

    The token's own embeddings are summed cumulatively over layers, so that layer l sees no later layer.
    """

    offset_L: torch.Tensor

    def __init__(self, shape: Shape, vocabulary_size: int, width: int, hidden: int = 0) -> None:
        super().__init__()
        self.shape = shape
        pairs = shape.layers * shape.experts
        self.seen = nn.Embedding(pairs, width)
        self.current = nn.Embedding(pairs, width)
        self.previous = nn.Embedding(pairs, width)
        self.previous_ahead = nn.Embedding(pairs, width)
        self.token = nn.Sequential(nn.Embedding(vocabulary_size, TOKEN_WIDTH), nn.Linear(TOKEN_WIDTH, width, bias=False))
        self.layer = nn.Embedding(shape.layers, width)
        self.hidden = RouterInputEmbedding(shape.layers, hidden, width) if hidden else None
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width)
            )
            for _ in range(BLOCKS)
        )
        self.norm = nn.LayerNorm(width)
        outputs = shape.horizon * shape.experts
        self.head = nn.Parameter(torch.randn(shape.layers, width, outputs) * 0.01)
        self.bias_LHE = nn.Parameter(torch.zeros(shape.layers, shape.horizon, shape.experts))
        for embedding in (self.seen, self.current, self.previous, self.previous_ahead, self.layer):
            nn.init.normal_(embedding.weight, std=0.1)
        self.register_buffer("offset_L", torch.arange(shape.layers)[:, None] * shape.experts, persistent=False)

    def forward(
        self,
        ids_TLK: torch.Tensor,
        weights_TLK: torch.Tensor,
        previous_ids_TLK: torch.Tensor,
        previous_weights_TLK: torch.Tensor,
        token_row_T: torch.Tensor,
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits `[T, L, H, E]`."""
        now, before = ids_TLK + self.offset_L, previous_ids_TLK + self.offset_L
        seen_TLD = _weighted(self.seen(now), weights_TLK).cumsum(1)
        previous_TD = _weighted(self.previous(before), previous_weights_TLK).sum(1)
        ahead_TLD = _weighted(self.previous_ahead(before), previous_weights_TLK)
        # Layer l sees the preceding token's route at layer l + 1, which it predicts first.
        ahead_TLD = torch.cat([ahead_TLD[:, 1:], torch.zeros_like(ahead_TLD[:, :1])], dim=1)
        per_token_TD = previous_TD + self.token(token_row_T)
        state = seen_TLD + _weighted(self.current(now), weights_TLK) + ahead_TLD + per_token_TD[:, None] + self.layer.weight
        if self.hidden is not None:
            state = state + self.hidden(hidden)
        for block in self.blocks:
            state = state + block(state)
        logits = torch.einsum("tld,ldo->tlo", self.norm(state), self.head)
        return logits.view(*logits.shape[:2], self.shape.horizon, self.shape.experts) + self.bias_LHE


def _weighted(embedded_TLKD: torch.Tensor, weights_TLK: torch.Tensor) -> torch.Tensor:
    return torch.einsum("tlkd,tlk->tld", embedded_TLKD, weights_TLK)
