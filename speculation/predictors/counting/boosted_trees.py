"""Baseline: gradient-boosted trees, one sequence of trees per layer; each leaf holds a value for every expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import numba
import numpy as np
import numpy.typing as npt

from profiler.errors import SpecmoeError
from speculation.data.repeats import RUN_LENGTHS
from speculation.data.routes import Routes, RouteSource
from speculation.data.tasks import MAX_TABLE, Shape, Task, targets
from speculation.predictors.base import Arrays, Predictor, expected_array, single_group
from speculation.predictors.features import at_targets, expert_frequency, last_known, recent_use
from speculation.predictors.options import Epochs, Progress, TrainingOptions

ROUNDS = 12
LEAVES = 48
RATE = 0.4
SAMPLE_TOKENS, SAMPLE_NUMBERS = 12_000, 100_000_000
# Added to the curvature of a leaf, to keep the steps of leaves with few tokens small.
RIDGE = 5.0
WINDOW = 16
# A binary tree with LEAVES leaves has LEAVES - 1 splits.
NODES = 2 * LEAVES - 1


class BoostedTrees(Predictor):
    """Regression trees of scikit-learn, fitted to the gradient of the logistic loss of all E experts, with Newton steps in the
    leaves.

    The features are four vectors `[E]` and a number:

    - the weights of the nearest known route (for next-layer, the token's own at layer l);
    - the weights of the last known token at the predicted layer;
    - the weights at the place where the same tokens occurred before;
    - the mean use of each expert over the last 16 tokens;
    - the length of the run of tokens that occurred before.

    Only splits and leaves are stored.
    """

    name: ClassVar[str] = "boosted-trees"
    about: ClassVar[str] = "gradient-boosted trees per layer over routes, earlier occurrences of the same tokens, recent use"
    source: ClassVar[str] = "baseline; gradient boosting (Friedman, 2001) with scikit-learn's trees"
    sees: ClassVar[str] = "routes of layer l, of the last known token, of earlier occurrences of the same tokens; recent use"

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        trees = (shape.layers, shape.horizon, ROUNDS)
        if int(np.prod(trees)) * max(LEAVES * shape.experts, 4 * NODES) > MAX_TABLE:
            raise SpecmoeError(f"{self.name}: the leaves would exceed {MAX_TABLE:,} numbers; choose a smaller horizon")
        self._start_LHE = np.zeros((shape.layers, shape.horizon, shape.experts), dtype=np.float32)
        # Left child, right child and feature of each node. For a leaf, the feature is -1 and the first entry is its index.
        self._nodes_LHRN3 = np.full((*trees, NODES, 3), -1, dtype=np.int32)
        self._limit_LHRN = np.zeros((*trees, NODES), dtype=np.float32)
        self._leaf_LHRFE = np.zeros((*trees, LEAVES, shape.experts), dtype=np.float32)

    def fit(
        self,
        train: RouteSource,
        validation: RouteSource | None,
        options: TrainingOptions,
        on_progress: Progress,
        out: Path | None = None,
    ) -> Epochs:
        shape, routes = self.shape, single_group(self, train)
        random = np.random.default_rng(options.seed)
        frequency_LHE = np.clip(at_targets(expert_frequency(routes, shape), shape), 1e-4, 1 - 1e-4)
        self._start_LHE = np.log(frequency_LHE / (1 - frequency_LHE)).astype(np.float32)
        most = min(SAMPLE_TOKENS, max(1, SAMPLE_NUMBERS // (shape.layers * (4 * shape.experts + 1))))
        tokens_T = np.sort(random.permutation(len(routes))[:most])
        for hop in range(1, shape.horizon + 1):
            features_TLF = self._features(routes, tokens_T, hop)
            true = targets(routes, shape, tokens_T, hop)
            for layer in np.flatnonzero(shape.target_layers(hop) >= 0):
                valid_T = np.flatnonzero(true.is_valid_TL[:, layer])
                if not len(valid_T):
                    continue
                is_true_TE = np.zeros((len(valid_T), shape.experts), dtype=np.float32)
                np.put_along_axis(is_true_TE, true.ids_TLK[valid_T, layer].astype(np.int64), 1.0, axis=1)
                self._boost(features_TLF[valid_T, layer], is_true_TE, layer, hop - 1, options.seed)
        return []

    def _boost(
        self,
        features_TF: npt.NDArray[np.float32],
        is_true_TE: npt.NDArray[np.float32],
        layer: int,
        step: int,
        seed: int,
    ) -> None:
        from sklearn.tree import DecisionTreeRegressor

        score_TE = np.tile(self._start_LHE[layer, step], (len(features_TF), 1))
        for number in range(ROUNDS):
            chance_TE = 1 / (1 + np.exp(-score_TE))
            tree = DecisionTreeRegressor(
                max_leaf_nodes=LEAVES, min_samples_leaf=10, max_features=0.3, random_state=seed + number
            ).fit(features_TF, is_true_TE - chance_TE)
            parts = tree.tree_
            is_leaf = parts.children_left < 0
            leaf_of_node = np.cumsum(is_leaf) - 1
            node_T = tree.apply(features_TF)
            leaf_T = leaf_of_node[node_T]
            gradient_FE, curvature_FE = (
                np.stack([np.bincount(leaf_T, column, LEAVES) for column in each.T], axis=1)
                for each in (is_true_TE - chance_TE, chance_TE * (1 - chance_TE))
            )
            value_FE = (RATE * gradient_FE / (curvature_FE + RIDGE)).astype(np.float32)
            nodes = self._nodes_LHRN3[layer, step, number]
            count = parts.node_count
            nodes[:count, 0] = np.where(is_leaf, leaf_of_node, parts.children_left)
            nodes[:count, 1] = np.where(is_leaf, 0, parts.children_right)
            nodes[:count, 2] = np.where(is_leaf, -1, parts.feature)
            # Rounded to half precision as in the file, so that the predictor behaves the same before and after storage.
            self._limit_LHRN[layer, step, number, :count] = parts.threshold
            self._leaf_LHRFE[layer, step, number] = value_FE.astype(np.float16)
            score_TE += self._leaf_LHRFE[layer, step, number][leaf_T]

    def probabilities(self, routes: Routes, tokens: slice) -> npt.NDArray[np.float32]:
        tokens_T = np.arange(*tokens.indices(len(routes)))
        score_TLHE = np.repeat(self._start_LHE[None], len(tokens_T), axis=0)
        for hop in range(1, self.shape.horizon + 1):
            features_TLF = self._features(routes, tokens_T, hop)
            _add_leaves(
                features_TLF,
                self._nodes_LHRN3[:, hop - 1],
                self._limit_LHRN[:, hop - 1],
                self._leaf_LHRFE[:, hop - 1],
                score_TLHE[:, :, hop - 1],
            )
        return np.asarray(1 / (1 + np.exp(-score_TLHE)), dtype=np.float32)

    def _features(self, routes: Routes, tokens_T: npt.NDArray[np.int64], hop: int) -> npt.NDArray[np.float32]:
        """The features `[T, L, 4 E + 1]`, in the order of the class's docstring."""
        shape = self.shape
        layers_L = np.maximum(shape.target_layers(hop), 0)
        last_T = last_known(routes, shape, tokens_T)
        nearest_T = tokens_T if shape.task == Task.NEXT_LAYER else np.where(last_T >= 0, routes.previous_T[last_T], -1)
        match_T, order_T = routes.matches.index_T[tokens_T], routes.matches.order_T[tokens_T]
        if shape.task == Task.NEXT_TOKEN:
            # The token that followed the match by `hop`, if its routes are already known.
            match_T = np.where((match_T >= 0) & (match_T + hop <= tokens_T), match_T + hop, -1)
        parts: list[npt.NDArray[Any]] = [
            self._dense(routes, nearest_T, np.arange(shape.layers)),
            self._dense(routes, last_T, layers_L),
            self._dense(routes, match_T, layers_L),
            recent_use(routes, tokens_T, last_T, shape.experts, (WINDOW,))[:, 0][:, layers_L],
            np.broadcast_to(order_T[:, None, None] / len(RUN_LENGTHS), (len(tokens_T), shape.layers, 1)),
        ]
        return np.asarray(np.concatenate(parts, axis=2), dtype=np.float32)

    def _dense(
        self, routes: Routes, index_T: npt.NDArray[np.int64], layers_L: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """The weights of all experts `[T, L, E]`; zero where the index is -1."""
        dense_TLE = np.zeros((len(index_T), self.shape.layers, self.shape.experts), dtype=np.float32)
        ids_TLK = routes.expert_ids_TLK[index_T][:, layers_L].astype(np.int64)
        weights_TLK = routes.weights_TLK[index_T][:, layers_L].astype(np.float32) * (index_T >= 0)[:, None, None]
        np.put_along_axis(dense_TLE, ids_TLK, weights_TLK, axis=2)
        return dense_TLE

    def arrays(self) -> Arrays:
        return {
            "start_LHE": self._start_LHE,
            "nodes_LHRN3": self._nodes_LHRN3,
            "limit_LHRN": self._limit_LHRN,
            "leaf_LHRFE": self._leaf_LHRFE.astype(np.float16),
        }

    @classmethod
    def restore(cls, shape: Shape, settings: dict[str, Any], arrays: Arrays) -> Self:
        predictor = cls(shape)
        predictor._start_LHE = expected_array(arrays, "start_LHE", predictor._start_LHE.shape)
        predictor._limit_LHRN = expected_array(arrays, "limit_LHRN", predictor._limit_LHRN.shape)
        predictor._leaf_LHRFE = expected_array(arrays, "leaf_LHRFE", predictor._leaf_LHRFE.shape)
        nodes = arrays.get("nodes_LHRN3")
        if nodes is None or nodes.dtype != np.int32 or nodes.shape != predictor._nodes_LHRN3.shape:
            raise SpecmoeError(f"stored predictor: expected 'nodes_LHRN3', int32 of shape {predictor._nodes_LHRN3.shape}")
        left, right, feature = nodes[..., 0], nodes[..., 1], nodes[..., 2]
        # Children come after their parent: every walk through a tree ends, and none leaves the table.
        own = np.arange(NODES)
        is_split = feature >= 0
        is_sound = np.where(
            is_split, (left > own) & (right > own) & (np.maximum(left, right) < NODES), (left >= -1) & (left < LEAVES)
        )
        if not is_sound.all() or feature.max(initial=-1) > 4 * shape.experts:
            raise SpecmoeError("stored predictor: the nodes of 'nodes_LHRN3' are not trees")
        predictor._nodes_LHRN3 = nodes
        return predictor


@numba.njit(cache=True, nogil=True)
def _add_leaves(
    features: npt.NDArray[np.float32],
    nodes: npt.NDArray[np.int32],
    limits: npt.NDArray[np.float32],
    leaves: npt.NDArray[np.float32],
    scores: npt.NDArray[np.float32],
) -> None:
    for t in range(features.shape[0]):
        for layer in range(features.shape[1]):
            for number in range(nodes.shape[1]):
                node = 0
                while nodes[layer, number, node, 2] >= 0:
                    split = nodes[layer, number, node]
                    is_left = features[t, layer, split[2]] <= limits[layer, number, node]
                    node = split[0] if is_left else split[1]
                leaf = nodes[layer, number, node, 0]
                if leaf >= 0:
                    scores[t, layer] += leaves[layer, number, leaf]
