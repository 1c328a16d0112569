"""Expert predictors: train them on traces, evaluate them, and measure what their predictions are worth to a cache of experts.

`train` fits a predictor to a trace, and `evaluate` compares what it predicts with what was routed. `run_study` simulates caches
of experts with policies and prefetching, and `run_curves` counts the hits of every cache size.

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
    from speculation.evaluation.evaluate import evaluate
    from speculation.offload.curves.curve_study import CurveStudy, run_curves
    from speculation.offload.requests import Drafting
    from speculation.offload.simulation.records import Miss
    from speculation.offload.state import Rule
    from speculation.offload.studies.simulation_options import SimulationStudy
    from speculation.offload.studies.simulation_study import run_study
    from speculation.predictors.base import Predictor
    from speculation.predictors.options import TrainingOptions
    from speculation.predictors.registry import find_predictor
    from speculation.runtime.generation import Generation
    from speculation.runtime.model import OffloadedModel
    from speculation.runtime.options import CacheSize
    from speculation.training.fit import train
    from speculation.training.runs import Run, load_predictor, load_run

__all__ = [
    "CacheSize",
    "CurveStudy",
    "Drafting",
    "Generation",
    "History",
    "Miss",
    "OffloadedModel",
    "Prediction",
    "Predictor",
    "Routes",
    "Rule",
    "Run",
    "Shape",
    "SimulationStudy",
    "Task",
    "TrainingOptions",
    "evaluate",
    "find_predictor",
    "load_predictor",
    "load_routes",
    "load_run",
    "run_curves",
    "run_study",
    "train",
]

_MODULES = {
    "CacheSize": "runtime.options",
    "CurveStudy": "offload.curves.curve_study",
    "Drafting": "offload.requests",
    "Generation": "runtime.generation",
    "History": "data.history",
    "Miss": "offload.simulation.records",
    "OffloadedModel": "runtime.model",
    "Prediction": "data.history",
    "Predictor": "predictors.base",
    "Routes": "data.routes",
    "Rule": "offload.state",
    "Run": "training.runs",
    "Shape": "data.tasks",
    "SimulationStudy": "offload.studies.simulation_options",
    "Task": "data.tasks",
    "TrainingOptions": "predictors.options",
    "evaluate": "evaluation.evaluate",
    "find_predictor": "predictors.registry",
    "load_predictor": "training.runs",
    "load_routes": "data.routes",
    "load_run": "training.runs",
    "run_curves": "offload.curves.curve_study",
    "run_study": "offload.studies.simulation_study",
    "train": "training.fit",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"speculation.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'speculation' has no attribute {name!r}")
