"""An LSTM over the routes of the last few tokens."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from speculation.data.tasks import Shape
from speculation.predictors.neural.context import ContextNetwork, ContextPredictor
from speculation.predictors.options import TrainingOptions

# Models with at least this many experts per layer get one more token of context.
FINE_GRAINED = 48


class InterlayerLstm(ContextPredictor):
    """For each layer, an LSTM of width 256 reads the embedded routes of three tokens, or four for fine-grained models."""

    name: ClassVar[str] = "interlayer-lstm"
    about: ClassVar[str] = "LSTM over the embedded routes of the last three or four tokens"
    source: ClassVar[str] = "recurrent predictors of expert prefetching"
    can_share: ClassVar[bool] = True
    default_width: ClassVar[int] = 256
    defaults: ClassVar[TrainingOptions] = TrainingOptions(epochs=4, batch_tokens=256, learning_rate=1e-3)

    def default_context(self) -> int:
        return 4 if self.shape.experts >= FINE_GRAINED else 3

    def build(self, vocabulary_size: int) -> nn.Module:
        return LstmNetwork(
            self.shape, vocabulary_size, self.config.context, self.config.width, is_shared=self.config.shared_layers
        )


class LstmNetwork(ContextNetwork):
    """See `InterlayerLstm`."""

    def __init__(self, shape: Shape, vocabulary_size: int, context: int, width: int, *, is_shared: bool = False) -> None:
        super().__init__(shape, vocabulary_size, context, width, is_shared=is_shared)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.dropout = nn.Dropout(0.1)

    def states(self, embedded_TLCD: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        tokens, layers, context, width = embedded_TLCD.shape
        out, _ = self.lstm(embedded_TLCD.reshape(-1, context, width))
        return torch.as_tensor(self.dropout(out[:, -1]).view(tokens, layers, -1) + embedded_TLCD[:, :, -1])
