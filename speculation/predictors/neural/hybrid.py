"""Shared features with two heads: a linear one for h = 1, and a small transformer over all h."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from speculation.data.routes import Routes
from speculation.data.tasks import Shape
from speculation.predictors.neural.base import mean_cross_entropy
from speculation.predictors.neural.context import ContextEmbedding, ContextPredictor, LayerHead
from speculation.predictors.options import TrainingOptions

FEATURES = 512


class Hybrid(ContextPredictor):
    """512 features of the context feed two heads: a sigmoid head for h = 1, and a transformer of 2 layers over the sequence
    h = 1..H, with an embedding for each position. Both are trained; for h = 1 their logits are added.
    """

    name: ClassVar[str] = "hybrid"
    about: ClassVar[str] = "512 shared features; a sigmoid head for h = 1, a transformer of 2 layers over h = 1..H"
    source: ClassVar[str] = "joint prediction of current and upcoming experts"
    can_take_router_inputs: ClassVar[bool] = True
    default_width: ClassVar[int] = 64
    defaults: ClassVar[TrainingOptions] = TrainingOptions(epochs=6, batch_tokens=256, learning_rate=1.5e-3)

    def build(self, vocabulary_size: int) -> nn.Module:
        return HybridNetwork(self.shape, vocabulary_size, self.config.context, self.config.width, self.config.hidden)

    def loss(self, network: nn.Module, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> torch.Tensor:
        """The loss of all predictions, plus half the loss of the first head alone."""
        true_TLHE, is_valid_TLH = self.truth(routes, tokens_T)
        logits_TLHE, first_TLHE = network(**self.tensors(routes, tokens_T), with_first=True)
        first_loss = mean_cross_entropy(first_TLHE, true_TLHE[:, :, :1], is_valid_TLH[:, :, :1])
        return mean_cross_entropy(logits_TLHE, true_TLHE, is_valid_TLH) + 0.5 * first_loss


class HybridNetwork(nn.Module):
    """See `Hybrid`."""

    def __init__(self, shape: Shape, vocabulary_size: int, context: int, width: int, hidden: int = 0) -> None:
        one = Shape(layers=shape.layers, experts=shape.experts, top_k=shape.top_k, horizon=1, task=shape.task)
        super().__init__()
        self.shape = shape
        self.embedding = ContextEmbedding(shape, vocabulary_size, context, width, hidden)
        self.head = LayerHead(one, FEATURES)
        self.shared = nn.Sequential(
            nn.Linear(context * width, FEATURES), nn.GELU(), nn.Dropout(0.1), nn.Linear(FEATURES, FEATURES), nn.GELU()
        )
        inner = FEATURES // 4
        self.enter = nn.Linear(FEATURES, inner)
        self.position = nn.Parameter(torch.randn(shape.horizon, inner) * 0.3)
        layer = nn.TransformerEncoderLayer(inner, 4, 2 * inner, 0.1, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.bias_LHE = nn.Parameter(torch.zeros(shape.layers, shape.horizon, shape.experts))
        self.out = nn.Parameter(torch.randn(shape.layers, inner, shape.experts) * 0.02)

    def forward(
        self,
        ids: torch.Tensor,
        weights: torch.Tensor,
        row: torch.Tensor,
        hidden: torch.Tensor | None = None,
        with_first: bool = False,
    ) -> Any:
        """Logits `[T, L, H, E]`; with_first: also those of the first head alone `[T, L, 1, E]`."""
        features_TLD = self.shared(self.embedding(ids, weights, row, hidden).flatten(2))
        first_TLHE = self.head(features_TLD).float()
        steps = self.enter(features_TLD)[:, :, None] + self.position
        steps = self.encoder(steps.flatten(0, 1)).unflatten(0, features_TLD.shape[:2])
        logits_TLHE = torch.einsum("tlhd,lde->tlhe", steps, self.out).float()
        logits_TLHE = logits_TLHE + nn.functional.pad(first_TLHE, (0, 0, 0, self.shape.horizon - 1)) + self.bias_LHE
        return (logits_TLHE, first_TLHE + self.bias_LHE[:, :1]) if with_first else logits_TLHE
