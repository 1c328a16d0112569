"""A transformer over the layers."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from speculation.data.routes import Routes
from speculation.data.tasks import Shape, targets
from speculation.predictors.neural.base import mean_cross_entropy
from speculation.predictors.neural.context import ContextNetwork, ContextPredictor, Encoder
from speculation.predictors.options import TrainingOptions


class Transformer(ContextPredictor):
    """A transformer of 6 layers, width 512 and 8 heads, over the model's layers; each one sees a context of three tokens.

    Two losses are added: one for the set of experts, and one for the strongest expert.
    """

    name: ClassVar[str] = "transformer"
    about: ClassVar[str] = "transformer of 6 layers over the model's layers; losses for the set and for the strongest expert"
    source: ClassVar[str] = "the usual large architecture, applied to routes"
    can_share: ClassVar[bool] = True
    can_take_router_inputs: ClassVar[bool] = True
    width_multiple: ClassVar[int] = 8
    default_width: ClassVar[int] = 512
    defaults: ClassVar[TrainingOptions] = TrainingOptions(epochs=2, batch_tokens=128, learning_rate=3e-4, warm_up=0.1)

    def build(self, vocabulary_size: int) -> nn.Module:
        config = self.config
        return TransformerNetwork(
            self.shape, vocabulary_size, config.context, config.width, config.hidden, is_shared=config.shared_layers
        )

    def loss(self, network: nn.Module, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> torch.Tensor:
        true_TLHE, is_valid_TLH = self.truth(routes, tokens_T)
        logits_TLHE = network(**self.tensors(routes, tokens_T))
        strongest_TLH = np.stack(
            [targets(routes, self.shape, tokens_T, hop).ids_TLK[:, :, 0] for hop in range(1, self.shape.horizon + 1)], axis=2
        )
        strongest = torch.from_numpy(strongest_TLH.astype(np.int64)).to(logits_TLHE.device)
        losses = nn.functional.cross_entropy(logits_TLHE.float().flatten(0, 2), strongest.flatten(), reduction="none")
        first_loss = (losses.view_as(is_valid_TLH) * is_valid_TLH).sum() / is_valid_TLH.sum().clamp(min=1)
        return mean_cross_entropy(logits_TLHE, true_TLHE, is_valid_TLH) + 0.02 * first_loss


class TransformerNetwork(ContextNetwork):
    """See `Transformer`."""

    def __init__(
        self, shape: Shape, vocabulary_size: int, context: int, width: int, hidden: int = 0, *, is_shared: bool = False
    ) -> None:
        super().__init__(shape, vocabulary_size, context, width, hidden=hidden, is_shared=is_shared)
        self.join = nn.Linear(context * width, width)
        self.encoder = Encoder(shape, width, depth=6, heads=8)

    def states(self, embedded_TLCD: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        state_TLD: torch.Tensor = self.encoder(self.join(embedded_TLCD.flatten(2)) + embedded_TLCD[:, :, -1])
        return state_TLD
