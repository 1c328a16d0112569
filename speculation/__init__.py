"""Expert predictors: train them on traces, evaluate them, and measure what their predictions are worth to a cache of experts.

A runtime loads a trained predictor with `load_predictor` and feeds it one token and one layer at a time through a `History`.
To evaluate many tokens at once, use `load_run` and `load_routes`. `OffloadedModel` runs a model whose experts do not fit on the
device.

Names are imported on first use, because counting predictors do not need torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speculation.data.history import History, Prediction
    from speculation.data.routes import Routes, load_routes
    from speculation.data.tasks import Shape, Task
    from speculation.predictors.base import Predictor
    from speculation.runtime.generation import Generation
    from speculation.runtime.model import OffloadedModel
    from speculation.runtime.options import CacheSize
    from speculation.training.runs import Run, load_predictor, load_run

__all__ = [
    "CacheSize",
    "Generation",
    "History",
    "OffloadedModel",
    "Prediction",
    "Predictor",
    "Routes",
    "Run",
    "Shape",
    "Task",
    "load_predictor",
    "load_routes",
    "load_run",
]

_MODULES = {
    "CacheSize": "runtime.options",
    "Generation": "runtime.generation",
    "OffloadedModel": "runtime.model",
    "History": "data.history",
    "Prediction": "data.history",
    "Routes": "data.routes",
    "load_routes": "data.routes",
    "Shape": "data.tasks",
    "Task": "data.tasks",
    "Predictor": "predictors.base",
    "Run": "training.runs",
    "load_predictor": "training.runs",
    "load_run": "training.runs",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"speculation.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'speculation' has no attribute {name!r}")
