"""Expert predictors: they learn from traces which experts come next; and what their predictions are worth.

`load_predictor` reads a trained one; a `History` gives it what a runtime knows, layer by layer. `load_routes` and `load_run`
are for evaluating many tokens at once. Nothing is imported before it is used: counting predictors need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speculation.data.history import History, Prediction
    from speculation.data.routes import Routes, load_routes
    from speculation.data.tasks import Shape, Task
    from speculation.predictors.base import Predictor
    from speculation.training.runs import Run, load_predictor, load_run

__all__ = [
    "History",
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
