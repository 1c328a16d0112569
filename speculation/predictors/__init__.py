"""Expert predictors by name. Every predictor implements `Predictor`; `specmoe predictors` lists them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from profiler.errors import SpecmoeError
from profiler.schema import ModelMetadata
from speculation.routes import Routes

Arrays = dict[str, npt.NDArray[Any]]


# Numbers in the tables of the counting baselines: 1 GB. Also bounds what a stranger's run can make a reader allocate.
MAX_TABLE = 250_000_000


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a predictor must know of the model: L MoE layers, E experts, K per token, and how many layers ahead (H)."""

    layers: int
    experts: int
    top_k: int
    horizon: int

    def __post_init__(self) -> None:
        limits = {"layers": 10_000, "experts": 65_536, "top_k": 1024, "horizon": 10_000}
        for name, limit in limits.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= limit:
                raise SpecmoeError(f"{name} {value!r}, expected 1 to {limit}")
        if self.horizon >= self.layers:
            raise SpecmoeError(f"horizon {self.horizon}: expected 1 to {self.layers - 1} for {self.layers} MoE layers")
        if self.top_k > self.experts:
            raise SpecmoeError(f"top_k {self.top_k} exceeds experts {self.experts}")
        if self.horizon * self.layers * self.experts**2 > MAX_TABLE:
            raise SpecmoeError(
                f"{self.horizon} horizons over {self.layers} layers of {self.experts} experts: the count tables would exceed "
                f"{MAX_TABLE:,} numbers; choose a smaller horizon"
            )

    @classmethod
    def of(cls, model: ModelMetadata, horizon: int) -> Shape:
        """The shape of a traced model. Raises `SpecmoeError` if it has no layer `horizon` ahead."""
        return cls(layers=len(model.moe_layers), experts=model.num_experts, top_k=model.top_k, horizon=horizon)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Settings that neural predictors use; counting predictors ignore them."""

    seed: int = 0
    epochs: int = 30
    batch_tokens: int = 256
    learning_rate: float = 2e-3
    patience: int = 5
    max_seconds: float | None = None


class Predictor(Protocol):
    """Task `next-layer`: given a token's routes at layers <= l, and everything of earlier tokens, its experts at l+h."""

    name: ClassVar[str]
    about: ClassVar[str]
    shape: Shape

    def __init__(self, shape: Shape) -> None: ...

    def fit(
        self,
        train: Routes,
        validation: Routes | None,
        options: TrainingOptions,
        on_progress: Callable[[int, int, dict[str, float]], None],
    ) -> list[dict[str, float]]:
        """Learn from `train`; returns the training history (one entry per epoch, or empty)."""
        ...

    def probabilities(self, routes: Routes, tokens: slice) -> npt.NDArray[np.float32]:
        """P(expert is among the K) for `tokens` of `routes`: `[T, L, H, E]`; entry [t, l, h-1] predicts layer l+h from layer l.

        Entries with l+h >= L are meaningless. The routes of a token at layers > l must not influence its entry l.
        """
        ...

    def arrays(self) -> Arrays:
        """Everything learned, for safetensors."""
        ...

    def settings(self) -> dict[str, Any]:
        """What `restore` needs besides the arrays, for config.json."""
        ...

    @classmethod
    def restore(cls, shape: Shape, settings: dict[str, Any], arrays: Arrays) -> Predictor:
        """The inverse of `arrays` and `settings`. Raises `SpecmoeError` if they do not fit together."""
        ...


def predictor_classes() -> dict[str, type[Predictor]]:
    """Every predictor by name, baselines first. Imported here so that counting predictors need no torch."""
    from speculation.predictors.conditional_counts import ConditionalCounts
    from speculation.predictors.mlp import MlpPredictor
    from speculation.predictors.popularity import Popularity

    classes: tuple[type[Predictor], ...] = (Popularity, ConditionalCounts, MlpPredictor)
    return {cls.name: cls for cls in classes}


def find_predictor(name: str) -> type[Predictor]:
    """The class by name. Raises `SpecmoeError` listing what exists."""
    classes = predictor_classes()
    if name not in classes:
        raise SpecmoeError(f"unknown predictor {name!r}: expected one of {', '.join(classes)}")
    return classes[name]


def expected_array(arrays: Arrays, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """`arrays[name]` as float32. Raises `SpecmoeError` if it is absent, of another shape, or not finite."""
    array = arrays.get(name)
    if array is None or array.shape != shape or not np.isfinite(array).all():
        found = "nothing" if array is None else str(array.shape)
        raise SpecmoeError(f"stored predictor: array {name!r} is {found}, expected finite numbers of shape {shape}")
    return array.astype(np.float32)
