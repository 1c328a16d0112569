"""Attention over earlier places of the same token: the more a place agrees with what is known, the more its routes count."""

from __future__ import annotations

import torch
from torch import nn

from speculation.data.tasks import Shape, Task
from speculation.predictors.neural.places.similar_places import FACTS

HEADS = 2
# An expert never counts less than this for its rank in a route, relative to 1.
LEAST_RANK = 1e-3
# The confidence of each head: how well places agree in all, and the largest share of a single place.
CONFIDENCES = 2
# At the start of training, how much an agreement at each layer counts, for each head, and how that fades over the layers.
_AGREEMENT, _FADE = (1.0, 2.0), 0.85
# At the start, what the facts of a place count: see `similar_places.FACTS`.
_FACTS = (1.5, 4.0, 2.0, 1.0, 0.0)


class PlaceAttention(nn.Module):
    """Weighs places, and adds up the experts that were used there.

    A place's score at a layer is a weighted sum, learned for each layer, of what it has in common with the last known token at
    every layer and, for next-layer, with the token itself at the layers that are known; plus what a small network makes of its
    facts. A softmax over the places and over "none of them" turns scores into shares. There are HEADS such sets of weights.
    """

    is_past: torch.Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        layers = shape.layers
        fade = _FADE ** (torch.arange(layers)[:, None] - torch.arange(layers)).clamp(min=0)
        self.last = nn.Parameter(torch.zeros(HEADS, layers, layers))
        self.now = None
        if shape.task == Task.NEXT_LAYER:
            self.now = nn.Parameter(torch.tensor(_AGREEMENT)[:, None, None] * fade)
        self.register_buffer("is_past", torch.tril(torch.ones(layers, layers)), persistent=False)
        self.facts = nn.Parameter(torch.tensor(_FACTS).repeat(HEADS, 1))
        self.rise = nn.Linear(FACTS, 16)
        self.fall = nn.Linear(16, HEADS)
        # The first of the K experts of a route may count more than the last.
        self.rank = nn.Parameter(torch.ones(shape.top_k))
        self.experts = shape.experts

    def forward(
        self,
        exists_TPS: torch.Tensor,
        facts_TPF: torch.Tensor,
        last_TPL: torch.Tensor,
        now_TPL: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The shares of the places `[T, G, S, L, P]` for G heads, and the confidences `[T, L, S * G * CONFIDENCES]`."""
        facts = facts_TPF @ self.facts.T + self.fall(nn.functional.gelu(self.rise(facts_TPF)))
        scores = torch.einsum("tpj,glj->tglp", last_TPL, self.last) + facts.transpose(1, 2)[:, :, None]
        if self.now is not None and now_TPL is not None:
            scores = scores + torch.einsum("tpj,glj->tglp", now_TPL, self.now * self.is_past)
        scores = scores.float()[:, :, None].masked_fill(~exists_TPS.transpose(1, 2)[:, None, :, None], -1e4)
        scores = torch.cat([scores, torch.zeros_like(scores[..., :1])], dim=-1)
        shares = scores.softmax(-1)[..., :-1]
        confidences = torch.stack([torch.tanh(scores.logsumexp(-1) / 10), shares.amax(-1)], dim=-1)
        return shares, confidences.permute(0, 3, 2, 1, 4).flatten(2)

    def use(self, shares_TGLP: torch.Tensor, ids_TPLK: torch.Tensor) -> torch.Tensor:
        """The shares of the places at which each expert was used, added up, `[T, G, L, E]`.

        An expert counts more or less by its rank in the route; on average over the K ranks, 1.
        """
        tokens, heads, layers, _ = shares_TGLP.shape
        ids_TLX = ids_TPLK.transpose(1, 2).flatten(2)
        rank_K = self.rank.clamp(min=LEAST_RANK)
        rank_K = rank_K / rank_K.mean()
        added = (shares_TGLP[..., None] * rank_K).flatten(3).float()
        empty = torch.zeros(tokens, heads, layers, self.experts, device=added.device)
        return empty.scatter_add(3, ids_TLX[:, None].expand(-1, heads, -1, -1), added)
