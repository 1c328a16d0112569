"""Prediction without training: apply the router of a later layer to the router input of this layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from profiler.errors import SpecmoeError
from speculation.data.routes import Routes, RouteSource, router_inputs_of
from speculation.data.tasks import Shape, Task
from speculation.predictors.base import Arrays, Predictor, expected_array, stored_weights
from speculation.predictors.options import Epochs, Progress, TrainingOptions

MAX_WIDTH = 65_536


class NextGate(Predictor):
    """P = K times the softmax of the router of layer l+h, applied to the router input of layer l.

    This works because the residual stream changes little from layer to layer. The router input is normalized with the scale of
    layer l, which is not corrected. If the model selects experts by sigmoid scores with a correction, those rank the experts.
    """

    name: ClassVar[str] = "next-gate"
    about: ClassVar[str] = "training-free: the router of layer l + h on the router input of layer l"
    source: ClassVar[str] = "expert prefetching by the next layer's gate (arXiv:2312.17238)"
    sees: ClassVar[str] = "router input of layer l (hidden/), the routers' weights (gates.safetensors)"
    tasks: ClassVar[frozenset[Task]] = frozenset({Task.NEXT_LAYER})
    needs_router_inputs: ClassVar[bool] = True

    def __init__(self, shape: Shape, width: int = 1) -> None:
        super().__init__(shape)
        self._weight_LED = np.zeros((shape.layers, shape.experts, width), dtype=np.float32)
        self._bias_LE = np.zeros((shape.layers, shape.experts), dtype=np.float32)
        # Added to the sigmoid scores; NaN if the model selects experts by the logits themselves.
        self._correction_LE = np.full((shape.layers, shape.experts), np.nan, dtype=np.float32)

    def fit(
        self,
        train: RouteSource,
        validation: RouteSource | None,
        options: TrainingOptions,
        on_progress: Progress,
        out: Path | None = None,
    ) -> Epochs:
        inputs = router_inputs_of(train.group(0), self.name)
        self._weight_LED, self._bias_LE = stored_weights(inputs.weight_LED).astype(np.float32), inputs.bias_LE
        if inputs.correction_LE is not None:
            self._correction_LE = inputs.correction_LE
        return []

    def probabilities(self, routes: Routes, tokens: slice) -> npt.NDArray[np.float32]:
        shape = self.shape
        hidden_TLD = router_inputs_of(routes, self.name, self._weight_LED.shape[2]).hidden_TLD[tokens].astype(np.float32)
        result_TLHE = np.zeros((len(hidden_TLD), shape.layers, shape.horizon, shape.experts), dtype=np.float32)
        for hop in range(1, shape.horizon + 1):
            for layer, target in enumerate(shape.target_layers(hop)):
                if target < 0:
                    continue
                logits_TE = hidden_TLD[:, layer] @ self._weight_LED[target].T + self._bias_LE[target]
                correction_E = self._correction_LE[target]
                if np.isfinite(correction_E).all():
                    score_TE = 1 / (1 + np.exp(-logits_TE)) + correction_E
                    logits_TE = np.log(np.maximum(score_TE, 1e-6))
                share_TE = np.exp(logits_TE - logits_TE.max(1, keepdims=True))
                chance_TE = shape.top_k * share_TE / share_TE.sum(1, keepdims=True)
                # K times a share can exceed 1. p / (1 + p) stays below 1 and keeps the ranking.
                result_TLHE[:, layer, hop - 1] = chance_TE / (1 + chance_TE)
        return result_TLHE

    @classmethod
    def parameters_for(cls, shape: Shape) -> int | None:
        return None

    def arrays(self) -> Arrays:
        arrays: Arrays = {"weight_LED": stored_weights(self._weight_LED), "bias_LE": self._bias_LE}
        return arrays | ({"correction_LE": self._correction_LE} if np.isfinite(self._correction_LE).all() else {})

    @classmethod
    def restore(cls, shape: Shape, settings: dict[str, Any], arrays: Arrays) -> Self:
        weight = arrays.get("weight_LED")
        if weight is None or weight.ndim != 3 or not 1 <= weight.shape[2] <= MAX_WIDTH:
            raise SpecmoeError(f"stored predictor: expected 'weight_LED' of 3 dimensions, the last at most {MAX_WIDTH:,}")
        predictor = cls(shape)
        predictor._weight_LED = expected_array(arrays, "weight_LED", (shape.layers, shape.experts, weight.shape[2]))
        predictor._bias_LE = expected_array(arrays, "bias_LE", (shape.layers, shape.experts))
        if "correction_LE" in arrays:
            predictor._correction_LE = expected_array(arrays, "correction_LE", (shape.layers, shape.experts))
        return predictor
