"""Hierarchical prediction: first the cluster of experts, then the expert within the cluster."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import nn

from profiler.errors import SpecmoeError
from speculation.data.routes import RouteSource, each_group
from speculation.data.tasks import Shape
from speculation.predictors.base import Arrays
from speculation.predictors.neural.context import ContextNetwork, ContextPredictor, Encoder
from speculation.predictors.options import TrainingOptions

CLUSTERS = 8


class Hierarchical(ContextPredictor):
    """A transformer encoder (4 layers, 8 heads) over the layers; log P(e) = log P(c) + log P(e | c) for the cluster c of e.

    The experts of a layer are clustered by the experts that they are selected with. P is a distribution over the layer's
    experts; the log-odds of being selected are its scaled logarithm plus a bias.
    """

    name: ClassVar[str] = "hierarchical"
    about: ClassVar[str] = "transformer encoder over layers; P(expert) = P(cluster) P(expert | cluster), 8 clusters"
    source: ClassVar[str] = "hierarchical softmax over clusters of experts"
    width_multiple: ClassVar[int] = 8
    default_width: ClassVar[int] = 128
    defaults: ClassVar[TrainingOptions] = TrainingOptions(epochs=4, batch_tokens=256, learning_rate=1e-3)

    def build(self, vocabulary_size: int) -> nn.Module:
        return HierarchicalNetwork(self.shape, vocabulary_size, self.config.context, self.config.width)

    def prepare(self, train: RouteSource) -> None:
        super().prepare(train)
        targets_LH = np.stack([self.shape.target_layers(hop) for hop in range(1, self.shape.horizon + 1)], axis=1)
        cluster_LE = torch.from_numpy(clusters_of(train, self.shape))
        # Where the target layer does not exist, the clusters do not matter.
        buffer: Any = self.network.cluster_LHE
        buffer.copy_(cluster_LE[torch.from_numpy(np.maximum(targets_LH, 0))])

    @classmethod
    def restore(cls, shape: Shape, settings: dict[str, Any], arrays: Arrays) -> Self:
        predictor = super().restore(shape, settings, arrays)
        clusters: Any = predictor.network.cluster_LHE
        if not ((clusters >= 0) & (clusters < CLUSTERS)).all():
            raise SpecmoeError(f"stored predictor: 'cluster_LHE' has values outside 0 to {CLUSTERS - 1}")
        return predictor


def clusters_of(source: RouteSource, shape: Shape, seed: int = 0) -> Any:
    """The cluster of each expert `[L, E]`, by k-means on how often the expert is selected together with each other one."""
    from sklearn.cluster import KMeans

    count = min(CLUSTERS, shape.experts)
    together_LEE = np.zeros((shape.layers, shape.experts, shape.experts))
    for routes in each_group(source):
        for layer in range(shape.layers):
            ids_TK = routes.expert_ids_TLK[:, layer].astype(np.int64)
            pairs = (ids_TK[:, :, None] * shape.experts + ids_TK[:, None, :]).reshape(-1)
            together_LEE[layer] += np.bincount(pairs, minlength=shape.experts**2).reshape(shape.experts, shape.experts)
    cluster_LE = np.zeros((shape.layers, shape.experts), dtype=np.int64)
    for layer, together_EE in enumerate(together_LEE):
        np.fill_diagonal(together_EE, 0)
        share_EE = together_EE / np.maximum(together_EE.sum(1, keepdims=True), 1)
        # k-means needs at least as many distinct profiles as clusters. Experts that were never selected together with another
        # one all have the same profile, zeros.
        distinct = len(np.unique(share_EE.round(9), axis=0))
        cluster_LE[layer] = KMeans(min(count, distinct), n_init=4, random_state=seed).fit_predict(share_EE)
    return cluster_LE


class HierarchicalNetwork(ContextNetwork):
    """See `Hierarchical`. cluster_LHE: the cluster of each expert of the predicted layer."""

    cluster_LHE: torch.Tensor

    def __init__(self, shape: Shape, vocabulary_size: int, context: int, width: int) -> None:
        super().__init__(shape, vocabulary_size, context, width)
        self.join = nn.Linear(context * width, width)
        self.encoder = Encoder(shape, width, depth=4, heads=8)
        self.clusters = nn.Parameter(torch.randn(shape.layers, width, shape.horizon * CLUSTERS) * 0.02)
        self.scale = nn.Parameter(torch.ones(shape.layers, shape.horizon, 1))
        self.register_buffer("cluster_LHE", torch.zeros(shape.layers, shape.horizon, shape.experts, dtype=torch.int64))

    def states(self, embedded_TLCD: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        state_TLD: torch.Tensor = self.encoder(self.join(embedded_TLCD.flatten(2)) + embedded_TLCD[:, :, -1])
        return state_TLD

    def forward(self, ids: torch.Tensor, weights: torch.Tensor, row: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        state_TLD = self.states(self.embedding(ids, weights, row))
        expert_TLHE = self.head(state_TLD).float()
        cluster_TLHC = torch.einsum("tld,ldo->tlo", state_TLD, self.clusters).float()
        cluster_TLHC = cluster_TLHC.reshape(*cluster_TLHC.shape[:2], -1, CLUSTERS)
        is_in_LHCE = nn.functional.one_hot(self.cluster_LHE, CLUSTERS).transpose(2, 3).bool()
        # The normalizer of the softmax within each cluster; that of an empty cluster is not used.
        inside = expert_TLHE[:, :, :, None].masked_fill(~is_in_LHCE, -1e4).logsumexp(-1)
        of_cluster_TLHC = cluster_TLHC.masked_fill(~is_in_LHCE.any(-1), -1e4).log_softmax(-1) - inside
        cluster_TLHE = self.cluster_LHE.expand(len(row), -1, -1, -1)
        log_share_TLHE = expert_TLHE + of_cluster_TLHC.gather(3, cluster_TLHE)
        # Relative to the uniform share 1 / E, at which only the bias remains.
        return torch.as_tensor(self.scale * (log_share_TLHE + float(np.log(self.shape.experts))) + self.bias_LHE)
