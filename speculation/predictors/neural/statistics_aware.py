"""A network that sees statistics of the routing in addition to the routes of the last few tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from analysis.statistics.load import entropy
from speculation.data.repeats import RUN_LENGTHS
from speculation.data.routes import Routes
from speculation.data.tasks import Shape, Task
from speculation.predictors.features import recent_use
from speculation.predictors.neural.base import Block
from speculation.predictors.neural.context import ContextNetwork, ContextPredictor
from speculation.predictors.options import TrainingOptions

# Lengths in tokens of the two windows, recent and historical, over which the use of experts is averaged.
WINDOWS = (16, 256)
# Token types: prompt or generated, times the length of the longest run of tokens that occurred before.
TYPES = 2 * (len(RUN_LENGTHS) + 1)


class StatisticsAware(ContextPredictor):
    """An MLP over the routes of the last few tokens and, for each layer:

    - the frequency of every expert over the last 16 and 256 tokens;
    - the entropy of these frequencies;
    - the share of experts that were used (diversity);
    - the token's type: prompt or generated, and the length of the run of tokens, ending with it, that occurred earlier.
    """

    name: ClassVar[str] = "statistics-aware"
    about: ClassVar[str] = "MLP over the routes of three tokens and statistics: usage entropy, diversity, frequency, token type"
    source: ClassVar[str] = "statistics of routing as features"
    sees: ClassVar[str] = "routes of the last few tokens, statistics of the last 256, which token it is and its type"
    default_width: ClassVar[int] = 128
    defaults: ClassVar[TrainingOptions] = TrainingOptions(epochs=6, batch_tokens=256, learning_rate=1.5e-3)

    def build(self, vocabulary_size: int) -> nn.Module:
        return StatisticsNetwork(self.shape, vocabulary_size, self.config.context, self.config.width)

    def inputs(self, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        return super().inputs(routes, tokens_T) | statistics_of(self.shape, routes, tokens_T)


def statistics_of(shape: Shape, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
    """The inputs `statistics` `[T, L, S]`, about the layer that is predicted first, and `type` `[T]`."""
    known_T = tokens_T if shape.task == Task.NEXT_TOKEN else routes.previous_T[tokens_T]
    use_TWLE = recent_use(routes, tokens_T, known_T, shape.experts, WINDOWS)
    bits_TWL = entropy(use_TWLE.astype(np.float64)) / np.log2(max(shape.experts, 2))
    diversity_TWL = (use_TWLE > 0).mean(-1)
    features = [
        (use_TWLE * shape.experts / shape.top_k).transpose(0, 2, 1, 3).reshape(len(tokens_T), shape.layers, -1),
        np.stack([bits_TWL, diversity_TWL], -1).transpose(0, 2, 1, 3).reshape(len(tokens_T), shape.layers, -1),
    ]
    statistics_TLS = np.concatenate(features, axis=-1).astype(np.float32)
    if shape.task == Task.NEXT_LAYER:
        statistics_TLS = np.concatenate([statistics_TLS[:, 1:], np.zeros_like(statistics_TLS[:, :1])], axis=1)
    return {
        "statistics": np.ascontiguousarray(statistics_TLS),
        "type": 2 * routes.matches.order_T[tokens_T] + routes.is_decode_T[tokens_T],
    }


class StatisticsNetwork(ContextNetwork):
    """See `StatisticsAware`."""

    def __init__(self, shape: Shape, vocabulary_size: int, context: int, width: int) -> None:
        super().__init__(shape, vocabulary_size, context, width)
        features = len(WINDOWS) * (shape.experts + 2)
        self.join = nn.Linear(context * width, width)
        self.statistics = nn.Parameter(torch.randn(shape.layers, features, width) * 0.1)
        self.of_type = nn.Embedding(TYPES, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(2))

    def states(self, embedded_TLCD: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        state_TLD = self.join(embedded_TLCD.flatten(2)) + embedded_TLCD[:, :, -1]
        state_TLD = state_TLD + torch.einsum("tls,lsd->tld", more["statistics"], self.statistics)
        state_TLD = (state_TLD + self.of_type(more["type"])[:, None]).float()
        for block in self.blocks:
            state_TLD = state_TLD + block(state_TLD)
        return torch.as_tensor(state_TLD)
