"""Attention among the experts of a layer, biased by a learned graph."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from speculation.data.routes import Routes
from speculation.data.tasks import Shape, Task
from speculation.predictors.neural.base import Block, mean_cross_entropy
from speculation.predictors.neural.context import ContextEmbedding, ContextPredictor
from speculation.predictors.options import TrainingOptions


class AttentionGraph(ContextPredictor):
    """Every expert of the predicted layer is a node. Its features are its use in the context, its identity, and the context.

    Nodes attend to each other; a learned E x E graph per attention head is added to the scores. A routing head predicts which
    experts are selected. A confidence head predicts how many of them are right; the lower the confidence, the closer the result
    is to popularity.
    """

    name: ClassVar[str] = "attention-graph"
    about: ClassVar[str] = "attention among experts along a learned graph; a routing head and a confidence head"
    source: ClassVar[str] = "graph attention over experts"
    width_multiple: ClassVar[int] = 4
    default_width: ClassVar[int] = 32
    defaults: ClassVar[TrainingOptions] = TrainingOptions(epochs=3, batch_tokens=128, learning_rate=2e-3)

    def build(self, vocabulary_size: int) -> nn.Module:
        return GraphNetwork(self.shape, vocabulary_size, self.config.context, self.config.width)

    def loss(self, network: nn.Module, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> torch.Tensor:
        """The loss of the selection, plus that of the confidence, whose target is the share of true experts in the top K."""
        true_TLHE, is_valid_TLH = self.truth(routes, tokens_T)
        logits_TLHE, confidence_TLH = network(**self.tensors(routes, tokens_T), with_confidence=True)
        first = logits_TLHE.topk(self.shape.top_k, dim=-1).indices
        found_TLH = true_TLHE.gather(-1, first).sum(-1) / self.shape.top_k
        sure = nn.functional.binary_cross_entropy_with_logits(confidence_TLH, found_TLH, reduction="none")
        sure_loss = (sure * is_valid_TLH).sum() / is_valid_TLH.sum().clamp(min=1)
        return mean_cross_entropy(logits_TLHE, true_TLHE, is_valid_TLH) + 0.1 * sure_loss


class GraphNetwork(nn.Module):
    """See `AttentionGraph`."""

    def __init__(self, shape: Shape, vocabulary_size: int, context: int, width: int) -> None:
        super().__init__()
        self.is_next_layer, self.experts = shape.task == Task.NEXT_LAYER, shape.experts
        self.embedding = ContextEmbedding(shape, vocabulary_size, context, 4 * width)
        self.join = nn.Linear(context * 4 * width, width)
        self.used = nn.Linear(context, width)
        self.node = nn.Parameter(torch.randn(shape.layers, shape.experts, width) * 0.3)
        # Maps the context to a score for each expert.
        self.affinity = nn.Parameter(torch.randn(shape.layers, 4 * width, shape.experts) * 0.02)
        self.attention = nn.ModuleList(GraphAttention(shape.experts, width, heads=4) for _ in range(2))
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.routing = nn.Linear(width, shape.horizon)
        self.confidence = nn.Linear(width, shape.horizon)
        self.bias_LHE = nn.Parameter(torch.zeros(shape.layers, shape.horizon, shape.experts))

    def forward(self, ids: torch.Tensor, weights: torch.Tensor, row: torch.Tensor, with_confidence: bool = False) -> Any:
        """Logits `[T, L, H, E]`; with_confidence: also the confidence in them `[T, L, H]`, as log-odds."""
        tokens, context, layers, _ = ids.shape
        dense_TCLE = torch.zeros(tokens, context, layers, self.experts, device=ids.device).scatter_(3, ids, weights)
        if self.is_next_layer:
            # Of earlier tokens, layer l sees the routes at layer l + 1, which it predicts first.
            ahead = nn.functional.pad(dense_TCLE[:, :-1, 1:], (0, 0, 0, 1))
            dense_TCLE = torch.cat([ahead, dense_TCLE[:, -1:]], dim=1)
        embedded_TLCD = self.embedding(ids, weights, row)
        context_TLD = self.join(embedded_TLCD.flatten(2))
        spoken_TLE = torch.einsum("tld,lde->tle", embedded_TLCD.sum(2), self.affinity)
        node = self.used(dense_TCLE.permute(0, 2, 3, 1)) + self.node * (1 + spoken_TLE[..., None]) + context_TLD[:, :, None]
        node = node.float().flatten(0, 1)
        for attention, block in zip(self.attention, self.blocks, strict=True):
            node = node + attention(node)
            node = node + block(node)
        node_TLED = self.norm(node).unflatten(0, (tokens, layers))
        logits_TLHE = (self.routing(node_TLED).transpose(2, 3) + spoken_TLE[:, :, None]).float() + self.bias_LHE
        confidence_TLH = self.confidence(node_TLED.mean(2)).float()
        trust = confidence_TLH.sigmoid()[..., None]
        trusted = trust * logits_TLHE + (1 - trust) * self.bias_LHE
        return (trusted, confidence_TLH) if with_confidence else trusted


class GraphAttention(nn.Module):
    """Multi-head attention among nodes `[N, E, D]`, with a learned graph added to its scores."""

    def __init__(self, experts: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.graph = nn.Parameter(torch.zeros(heads, experts, experts))

    def forward(self, node: torch.Tensor) -> torch.Tensor:
        parts = self.project(self.norm(node)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        graph = self.graph.to(parts.dtype)[None]
        mixed = nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], attn_mask=graph)
        added: torch.Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return added.float()
