"""A pattern model and a statistics model, each weighted by its confidence; abstains where the confidence is low."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from speculation.data.history import ABSTAIN, History, Prediction
from speculation.data.routes import Routes
from speculation.data.tasks import Shape
from speculation.predictors.neural.base import mean_cross_entropy
from speculation.predictors.neural.context import ContextPredictor
from speculation.predictors.neural.interlayer_lstm import LstmNetwork
from speculation.predictors.neural.statistics_aware import StatisticsNetwork, statistics_of
from speculation.predictors.options import TrainingOptions


class Ensemble(ContextPredictor):
    """An LSTM over the routes and an MLP over statistics, trained together with a loss for each and a loss for their mean.

    A model's confidence in a prediction is the mean probability of its top K experts. The logits of the two models are averaged
    with these confidences as weights. Where the confidence of the result is below `threshold`, `predict` abstains.
    `probabilities` never abstains; the evaluation's precision by coverage shows what abstaining gains at each threshold.
    """

    name: ClassVar[str] = "ensemble"
    about: ClassVar[str] = "LSTM over routes and MLP over statistics, weighted by confidence; abstains where it is unsure"
    source: ClassVar[str] = "confidence filtering of expert prefetching"
    sees: ClassVar[str] = "routes of the last few tokens, statistics of the last 256, which token it is and its type"
    threshold: ClassVar[float] = 0.5
    default_width: ClassVar[int] = 128
    defaults: ClassVar[TrainingOptions] = TrainingOptions(epochs=5, batch_tokens=256, learning_rate=1.5e-3)

    def build(self, vocabulary_size: int) -> nn.Module:
        return EnsembleNetwork(self.shape, vocabulary_size, self.config.context, self.config.width)

    def predict(self, history: History) -> Prediction:
        """Predict as every predictor does, except that all ids are ABSTAIN and all scores 0 where the ensemble abstains."""
        found = super().predict(history)
        is_sure = found.scores[..., : self.shape.top_k].mean(-1, keepdims=True) >= self.threshold
        return Prediction(np.where(is_sure, found.expert_ids, ABSTAIN), np.where(is_sure, found.scores, np.float32(0)))

    def inputs(self, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        return super().inputs(routes, tokens_T) | statistics_of(self.shape, routes, tokens_T)

    def loss(self, network: nn.Module, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> torch.Tensor:
        truth = self.truth(routes, tokens_T)
        each = network(**self.tensors(routes, tokens_T), each=True)
        return torch.stack([mean_cross_entropy(logits_TLHE, *truth) for logits_TLHE in each]).mean()


class EnsembleNetwork(nn.Module):
    """See `Ensemble`."""

    def __init__(self, shape: Shape, vocabulary_size: int, context: int, width: int) -> None:
        super().__init__()
        self.top_k = shape.top_k
        self.pattern = LstmNetwork(shape, vocabulary_size, context, width)
        self.statistics = StatisticsNetwork(shape, vocabulary_size, context, width)
        # Added to both models; each has its own bias as well.
        self.bias_LHE = nn.Parameter(torch.zeros(shape.layers, shape.horizon, shape.experts))

    def forward(
        self, ids: torch.Tensor, weights: torch.Tensor, row: torch.Tensor, each: bool = False, **more: torch.Tensor
    ) -> Any:
        """Logits `[T, L, H, E]`; each: a tuple of those of the weighted mean, the pattern model and the statistics model."""
        models = self.pattern(ids, weights, row), self.statistics(ids, weights, row, **more)
        stacked = torch.stack(models) + self.bias_LHE
        confidence = stacked.sigmoid().topk(self.top_k, dim=-1).values.mean(-1, keepdim=True)
        combined = (stacked * confidence).sum(0) / confidence.sum(0)
        return (combined, *stacked) if each else combined
