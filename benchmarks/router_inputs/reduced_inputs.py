"""Router inputs in fewer bytes: fewer layers, fewer numbers, fewer bits. And what a predictor gains for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from profiler.errors import SpecmoeError
from speculation.data.repeats import UNKNOWN_TOKEN
from speculation.data.router_inputs import RouterInputs
from speculation.data.routes import Routes, router_input_scale, router_inputs_of
from speculation.data.tasks import Shape
from speculation.predictors.neural.pre_attention import PreAttention

Kind = Literal["whole", "pca", "random", "gates", "learned", "shuffled"]
NAME = "the reduction of router inputs"
# What a gain is priced in.
POINT = 0.01
# How the logits of `learned` are trained.
LEARNED = replace(PreAttention.defaults, epochs=2, batch_tokens=512, learning_rate=1e-2)


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """What is kept of the router inputs `[T, L, D]`.

    Args:
        kind: How D numbers become d. `whole`: they are kept. `pca`: the first d principal components of training tokens.
            `random`: d random orthogonal directions. `gates`: the logits of the routers of the next layers, d = E for each.
            `learned`: the logits of `pre-attention` for the experts of the next layers, d = E for each. Components and
            directions are the same for all layers, after each dimension of each layer was divided by its standard deviation
            over training tokens; logits are those of each layer. `shuffled`: the control, all numbers of other tokens.
        numbers: d. For `whole` and `shuffled`, D; for `gates` and `learned`, a multiple of E.
        bits: 16 for half precision. Fewer for integers, whose step is the largest magnitude in training divided by the largest
            integer, for each layer and number; larger magnitudes are clipped.
        every: Keep the inputs of every n-th MoE layer from the first on. Each layer sees the last one kept.
    """

    kind: Kind = "whole"
    numbers: int
    bits: int = 16
    every: int = 1

    @property
    def bytes_per_layer(self) -> float:
        """Bytes for each token and MoE layer, averaged over layers where not all are kept.

        Example:
            >>> Reduction(kind="pca", numbers=16, bits=8, every=2).bytes_per_layer
            8.0
        """
        return self.numbers * self.bits / 8 / self.every

    @property
    def label(self) -> str:
        """A short name, such as `pca-16-8bit-every2`."""
        bits = "" if self.bits == 16 else f"-{self.bits}bit"
        return f"{self.kind}-{self.numbers}{bits}" + (f"-every{self.every}" if self.every > 1 else "")


@dataclass(frozen=True)
class Reducer:
    """A reduction that was fitted to training tokens.

    matrix_LDd: what each layer's inputs are multiplied by, float32 `[L, D, d]`; None to keep them.
    step_Ld: the step of each number's integers, float32 `[L, d]`; None for half precision.
    """

    reduction: Reduction
    matrix_LDd: npt.NDArray[np.float32] | None
    step_Ld: npt.NDArray[np.float32] | None

    @classmethod
    def fit(cls, reduction: Reduction, train: Routes, validation: Routes | None = None) -> Self:
        """Fit a reduction to the router inputs of `train`; what is learned stops early by `validation`.

        Raises `SpecmoeError` if they have other sizes than the reduction needs.
        """
        matrix_LDd = _matrix(reduction, train, validation)
        step_Ld = None
        if reduction.bits < 16:
            largest = 2 ** (reduction.bits - 1) - 1
            values_TLd = cls(reduction, matrix_LDd, None).apply(train)
            step_Ld = np.maximum(np.abs(values_TLd).max(0), 1e-6).astype(np.float32) / largest
        return cls(reduction, matrix_LDd, step_Ld)

    def apply(self, routes: Routes) -> npt.NDArray[np.float16]:
        """The reduced router inputs of `routes`, as they are after unpacking, `[T, L, d]`."""
        hidden_TLD = router_inputs_of(routes, NAME).hidden_TLD
        values_TLd = hidden_TLD
        if self.reduction.kind == "shuffled":
            values_TLd = np.random.default_rng(0).permutation(hidden_TLD)
        if self.matrix_LDd is not None:
            by_layer = [hidden_TLD[:, layer].astype(np.float32) @ matrix_Dd for layer, matrix_Dd in enumerate(self.matrix_LDd)]
            values_TLd = np.stack(by_layer, axis=1).astype(np.float16)
        if self.step_Ld is not None:
            largest = 2 ** (self.reduction.bits - 1) - 1
            integers = np.clip(np.rint(values_TLd / self.step_Ld), -largest, largest)
            values_TLd = (integers * self.step_Ld).astype(np.float16)
        layers_L = np.arange(values_TLd.shape[1])
        return values_TLd[:, layers_L - layers_L % self.reduction.every]

    def routes(self, routes: Routes) -> Routes:
        """The same routes with reduced router inputs."""
        return replace(routes, router=replace(router_inputs_of(routes, NAME), hidden_TLD=self.apply(routes)))


def _matrix(reduction: Reduction, train: Routes, validation: Routes | None) -> npt.NDArray[np.float32] | None:
    inputs = router_inputs_of(train, NAME)
    width, experts, numbers = inputs.hidden_TLD.shape[2], inputs.weight_LED.shape[1], reduction.numbers
    if reduction.kind in {"gates", "learned"} and numbers % experts:
        raise SpecmoeError(f"{reduction.label}: expected a multiple of {experts}, the number of experts")
    if reduction.kind in {"whole", "shuffled"} and numbers != width:
        raise SpecmoeError(f"{reduction.label}: the router inputs have {width} numbers")
    if reduction.kind in {"pca", "random"} and numbers > width:
        raise SpecmoeError(f"{reduction.label}: the router inputs have {width} numbers only")
    if reduction.kind in {"whole", "shuffled"}:
        return None
    if reduction.kind == "gates":
        return _next_gates(inputs, numbers)
    if reduction.kind == "learned":
        return _learned(train, validation, experts, numbers)
    scale_LD = router_input_scale(train, NAME)
    directions_Dd = _components(inputs, scale_LD, numbers) if reduction.kind == "pca" else _random_directions(width, numbers)
    return (scale_LD[:, :, None] * directions_Dd).astype(np.float32)


def _next_gates(inputs: RouterInputs, numbers: int) -> npt.NDArray[np.float32]:
    """The routers of the next layers, one after the other `[L, D, d]`; zeros where there is no such layer."""
    layers, experts, width = inputs.weight_LED.shape
    matrix_LDd = np.zeros((layers, width, numbers), dtype=np.float32)
    for layer in range(layers):
        for ahead, gate_ED in enumerate(inputs.weight_LED[layer + 1 : layer + 1 + numbers // experts]):
            matrix_LDd[layer, :, ahead * experts : (ahead + 1) * experts] = gate_ED.T
    return matrix_LDd


def _learned(train: Routes, validation: Routes | None, experts: int, numbers: int) -> npt.NDArray[np.float32]:
    """The weights of `pre-attention`, which predicts the experts of the next layers, `[L, D, d]`."""
    layers, top_k = train.expert_ids_TLK.shape[1:]
    shape = Shape(layers=layers, experts=experts, top_k=top_k, horizon=numbers // experts)
    predictor = PreAttention(shape)
    predictor.fit(train, validation, LEARNED, lambda done, total, entry: None)
    arrays = {name: array.astype(np.float32) for name, array in predictor.arrays().items()}
    return np.asarray(arrays["network.scale"][:, :, None] * arrays["network.weight"])


def _components(inputs: RouterInputs, scale_LD: npt.NDArray[np.float64], numbers: int) -> npt.NDArray[np.float64]:
    """The first principal components of scaled router inputs of all layers together `[D, d]`."""
    layers, width = scale_LD.shape
    covariance_DD = np.zeros((width, width))
    for layer in range(layers):
        scaled_TD = inputs.hidden_TLD[:, layer].astype(np.float64) * scale_LD[layer]
        covariance_DD += np.cov(scaled_TD, rowvar=False, bias=True)
    # Eigenvalues ascend.
    return np.asarray(np.linalg.eigh(covariance_DD)[1][:, ::-1][:, :numbers])


def _random_directions(width: int, numbers: int) -> npt.NDArray[np.float64]:
    """Random orthogonal directions `[D, d]`, the same each time."""
    return np.asarray(np.linalg.qr(np.random.default_rng(0).standard_normal((width, numbers)))[0])


def without_routes(routes: Routes) -> Routes:
    """The same routes for a predictor that must see the router inputs only: their weights are zero and their tokens unknown.

    `mlp` multiplies everything that it takes from routes by their weights, so it learns from the router inputs alone. The
    experts stay, because they are what is predicted.
    """
    unknown_T = np.full_like(routes.token_keys_T, UNKNOWN_TOKEN)
    return replace(routes, weights_TLK=np.zeros_like(routes.weights_TLK), token_keys_T=unknown_T)


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of (bytes, recall) that no other point beats with as few bytes, ascending in both.

    Example:
        >>> frontier([(0, 0.7), (32, 0.8), (16, 0.75), (64, 0.78)])
        [(0, 0.7), (16, 0.75), (32, 0.8)]
    """
    kept: list[tuple[float, float]] = []
    for size, recall in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or recall > kept[-1][1]:
            kept.append((size, recall))
    return kept


