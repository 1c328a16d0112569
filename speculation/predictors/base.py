"""The interface of every expert predictor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from profiler.errors import SpecmoeError, UsageError
from speculation.data.history import History, Prediction
from speculation.data.routes import Routes, RouteSource
from speculation.data.tasks import Shape, Task
from speculation.predictors.options import Epochs, Progress, TrainingOptions

Arrays = dict[str, npt.NDArray[Any]]


class Predictor(ABC):
    """Predicts the experts that a token will select, from routes that are already known.

    Load a trained predictor with `load_predictor`. At run time, call `predict` with a `History`. To evaluate many tokens at
    once, call `probabilities` with `Routes`. A new predictor is a subclass listed in `registry`.

    Args:
        shape: The sizes of the model, and the task.

    Attributes:
        name: The name in `specmoe train --predictor` and in run directories.
        about: One line on how it predicts.
        source: The paper or method that it is taken from.
        sees: What it conditions on.
        tasks: The tasks that it can be fitted for.
        defaults: Its own training options.
        needs_router_inputs: Whether it works only on routes with router inputs.
        can_take_router_inputs: Whether it uses router inputs if `TrainingOptions.router_inputs` is set.

    Raises:
        SpecmoeError: The predictor does not support the task of `shape`.

    Example:
        >>> from speculation.predictors.counting.popularity import Popularity
        >>> predictor = Popularity(Shape(layers=2, experts=4, top_k=2, horizon=1))  # not fitted: all experts are equally likely
        >>> history = History(predictor.shape)
        >>> history.begin(vocab_id=17)
        >>> history.add(expert_ids=[3, 1])
        >>> predictor.predict(history).scores.tolist()  # the experts of the second MoE layer
        [[0.5, 0.5, 0.5, 0.5]]
    """

    name: ClassVar[str]
    about: ClassVar[str]
    source: ClassVar[str]
    sees: ClassVar[str]
    tasks: ClassVar[frozenset[Task]] = frozenset(task for task in Task if task.predicts_experts)
    defaults: ClassVar[TrainingOptions] = TrainingOptions()
    needs_router_inputs: ClassVar[bool] = False
    can_take_router_inputs: ClassVar[bool] = False

    @classmethod
    def keeps_training_texts(cls) -> bool:
        """Whether `arrays` contains texts of training problems, as token ids with their routes."""
        return False

    def __init__(self, shape: Shape) -> None:
        if shape.task not in self.tasks:
            raise UsageError(f"{self.name} predicts {', '.join(sorted(self.tasks))} only, not {shape.task}")
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
        """Learn from routes.

        Args:
            train: The routes to learn from.
            validation: The routes for early stopping, or None to train for all epochs. Counting predictors ignore them.
            options: Settings of training. Counting predictors use at most the seed.
            on_progress: Called after every epoch.
            out: A folder for checkpoints and logs; None to write nothing.

        Returns:
            One entry of losses per epoch; empty for counting predictors.

        Raises:
            SpecmoeError: `train` has several groups but this predictor needs all routes at once, or the options do not suit it.
        """

    @property
    def takes_router_inputs(self) -> bool:
        """Whether this predictor, as it was fitted, uses router inputs."""
        return self.needs_router_inputs

    @abstractmethod
    def probabilities(self, routes: Routes, tokens: slice) -> npt.NDArray[np.float32]:
        """The probability of each expert to be among the K selected ones, for many tokens at once.

        Implementations must use nothing that the task does not allow them to see.

        Args:
            routes: Known routes. Tokens before `tokens` are the context.
            tokens: The indices in `routes` of the tokens to predict at.

        Returns:
            float32 `[T, L, H, E]`. Entry `[t, l, h-1]` is about the MoE layer `shape.target_layers(h)[l]` of token t or, for
            `next-token`, of token t + h. Entries about a layer that does not exist are meaningless.

        Raises:
            SpecmoeError: The predictor needs router inputs and `routes` has none, or they have another width.
        """

    def predict(self, history: History) -> Prediction:
        """Predict from what a runtime knows now.

        Call a `next-layer` predictor after `History.add`: it predicts layers l+1 to l+H of the current token, where l is the
        last layer added. Call a `whole-path` or `reuse` predictor at any time after `History.begin`, and a `next-token`
        predictor after the last layer of a token: these predict all layers.

        Args:
            history: The sequence so far. It must have the layers, experts and top-k of this predictor.

        Returns:
            The ranked experts: `[H', E]` with H' <= H for `next-layer`, `[L, H, E]` for the other tasks.

        Raises:
            SpecmoeError: The history belongs to a model of another shape, is at a point where the task predicts nothing, or
                lacks router inputs that the predictor needs.
        """
        self.check(history)
        probabilities_LHE = self.probabilities(history.routes, slice(history.tokens - 1, history.tokens))[0]
        if self.shape.task != Task.NEXT_LAYER:
            return Prediction.of(probabilities_LHE)
        return Prediction.of(probabilities_LHE[history.layer, : self.shape.layers - 1 - history.layer])

    def check(self, history: History) -> None:
        """Raise `SpecmoeError` if this predictor cannot predict from `history` at this point."""
        own, other = self.shape, history.shape
        if own is not other and (own.layers, own.experts, own.top_k) != (other.layers, other.experts, other.top_k):
            raise SpecmoeError(f"{self.name} is for {own}, but the history is for {other}")
        if not history.tokens or history.layer not in self._predicts_after:
            where = f"after layer {history.layer} of token {history.tokens - 1}" if history.tokens else "before the first token"
            raise SpecmoeError(f"{self.name}: {self.shape.task} predicts nothing {where}")

    @cached_property
    def _predicts_after(self) -> range:
        """The layers of the current token after which there is a prediction; -1 is before its first layer."""
        layers = self.shape.layers
        if self.shape.task == Task.NEXT_LAYER:
            return range(layers - 1)
        return range(-1, layers) if self.shape.task in {Task.WHOLE_PATH, Task.REUSE} else range(layers - 1, layers)

    @abstractmethod
    def arrays(self) -> Arrays:
        """All learned arrays by name, to be stored as safetensors."""

    @classmethod
    def parameters_for(cls, shape: Shape) -> int | None:
        """The number of learned parameters for a model of this shape, with the largest vocabulary that the predictor accepts.

        None if the number depends on the training data.
        """
        return int(sum(array.size for array in cls(shape).arrays().values() if np.issubdtype(array.dtype, np.floating)))

    def settings(self) -> dict[str, Any]:
        """What `restore` needs in addition to the arrays; stored in config.json."""
        return {}

    @classmethod
    @abstractmethod
    def restore(cls, shape: Shape, settings: dict[str, Any], arrays: Arrays) -> Self:
        """Rebuild a predictor from its `settings` and `arrays`. Raises `SpecmoeError` if they do not fit together."""


def single_group(predictor: Predictor, train: RouteSource) -> Routes:
    """All routes at once. Raises `SpecmoeError` if `train` has several groups."""
    if len(train.group_tokens) > 1:
        raise UsageError(f"{predictor.name} is fitted to all routes at once: leave out shards_per_group")
    return train.group(0)


def stored_weights(array: npt.NDArray[np.float32]) -> npt.NDArray[np.float16 | np.float32]:
    """Weights as they are stored: in half precision, or as they are if one is beyond its range (65,504)."""
    is_in_range = not array.size or float(np.abs(array).max()) <= float(np.finfo(np.float16).max)
    return array.astype(np.float16) if is_in_range else array


def expected_array(arrays: Arrays, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """`arrays[name]` as float32. Raises `SpecmoeError` if it is missing, has another shape, or is not finite."""
    array = arrays.get(name)
    if array is None or array.shape != shape or not np.isfinite(array).all():
        found = "missing" if array is None else str(array.shape)
        raise SpecmoeError(f"stored predictor: array {name!r} is {found}, expected finite numbers of shape {shape}")
    return array.astype(np.float32)
