"""Linear predictors on the router input of this layer, which is known before the next layer's attention runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from profiler.errors import SpecmoeError
from speculation.data.routes import Routes, RouteSource, router_input_scale, router_inputs_of
from speculation.data.tasks import Shape, Task
from speculation.predictors.neural.base import NetworkConfig, NeuralPredictor
from speculation.predictors.options import Epochs, Progress, TrainingOptions


class PreAttention(NeuralPredictor):
    """For each layer, a logistic regression on its router input for the experts of the layers after it.

    The width of its network is D, that of the trace's router inputs.
    """

    name: ClassVar[str] = "pre-attention"
    about: ClassVar[str] = "a linear layer per MoE layer on its router input, fitted to the experts of the next"
    source: ClassVar[str] = "predictors on activations before attention"
    sees: ClassVar[str] = "router input of layer l (hidden/)"
    tasks: ClassVar[frozenset[Task]] = frozenset({Task.NEXT_LAYER})
    needs_router_inputs: ClassVar[bool] = True
    default_width: ClassVar[int] = 1
    defaults: ClassVar[TrainingOptions] = TrainingOptions(epochs=15, batch_tokens=128, learning_rate=5e-3, average=300)

    def build(self, vocabulary_size: int) -> nn.Module:
        return LinearNetwork(self.shape, self.config.width)

    def fit(
        self,
        train: RouteSource,
        validation: RouteSource | None,
        options: TrainingOptions,
        on_progress: Progress,
        out: Path | None = None,
    ) -> Epochs:
        if options.width is not None:
            raise SpecmoeError(f"{self.name} is as wide as the router inputs: leave out width")
        self.config = NetworkConfig(width=router_inputs_of(train.group(0), self.name).hidden_TLD.shape[2])
        return super().fit(train, validation, options, on_progress, out)

    def prepare(self, train: RouteSource) -> None:
        super().prepare(train)
        scale: Any = self.network.scale
        scale.copy_(torch.from_numpy(router_input_scale(train, self.name)))

    def inputs(self, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        return {"hidden": router_inputs_of(routes, self.name, self.config.width).hidden_TLD[tokens_T].astype(np.float32)}

    @classmethod
    def parameters_for(cls, shape: Shape) -> int | None:
        return None


class LinearNetwork(nn.Module):
    """See `PreAttention`."""

    scale: torch.Tensor

    def __init__(self, shape: Shape, width: int) -> None:
        super().__init__()
        self.outputs = (shape.horizon, shape.experts)
        self.register_buffer("scale", torch.ones(shape.layers, width))
        self.dropout = nn.Dropout(0.1)
        self.weight = nn.Parameter(torch.zeros(shape.layers, width, shape.horizon * shape.experts))
        self.bias_LHE = nn.Parameter(torch.zeros(shape.layers, *self.outputs))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[T, L, H, E]`."""
        scaled = self.dropout(hidden * self.scale)
        logits: torch.Tensor = torch.einsum("tld,ldo->tlo", scaled, self.weight).float()
        return logits.reshape(*logits.shape[:2], *self.outputs) + self.bias_LHE