def bytes_for(gain: float, points: Sequence[tuple[float, float]]) -> float | None:
    """The fewest bytes that gain so much recall over no bytes, on straight lines between the points of the frontier.

    points: (bytes, recall), one of them with 0 bytes. Returns None if the frontier does not reach so far.

    Example:
        >>> bytes_for(0.02, [(0, 0.7), (16, 0.74), (32, 0.75)])
        8.0
    """
    best = frontier(points)
    wanted = best[0][1] + gain
    for (size, recall), (next_size, next_recall) in pairwise(best):
        if wanted <= next_recall + 1e-12:
            return round(size + (next_size - size) * (wanted - recall) / (next_recall - recall), 6)
    return None


def marginal_prices(points: Sequence[tuple[float, float]]) -> list[tuple[float, float, float]]:
    """What the next .01 recall costs along the frontier: (bytes from, bytes to, bytes per .01 recall) of each step.

    Example:
        >>> marginal_prices([(0, 0.7), (16, 0.74), (32, 0.75)])
        [(0, 16, 4.0), (16, 32, 16.0)]
    """
    best = frontier(points)
    return [
        (size, next_size, round((next_size - size) / (next_recall - recall) * POINT, 2))
        for (size, recall), (next_size, next_recall) in pairwise(best)
    ]
