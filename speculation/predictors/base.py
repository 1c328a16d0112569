"""What every expert predictor offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from profiler.errors import SpecmoeError
from speculation.data.history import History, Prediction
from speculation.data.routes import Routes, RouteSource
from speculation.data.tasks import Shape, Task
from speculation.predictors.options import Epochs, Progress, TrainingOptions

Arrays = dict[str, npt.NDArray[Any]]


class Predictor(ABC):
    """What every predictor offers. A class has a name for the command line; `about`, a line; `source`, where it is from.

    sees: what it looks at. tasks: those that it can be fitted for. needs_router_inputs: routes must have them.
    can_take_router_inputs: if asked to (`TrainingOptions.router_inputs`).
    """

    name: ClassVar[str]
    about: ClassVar[str]
    source: ClassVar[str]
    sees: ClassVar[str]
    tasks: ClassVar[frozenset[Task]] = frozenset(Task)
    defaults: ClassVar[TrainingOptions] = TrainingOptions()
    needs_router_inputs: ClassVar[bool] = False
    can_take_router_inputs: ClassVar[bool] = False

    def __init__(self, shape: Shape) -> None:
        if shape.task not in self.tasks:
            raise SpecmoeError(f"{self.name} predicts {', '.join(sorted(self.tasks))} only, not {shape.task}")
        self.shape = shape

    @abstractmethod
    def fit(
        self,
        train: RouteSource,
        validation: RouteSource | None,
        options: TrainingOptions,
        on_progress: Progress,
        out: Path | None = None,
    ) -> Epochs:
        """Learn from `train`; returns the history of training. out: a folder for checkpoints and logs.

        Raises `SpecmoeError` if there are several groups, and this predictor needs all routes at once.
        """

    @property
    def takes_router_inputs(self) -> bool:
        """Whether this one, as it was fitted, looks at router inputs."""
        return self.needs_router_inputs

    @abstractmethod
    def probabilities(self, routes: Routes, tokens: slice) -> npt.NDArray[np.float32]:
        """P(expert is among the K), predicted at `tokens` of `routes`: `[T, L, H, E]`.

        Entry [t, l, h-1] is about layer `shape.target_layers(h)[l]`, of token t or, for next-token, of token t + h; meaningless
        where there is no such layer. What the task does not know must not influence it.
        """

    def predict(self, history: History) -> Prediction:
        """What comes, as a runtime would ask: next-layer, after the last known layer l of the current token, about l+1 to l+H;
        whole-path and next-token, about all layers.

        Raises `SpecmoeError` if the history has another shape, or does not tell what the task knows.
        """
        self.check(history)
        probabilities_LHE = self.probabilities(history.routes, slice(history.tokens - 1, history.tokens))[0]
        if self.shape.task != Task.NEXT_LAYER:
            return Prediction.of(probabilities_LHE)
        return Prediction.of(probabilities_LHE[history.layer, : self.shape.layers - 1 - history.layer])

    def check(self, history: History) -> None:
        """Raise `SpecmoeError` if nothing can be predicted after `history`."""
        own, other = (replace(shape, horizon=1, task=Task.NEXT_TOKEN) for shape in (self.shape, history.shape))
        if own != other:
            raise SpecmoeError(f"{self.name} is for {self.shape}, the history for {history.shape}")
        known = {Task.NEXT_LAYER: range(self.shape.layers - 1), Task.WHOLE_PATH: range(-1, self.shape.layers)}
        expected = known.get(self.shape.task, range(self.shape.layers - 1, self.shape.layers))
        if not history.tokens or history.layer not in expected:
            where = f"after layer {history.layer} of token {history.tokens - 1}" if history.tokens else "before the first token"
            raise SpecmoeError(f"{self.name}: {self.shape.task} has nothing to predict {where}")

    @abstractmethod
    def arrays(self) -> Arrays:
        """Everything learned, for safetensors."""

    @classmethod
    def parameters_for(cls, shape: Shape) -> int | None:
        """Learned numbers for a model of this shape, with as many kinds of tokens as it takes; None if the data decides."""
        return int(sum(array.size for array in cls(shape).arrays().values() if np.issubdtype(array.dtype, np.floating)))

    def settings(self) -> dict[str, Any]:
        """What `restore` needs besides the arrays, for config.json."""
        return {}

    @classmethod
    @abstractmethod
    def restore(cls, shape: Shape, settings: dict[str, Any], arrays: Arrays) -> Self:
        """The inverse of `arrays` and `settings`. Raises `SpecmoeError` if they do not fit together."""


def whole(predictor: Predictor, train: RouteSource) -> Routes:
    """All routes at once. Raises `SpecmoeError` if they come in several groups."""
    if len(train.group_tokens) > 1:
        raise SpecmoeError(f"{predictor.name} is fitted to all routes at once: leave out --shards-per-group")
    return train.group(0)


def expected_array(arrays: Arrays, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """`arrays[name]` as float32. Raises `SpecmoeError` if it is absent, of another shape, or not finite."""
    array = arrays.get(name)
    if array is None or array.shape != shape or not np.isfinite(array).all():
        found = "nothing" if array is None else str(array.shape)
        raise SpecmoeError(f"stored predictor: array {name!r} is {found}, expected finite numbers of shape {shape}")
    return array.astype(np.float32)
