"""What the predictors with a context of several tokens share: its routes as arrays, and their embedding for every layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from profiler.errors import SpecmoeError
from speculation.data.routes import Routes, RouteSource, each_group
from speculation.data.tasks import Shape, Task
from speculation.predictors.features import last_known, token_rows
from speculation.predictors.neural.base import (
    NetworkConfig,
    NeuralPredictor,
    PairEmbedding,
    RouterInputEmbedding,
    relative_weights,
)
from speculation.predictors.options import TrainingOptions

TOKEN_WIDTH = 32


class ContextPredictor(NeuralPredictor):
    """Sees the routes of C tokens, from the oldest to the token that it predicts at, and the identity of that token."""

    sees: ClassVar[str] = "routes of the last few tokens, which token it is"
    max_vocabulary: ClassVar[int] = 4096

    def default_context(self) -> int:
        return 3

    def config_for(self, options: TrainingOptions, train: RouteSource) -> NetworkConfig:
        config = super().config_for(options, train)
        if not options.adaptive_context:
            return config
        spreads = []
        for routes in each_group(train):
            known_T = last_known(routes, self.shape, np.arange(len(routes)))
            spreads.append(uncertainty(routes, known_T[known_T >= 0]))
        spread_T = np.concatenate(spreads)
        if len(np.unique(spread_T)) < 2:
            raise SpecmoeError("adaptive_context needs routing weights that differ: all tokens are routed with equal certainty")
        return replace(config, uncertain_above=float(np.median(spread_T)))

    def inputs(self, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        index_TC = tokens_T[:, None] - np.arange(self.config.context - 1, -1, -1)
        is_known_TC = index_TC >= routes.first_T[tokens_T, None]
        if self.config.uncertain_above is not None:
            known_T = np.maximum(last_known(routes, self.shape, tokens_T), 0)
            is_known_TC[uncertainty(routes, known_T) <= self.config.uncertain_above, :-2] = False
        if self.shape.task == Task.WHOLE_PATH:
            is_known_TC[:, -1] = False
        index_TC = np.maximum(index_TC, 0)
        return {
            "ids": routes.expert_ids_TLK[index_TC].astype(np.int64),
            "weights": relative_weights(routes.weights_TLK[index_TC]) * is_known_TC[:, :, None, None].astype(np.float32),
            "row": token_rows(self.keys, routes.token_keys_T[tokens_T]),
        } | self.hidden_of(routes, tokens_T)


def uncertainty(routes: Routes, tokens_T: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """How evenly each token's routing weights are spread, 0 to 1 `[T]`: their entropy over log K, averaged over layers."""
    share_TLK = relative_weights(routes.weights_TLK[tokens_T])
    bits_TL = -(share_TLK * np.log2(np.maximum(share_TLK, 1e-9))).sum(-1)
    return np.asarray(bits_TL.mean(1) / max(np.log2(share_TLK.shape[2]), 1e-9), dtype=np.float32).clip(0, 1)


