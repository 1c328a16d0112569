"""Predicts how soon each expert is used again: what a cache of experts should keep."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from speculation.data.history import History, Prediction
from speculation.data.next_use import discounted_use
from speculation.data.routes import Routes, RouteSource
from speculation.data.tasks import Shape, Task
from speculation.predictors.base import Arrays
from speculation.predictors.features import token_rows
from speculation.predictors.neural.base import (
    Block,
    NetworkConfig,
    NeuralPredictor,
    PairEmbedding,
    relative_weights,
)
from speculation.predictors.neural.places.reuse_features import (
    AT_MATCH,
    FEATURES,
    RECENT,
    SOON_AFTER,
    reuse_features,
)
from speculation.predictors.neural.places.reuse_memory import MEMORY_FEATURES, ReuseMemory
from speculation.predictors.neural.recommended import TOKENS_BACK, UnknownTokenDropout
from speculation.predictors.neural.streams.reuse_stream import ReuseStream
from speculation.predictors.options import TrainingOptions


class Reuse(NeuralPredictor):
    """Predicts the discounted next use `exp(-(n - 1) / 8)` of every expert, where n tokens pass until it is used again.

    It sees the token's identity and the routes of all earlier tokens, and predicts the use after this token: the token's own
    experts are in use anyway when a cache must evict one. A small network looks at each expert's own recent use, at its use
    after earlier occurrences of the same tokens in this text (`reuse_features`), and at its use after the same tokens in the
    training texts, whose routes it keeps (`ReuseMemory`). A larger one looks, once for a token, at the last token's routes of
    all layers and at the identity of the last three tokens.

    memory_bytes: what the routes of training texts may take; 0 to keep none.
    """

    name: ClassVar[str] = "reuse"
    about: ClassVar[str] = "how soon each expert is used again, from its recent use and what followed the same tokens before"
    source: ClassVar[str] = "this project (docs/results/offload.md)"
    sees: ClassVar[str] = "all earlier routes, which tokens they are, the routes of training texts, which it keeps"
    tasks: ClassVar[frozenset[Task]] = frozenset({Task.REUSE})
    default_width: ClassVar[int] = 192
    token_width: ClassVar[int] = 64
    memory_bytes: ClassVar[int] = 32 << 20
    defaults: ClassVar[TrainingOptions] = TrainingOptions(epochs=4, batch_tokens=256, dropout=0.2)

    def __init__(self, shape: Shape, keys: npt.NDArray[np.int64] | None = None, config: NetworkConfig | None = None) -> None:
        super().__init__(shape, keys, config)
        self.memory = ReuseMemory.empty(shape)

    def build(self, vocabulary_size: int) -> nn.Module:
        features = FEATURES + (MEMORY_FEATURES if self.memory_bytes else 0)
        return ReuseNetwork(self.shape, vocabulary_size, self.config.width, self.token_width, features)

    def prepare(self, train: RouteSource) -> None:
        super().prepare(train)
        if self.memory_bytes:
            self.memory = ReuseMemory.of(train, self.memory_bytes)

    def predict(self, history: History) -> Prediction:
        """Predict as every predictor does, but update the sums of the tokens before instead of computing them again."""
        self.check(history)
        stream = history.cache.get(self.name)
        if stream is None or stream.predictor is not self:
            stream = history.cache[self.name] = ReuseStream(self)
        return Prediction.of(stream.scores(history)[:, None])

    def inputs(self, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        return self._inputs(routes, tokens_T, None)

    def training_inputs(self, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        return self._inputs(routes, tokens_T, routes.problem_ids_T[tokens_T])

    def _inputs(
        self, routes: Routes, tokens_T: npt.NDArray[np.int64], without_T: npt.NDArray[np.int32] | None
    ) -> dict[str, npt.NDArray[Any]]:
        """The arguments of `forward`. without_T: for each token, a problem whose routes are left out of the memory."""
        features_TLEF = reuse_features(
            routes.expert_ids_TLK, routes.first_T, routes.matches.by_length_TR, tokens_T, self.shape.experts
        )
        if self.memory_bytes:
            found_TLEF = np.zeros((*features_TLEF.shape[:3], MEMORY_FEATURES), dtype=np.float32)
            self.memory.add_features(self.memory.places(routes, tokens_T, without_T), found_TLEF)
            features_TLEF = np.concatenate([features_TLEF, found_TLEF], axis=-1)
        last_T = routes.previous_T[tokens_T]
        weights_TLK = relative_weights(routes.weights_TLK[np.maximum(last_T, 0)])
        return {
            "features": features_TLEF,
            "rows": self.token_rows(routes, tokens_T),
            "last_ids": routes.expert_ids_TLK[np.maximum(last_T, 0)].astype(np.int64),
            "last_weights": np.where(last_T[:, None, None] >= 0, weights_TLK, 0).astype(np.float32),
        }

    def token_rows(self, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The rows of the token embedding of each token and the two before it, `[T, TOKENS_BACK]`."""
        back_TB = tokens_T[:, None] - np.arange(TOKENS_BACK)
        is_there_TB = back_TB >= routes.first_T[tokens_T, None]
        rows_TB = token_rows(self.keys, routes.token_keys_T[np.maximum(back_TB, 0)].reshape(-1)).reshape(back_TB.shape)
        return np.where(is_there_TB, rows_TB, 0)

    def truth(self, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        device = next(self.network.parameters()).device
        use_TLE = discounted_use(routes.expert_ids_TLK, routes.followers_T, tokens_T, self.shape.experts)
        is_valid_TLH = np.ones((*use_TLE.shape[:2], 1), dtype=np.float32)
        return torch.from_numpy(use_TLE[:, :, None]).to(device), torch.from_numpy(is_valid_TLH).to(device)

    def arrays(self) -> Arrays:
        return super().arrays() | (self.memory.arrays() if self.memory_bytes else {})

    @classmethod
    def restore(cls, shape: Shape, settings: dict[str, Any], arrays: Arrays) -> Self:
        predictor = super().restore(shape, settings, arrays)
        if cls.memory_bytes:
            predictor.memory = ReuseMemory.restore(arrays, shape)
        return predictor


class ReuseNetwork(nn.Module):
    """The network of `Reuse`."""

    hidden = 32

    def __init__(self, shape: Shape, vocabulary_size: int, width: int, token_width: int, features: int) -> None:
        super().__init__()
        pairs = shape.layers * shape.experts
        self.token = nn.Embedding(vocabulary_size, token_width)
        nn.init.normal_(self.token.weight, std=0.3)
        self.unknown = UnknownTokenDropout(0.1)
        self.tokens = nn.Linear(TOKENS_BACK * token_width, width)
        self.last = PairEmbedding(shape.layers, shape.experts, width)
        # One matrix for each kind of hint about every expert: recent use, use at the match, use soon after it.
        self.hints = nn.ModuleList(nn.Linear(pairs, width, bias=False) for _ in range(3))
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(width, pairs)
        nn.init.normal_(self.head.weight, std=0.01)
        self.context = nn.Linear(width, self.hidden)
        # Each expert's own offset in the hidden layer, in which the network that all experts share differs between them.
        self.own = nn.Parameter(torch.randn(shape.layers, shape.experts, self.hidden) * 0.1)
        self.first = nn.Linear(features, self.hidden)
        self.second = nn.Linear(self.hidden, self.hidden)
        self.third = nn.Linear(self.hidden, 1)
        self.bias_LHE = nn.Parameter(torch.zeros(shape.layers, 1, shape.experts))

    def forward(
        self, features: torch.Tensor, rows: torch.Tensor, last_ids: torch.Tensor, last_weights: torch.Tensor
    ) -> torch.Tensor:
        """Logits `[T, L, 1, E]`, from the arrays that `Reuse.inputs` returns."""
        tokens = len(rows)
        recent, at_match, soon_after = self.hints
        state_TD = (
            self.tokens(self.token(self.unknown(rows)).view(tokens, -1))
            + self.last(last_ids, last_weights).sum(1)
            # Scaled because hundreds of experts are added up.
            + 0.2 * recent(features[..., RECENT].reshape(tokens, -1))
            + at_match(features[..., AT_MATCH].amax(-1).reshape(tokens, -1))
            + soon_after(features[..., SOON_AFTER].amax(-1).reshape(tokens, -1))
        ).float()
        for block in self.blocks:
            state_TD = state_TD + block(state_TD)
        state_TD = self.norm(state_TD)
        hidden = torch.relu(self.first(features) + self.own + self.context(state_TD)[:, None, None])
        logits_TLE = self.third(torch.relu(self.second(hidden))).squeeze(-1).float()
        logits_TLE = logits_TLE + self.head(self.dropout(state_TD)).view(logits_TLE.shape).float()
        logits_TLHE: torch.Tensor = logits_TLE[:, :, None] + self.bias_LHE
        return logits_TLHE
