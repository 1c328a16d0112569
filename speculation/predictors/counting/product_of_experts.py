"""Baseline: the counting predictors combined as a product of experts (here, an 'expert' is a predictor)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from speculation.data.routes import Routes, RouteSource
from speculation.data.tasks import Shape, targets
from speculation.predictors.base import Arrays, Predictor, expected_array, single_group
from speculation.predictors.counting.backoff_counts import BackoffCounts
from speculation.predictors.counting.conditional_counts import ConditionalCounts
from speculation.predictors.counting.previous_token import PreviousToken
from speculation.predictors.counting.token_identity import TokenIdentity
from speculation.predictors.features import at_targets, expert_frequency, log_odds
from speculation.predictors.options import Epochs, Progress, TrainingOptions

MEMBERS: tuple[type[Predictor], ...] = (ConditionalCounts, BackoffCounts, PreviousToken, TokenIdentity)
# Limits on the tokens, and on the numbers, that the weights of the members are fitted on; steps of Newton's method.
SAMPLE_TOKENS, SAMPLE_NUMBERS = 4000, 50_000_000
STEPS = 12


class ProductOfExperts(Predictor):
    """log-odds = log-odds of popularity + the weighted sum of the changes in log-odds that each counting predictor makes.

    A logistic regression on training tokens fits the weights, one per member, layer and horizon, and a constant.
    """

    name: ClassVar[str] = "product-of-experts"
    about: ClassVar[str] = "the log-odds of all counting predictors, weighted by logistic regression"
    source: ClassVar[str] = "baseline; products of experts (Hinton, 2002)"
    sees: ClassVar[str] = "routes of layers l and l-1, of the last known token, which token it is"

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self._members = [cls(shape) for cls in MEMBERS]
        self._popularity_LHE = np.zeros((shape.layers, shape.horizon, shape.experts), dtype=np.float32)
        # The weight of each member; the constant is last.
        self._weight_LHM = np.zeros((shape.layers, shape.horizon, len(MEMBERS) + 1), dtype=np.float32)

    def fit(
        self,
        train: RouteSource,
        validation: RouteSource | None,
        options: TrainingOptions,
        on_progress: Progress,
        out: Path | None = None,
    ) -> Epochs:
        shape, routes = self.shape, single_group(self, train)
        self._popularity_LHE = log_odds(at_targets(expert_frequency(routes, shape), shape)).astype(np.float32)
        for member in self._members:
            member.fit(routes, None, options, on_progress)
        # Counts fit their own tokens too well: to fit the weights, use counts that have not seen the sample's problems.
        is_held_out_T = np.isin(routes.problem_ids_T, routes.problem_ids[::5])
        held_out_members, sample = self._members, routes
        if not is_held_out_T.all():
            sample = routes.of_problems(is_held_out_T)
            held_out_members = [cls(shape) for cls in MEMBERS]
            for member in held_out_members:
                member.fit(routes.of_problems(~is_held_out_T), None, options, on_progress)
        per_token = shape.layers * shape.horizon * shape.experts * len(MEMBERS)
        stop = min(len(sample), SAMPLE_TOKENS, max(1, SAMPLE_NUMBERS // per_token))
        changes_TLHEM = self._changes(held_out_members, sample, slice(0, stop))
        for hop in range(1, shape.horizon + 1):
            true = targets(sample, shape, np.arange(stop), hop)
            for layer in range(shape.layers):
                valid_T = np.flatnonzero(true.is_valid_TL[:, layer])
                if len(valid_T):
                    is_true_TE = np.zeros((len(valid_T), shape.experts), dtype=np.float64)
                    np.put_along_axis(is_true_TE, true.ids_TLK[valid_T, layer].astype(np.int64), 1.0, axis=1)
                    features = changes_TLHEM[valid_T, layer, hop - 1].reshape(-1, len(MEMBERS))
                    offset = np.tile(self._popularity_LHE[layer, hop - 1], len(valid_T))
                    self._weight_LHM[layer, hop - 1] = logistic_weights(features, offset, is_true_TE.reshape(-1))
        return []

    def probabilities(self, routes: Routes, tokens: slice) -> npt.NDArray[np.float32]:
        changes_TLHEM = self._changes(self._members, routes, tokens)
        weight_LHM = self._weight_LHM[:, :, :-1]
        log_odds_TLHE = (changes_TLHEM * weight_LHM[:, :, None]).sum(-1) + self._popularity_LHE + self._weight_LHM[..., -1:]
        return np.asarray(1 / (1 + np.exp(-log_odds_TLHE)), dtype=np.float32)

    def _changes(self, members: list[Predictor], routes: Routes, tokens: slice) -> npt.NDArray[np.float32]:
        """The change that each member makes to the log-odds of popularity, `[T, L, H, E, M]`."""
        return np.stack([log_odds(member.probabilities(routes, tokens)) - self._popularity_LHE for member in members], axis=-1)

    @classmethod
    def parameters_for(cls, shape: Shape) -> int | None:
        return None

    def arrays(self) -> Arrays:
        own = {"popularity_LHE": self._popularity_LHE, "weight_LHM": self._weight_LHM}
        return own | {f"{m.name}/{key}": array for m in self._members for key, array in m.arrays().items()}

    @classmethod
    def restore(cls, shape: Shape, settings: dict[str, Any], arrays: Arrays) -> Self:
        predictor = cls(shape)
        predictor._popularity_LHE = expected_array(arrays, "popularity_LHE", predictor._popularity_LHE.shape)
        predictor._weight_LHM = expected_array(arrays, "weight_LHM", predictor._weight_LHM.shape)
        for number, member in enumerate(MEMBERS):
            own = {key.split("/", 1)[1]: array for key, array in arrays.items() if key.startswith(f"{member.name}/")}
            predictor._members[number] = member.restore(shape, {}, own)
        return predictor


def logistic_weights(
    features_NM: npt.NDArray[np.floating[Any]], offset_N: npt.NDArray[Any], is_true_N: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Weights and constant `[M + 1]` of a slightly regularized logistic regression with an offset, by Newton's method."""
    design = np.column_stack([features_NM, np.ones(len(features_NM))]).astype(np.float64)
    weights = np.zeros(design.shape[1])
    for _ in range(STEPS):
        chance = 1 / (1 + np.exp(-np.clip(design @ weights + offset_N, -30, 30)))
        gradient = design.T @ (is_true_N - chance) - weights
        curvature = (design * (chance * (1 - chance))[:, None]).T @ design + np.eye(len(weights))
        weights += np.clip(np.linalg.solve(curvature, gradient), -2, 2)
    return weights