class ContextEmbedding(nn.Module):
    """Embeds what the prediction at each layer may see of each token of the context.

    Takes expert ids and weights `[T, C, L, K]` and token rows `[T]`, returns `[T, L, C, D]`. Of an earlier token, layer l sees
    the route at l, the route at l + 1 (next-layer only), and the sum over all layers. Of the last token it sees what the task
    allows: for next-layer, the routes up to l.
    """

    def __init__(self, shape: Shape, vocabulary_size: int, context: int, width: int, hidden: int = 0) -> None:
        super().__init__()
        self.is_next_layer = shape.task == Task.NEXT_LAYER
        self.here = PairEmbedding(shape.layers, shape.experts, width)
        self.sum = PairEmbedding(shape.layers, shape.experts, width)
        self.ahead = PairEmbedding(shape.layers, shape.experts, width) if self.is_next_layer else None
        self.token = nn.Sequential(nn.Embedding(vocabulary_size, TOKEN_WIDTH), nn.Linear(TOKEN_WIDTH, width, bias=False))
        self.layer = nn.Parameter(torch.randn(shape.layers, 1, width) * 0.1)
        self.slot = nn.Parameter(torch.randn(context, width) * 0.1)
        self.hidden = RouterInputEmbedding(shape.layers, hidden, width) if hidden else None

    def forward(
        self, ids: torch.Tensor, weights: torch.Tensor, row: torch.Tensor, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        tokens, context, layers, top_k = ids.shape
        flat = ids.view(-1, layers, top_k), weights.view(-1, layers, top_k)
        known_TCLD = self.here(*flat).view(tokens, context, layers, -1)
        each_TCLD = self.sum(*flat).view(tokens, context, layers, -1)
        sum_TCLD = each_TCLD.sum(2, keepdim=True).expand_as(known_TCLD)
        last_TLD = known_TCLD[:, -1] + self.token(row)[:, None]
        if self.ahead is None:
            last_TLD = last_TLD + sum_TCLD[:, -1]
        else:
            # A cumulative sum, because layer l must not see the token's routes at later layers.
            last_TLD = last_TLD + each_TCLD[:, -1].cumsum(1)
            ahead_TCLD = self.ahead(*flat).view(tokens, context, layers, -1)
            known_TCLD = known_TCLD + nn.functional.pad(ahead_TCLD[:, :, 1:], (0, 0, 0, 1))
        if self.hidden is not None:
            last_TLD = last_TLD + self.hidden(hidden)
        earlier_TCLD = known_TCLD[:, :-1] + sum_TCLD[:, :-1]
        embedded: torch.Tensor = torch.cat([earlier_TCLD, last_TLD[:, None]], dim=1).transpose(1, 2) + self.layer + self.slot
        return embedded


class LayerHead(nn.Module):
    """Maps states `[T, L, D]` to logits `[T, L, H, E]`, with separate weights per layer or shared ones."""

    def __init__(self, shape: Shape, width: int, *, is_shared: bool = False) -> None:
        super().__init__()
        self.outputs = (shape.horizon, shape.experts)
        self.norm = nn.LayerNorm(width)
        heads = 1 if is_shared else shape.layers
        self.weight = nn.Parameter(torch.randn(heads, width, shape.horizon * shape.experts) * 0.02)

    def forward(self, state_TLD: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = torch.einsum(
            "tld,ldo->tlo", self.norm(state_TLD), self.weight.expand(state_TLD.shape[1], -1, -1)
        )
        return logits.reshape(*logits.shape[:2], *self.outputs)


class ContextNetwork(nn.Module, ABC):
    """A network on top of `ContextEmbedding`. Subclasses compute `states`; a `LayerHead` maps them to logits."""

    def __init__(
        self, shape: Shape, vocabulary_size: int, context: int, width: int, *, hidden: int = 0, is_shared: bool = False
    ) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = ContextEmbedding(shape, vocabulary_size, context, width, hidden)
        self.head = LayerHead(shape, width, is_shared=is_shared)
        self.bias_LHE = nn.Parameter(torch.zeros(shape.layers, shape.horizon, shape.experts))

    @abstractmethod
    def states(self, embedded_TLCD: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        """A state for each layer's prediction `[T, L, D]`, from the embedded context `[T, L, C, D]`."""

    def forward(self, ids: torch.Tensor, weights: torch.Tensor, row: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        """Logits `[T, L, H, E]`."""
        embedded_TLCD = self.embedding(ids, weights, row, more.pop("hidden", None))
        logits: torch.Tensor = self.head(self.states(embedded_TLCD, **more))
        return logits.float() + self.bias_LHE


class Encoder(nn.Module):
    """A transformer encoder over the layers `[T, L, D]`. For next-layer, it is causal: no layer attends to a later one."""

    def __init__(self, shape: Shape, width: int, depth: int, heads: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        later = torch.ones(shape.layers, shape.layers).triu(1).bool() if shape.task == Task.NEXT_LAYER else None
        self.register_buffer("later", later, persistent=False)

    def forward(self, state_TLD: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.encoder(state_TLD, mask=self.later))
