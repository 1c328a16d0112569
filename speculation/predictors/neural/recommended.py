"""The best predictor of this project: a residual network over the layers that sees what was used at similar places before."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from speculation.data.history import History, Prediction
from speculation.data.routes import Routes, RouteSource
from speculation.data.tasks import Shape, Task
from speculation.predictors.base import Arrays
from speculation.predictors.features import frequent_tokens, recent_use, token_rows
from speculation.predictors.neural.base import (
    Block,
    NetworkConfig,
    NeuralPredictor,
    PairEmbedding,
    relative_weights,
)
from speculation.predictors.neural.places.place_attention import CONFIDENCES, HEADS, PlaceAttention
from speculation.predictors.neural.places.similar_places import common_now, find_places, routes_at
from speculation.predictors.neural.places.text_memory import TextMemory
from speculation.predictors.neural.streams.recommended_stream import Stream, StreamWeights
from speculation.predictors.options import TrainingOptions

# This token and the two before it.
TOKENS_BACK = 3
POSITIONS = 16
# The use at similar places goes into the logits as log(1 + use / LITTLE_USE), times DIRECT at the start of training.
LITTLE_USE, DIRECT = 0.02, 0.5


class Recommended(NeuralPredictor):
    """Predicts each layer from five inputs:

    - the token's routes so far (next-layer only);
    - the routes of the last known token;
    - the routes at earlier places of the same token, in its own text and in the training texts, which it keeps: the more such a
      place agrees with what is known, the more it counts (`PlaceAttention`);
    - the recent use of every expert;
    - the identity of the token and of the two before it.

    A state passes through one residual block per layer, like the model's own residual stream, and the routes of each layer are
    added to it.

    places: P, the number of places. memory_bytes: what the routes of training texts may take; 0 to keep only the typical route
    of each frequent token.
    """

    name: ClassVar[str] = "recommended"
    about: ClassVar[str] = (
        "residual blocks over the layers; routes so far, of the last token, and of similar places in this and in training texts"
    )
    source: ClassVar[str] = "this project (docs/results/predictors.md)"
    sees: ClassVar[str] = "all routes that the task allows, which tokens they are, the routes of training texts, which it keeps"
    default_width: ClassVar[int] = 192
    token_width: ClassVar[int] = 64
    # The width of a block's hidden layer, as a multiple of the state's.
    times: ClassVar[int] = 2
    places: ClassVar[int] = 16
    memory_bytes: ClassVar[int] = 32 << 20
    # Tokens over which the recent use of experts is averaged.
    windows: ClassVar[tuple[int, ...]] = (4, 16, 128)
    defaults: ClassVar[TrainingOptions] = TrainingOptions(
        epochs=None, seen_tokens=1_000_000, batch_tokens=512, dropout=0.2, learning_rate=3e-3
    )

    def __init__(self, shape: Shape, keys: npt.NDArray[np.int64] | None = None, config: NetworkConfig | None = None) -> None:
        super().__init__(shape, keys, config)
        self.memory = TextMemory.empty(shape)
        # In training, a problem must find nothing of its own.
        self._training_memory = self.memory
        self._stream_weights: StreamWeights | None = None

    def build(self, vocabulary_size: int) -> nn.Module:
        return self.network_of(self.shape, vocabulary_size, self.config.width)

    @classmethod
    def typical_tokens(cls, shape: Shape) -> int:
        """The number of tokens whose typical route is kept by a predictor that keeps no training texts.

        None for next-token: a typical route is of one token, and does not say what follows.
        """
        return 0 if shape.task == Task.NEXT_TOKEN else cls.max_vocabulary

    @classmethod
    def network_of(cls, shape: Shape, vocabulary_size: int, width: int) -> nn.Module:
        """A new network of this width."""
        return RecommendedNetwork(shape, vocabulary_size, width, cls.token_width, cls.times, len(cls.windows))

    def prepare(self, train: RouteSource) -> None:
        super().prepare(train)
        if self.memory_bytes:
            self.memory = self._training_memory = TextMemory.of(train, self.memory_bytes)
        else:
            keys = frequent_tokens(train, self.typical_tokens(self.shape), min_count=2)
            self.memory = TextMemory.typical(train, keys, self.shape)
            self._training_memory = TextMemory.typical(train, keys, self.shape, parts=2)

    def predict(self, history: History) -> Prediction:
        """Predict as every predictor does, but without PyTorch, and reusing the state of the layers below."""
        self.check(history)
        if self._stream_weights is None or self._stream_weights.network is not self.network:
            self._stream_weights = StreamWeights(self.network, LITTLE_USE)
        stream = history.cache.get(self.name)
        if stream is None or stream.weights is not self._stream_weights:
            stream = history.cache[self.name] = Stream(self._stream_weights)
        token = history.tokens - 1
        is_next_layer = self.shape.task == Task.NEXT_LAYER
        if not is_next_layer or stream.token != token or stream.layer >= history.layer:
            stream.begin(token, self._inputs(history.routes, np.array([token]), None))
        return stream.next_layer(history) if is_next_layer else stream.all_layers()

    def inputs(self, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        return self._with_own_routes(routes, tokens_T, self._inputs(routes, tokens_T, None))

    def training_inputs(self, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        own_T = routes.problem_ids_T[tokens_T]
        return self._with_own_routes(
            routes, tokens_T, self._inputs(routes, tokens_T, own_T if self.memory_bytes else own_T % 2)
        )

    def _inputs(
        self, routes: Routes, tokens_T: npt.NDArray[np.int64], without_T: npt.NDArray[np.int32] | None
    ) -> dict[str, npt.NDArray[Any]]:
        """The arguments of `forward` but those that depend on the routes of the tokens themselves.

        without_T: in training, for each token, what `problem_ids_M` of the memory is for its own problem's routes.
        """
        shape = self.shape
        memory = self.memory if without_T is None else self._training_memory
        known_back = 0 if shape.task == Task.NEXT_TOKEN else 1
        known_T = tokens_T if shape.task == Task.NEXT_TOKEN else routes.previous_T[tokens_T]
        ahead = range(1, shape.horizon + 1) if shape.task == Task.NEXT_TOKEN else range(1)
        places = find_places(routes, memory, tokens_T, shape.experts, self.places, known_back, without_T)
        found = routes_at(places, routes, memory, tokens_T, known_back, ahead)
        back_TB = tokens_T[:, None] - np.arange(TOKENS_BACK)
        is_there_TB = back_TB >= routes.first_T[tokens_T, None]
        rows_TB = token_rows(self.keys, routes.token_keys_T[np.maximum(back_TB, 0)].reshape(-1)).reshape(back_TB.shape)
        weights_TLK = relative_weights(routes.weights_TLK[known_T]) * (known_T >= 0)[:, None, None]
        position_T = np.log2(routes.token_ids_T[tokens_T] + 1.0).astype(np.int64)
        return {
            "last_ids": routes.expert_ids_TLK[known_T].astype(np.int64),
            "last_weights": weights_TLK.astype(np.float32),
            "place_ids": found.ids_TPSLK,
            "place_exists": found.exists_TPS,
            "place_facts": places.facts_TPF,
            "place_last": found.common_TPL,
            "rows": np.where(is_there_TB, rows_TB, 0),
            "recent": recent_use(routes, tokens_T, known_T, shape.experts, self.windows),
            "position": np.minimum(position_T, POSITIONS - 1),
        }

    def _with_own_routes(
        self, routes: Routes, tokens_T: npt.NDArray[np.int64], arrays: dict[str, npt.NDArray[Any]]
    ) -> dict[str, npt.NDArray[Any]]:
        """All arguments of `forward`: for next-layer, the routes of the tokens themselves as well."""
        if self.shape.task != Task.NEXT_LAYER:
            return arrays
        return arrays | {
            "place_now": common_now(routes, tokens_T, arrays["place_ids"][:, :, 0]),
            "now_ids": routes.expert_ids_TLK[tokens_T].astype(np.int64),
            "now_weights": relative_weights(routes.weights_TLK[tokens_T]),
        }

    def arrays(self) -> Arrays:
        return super().arrays() | self.memory.arrays()

    @classmethod
    def restore(cls, shape: Shape, settings: dict[str, Any], arrays: Arrays) -> Self:
        predictor = super().restore(shape, settings, arrays)
        predictor.memory = TextMemory.restore(arrays, shape)
        return predictor


class RecommendedNetwork(nn.Module):
    """See `Recommended`. D is the width of the state."""

    def __init__(self, shape: Shape, vocabulary_size: int, width: int, token_width: int, times: int, windows: int) -> None:
        super().__init__()
        layers, experts = shape.layers, shape.experts
        self.shape = shape
        self.steps = shape.horizon if shape.task == Task.NEXT_TOKEN else 1
        self.now = PairEmbedding(layers, experts, width) if shape.task == Task.NEXT_LAYER else None
        self.last = PairEmbedding(layers, experts, width)
        self.places = PlaceAttention(shape)
        used = self.steps * HEADS * experts
        self.used_layer = nn.Parameter(torch.randn(layers, used, width) * 0.1)
        self.confidence = nn.Parameter(torch.zeros(layers, self.steps * HEADS * CONFIDENCES, width))
        # How much the use at the places counts for the logits directly; at the start of training, only the first head's does.
        self.direct = nn.Parameter(torch.tensor([DIRECT, 0.0]).repeat(layers, shape.horizon, 1))
        self.unknown = UnknownTokenDropout(0.1)
        self.position = nn.Embedding(POSITIONS, width)
        self.token = nn.Embedding(vocabulary_size, token_width)
        self.tokens = nn.Linear(TOKENS_BACK * token_width, width)
        self.recent_all = nn.Linear(windows * width, width)
        self.recent_layer = nn.Parameter(torch.randn(layers, windows * experts, width) * 0.1)
        self.last_all = nn.Linear(width, width)
        for embedding in (self.position, self.token):
            nn.init.normal_(embedding.weight, std=0.3)
        self.context = nn.ModuleList(Block(width, times) for _ in range(2))
        # For next-layer, nothing is predicted from the last layer.
        self.layers = layers - (shape.task == Task.NEXT_LAYER)
        self.blocks = nn.ModuleList(Block(width, times) for _ in range(self.layers))
        self.norm_scale = nn.Parameter(torch.ones(layers, 1, width))
        self.head = nn.Parameter(torch.randn(layers, width, shape.horizon * experts) * 0.02)
        self.bias_LHE = nn.Parameter(torch.zeros(layers, shape.horizon, experts))

    def forward(
        self,
        last_ids: torch.Tensor,
        last_weights: torch.Tensor,
        place_ids: torch.Tensor,
        place_exists: torch.Tensor,
        place_facts: torch.Tensor,
        place_last: torch.Tensor,
        rows: torch.Tensor,
        recent: torch.Tensor,
        position: torch.Tensor,
        place_now: torch.Tensor | None = None,
        now_ids: torch.Tensor | None = None,
        now_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits `[T, L, H, E]`, from the arrays that `Recommended.inputs` returns."""
        tokens, shape = len(rows), self.shape
        is_next_layer = self.now is not None
        shares_TGSLP, confidence_TLC = self.places(place_exists, place_facts, place_last, place_now)
        # What was used at the places, for each hop: at the layers ahead, or at the tokens ahead.
        used_HTGLE = []
        for hop in range(shape.horizon):
            step, ahead = (0, hop + 1) if is_next_layer else (hop, 0)
            shares_TGLP = shares_TGSLP[:, :, step, : shape.layers - ahead]
            used_HTGLE.append(self.places.use(shares_TGLP, place_ids[:, :, step, ahead:]))
        # The layers that hints and predictions are about: for next-layer, layer l sees those about layer l + 1.
        about = slice(int(is_next_layer), None)
        by_layer = torch.stack(used_HTGLE[: self.steps], dim=1).permute(0, 3, 1, 2, 4).flatten(2)
        used_TLD = torch.einsum("tli,lid->tld", by_layer, self.used_layer[about])
        used_TLD = used_TLD + torch.einsum("tlc,lcd->tld", confidence_TLC[:, : self.layers], self.confidence[about])
        last_TLD = self.last(last_ids, last_weights)
        recent_TLX = recent.transpose(1, 2).reshape(tokens, shape.layers, -1)
        recent_TLD = torch.einsum("tli,lid->tld", recent_TLX, self.recent_layer)
        hints_TLD = last_TLD[:, about] + recent_TLD[:, about] + used_TLD
        state_TD = (
            self.tokens(self.token(self.unknown(rows)).view(tokens, -1))
            + self.position(position)
            + self.last_all(last_TLD.sum(1))
            # The mean use of the experts is embedded as the last token's routes are.
            + self.recent_all((recent.flatten(2) @ self.last.table).flatten(1))
        ).float()
        for block in self.context:
            state_TD = state_TD + block(state_TD)
        # The gradient of one `unbind` is much faster than that of an index for each layer.
        hints_LTD = hints_TLD.unbind(1)
        now_LTD = self.now(now_ids, now_weights).unbind(1) if self.now is not None else None
        states = []
        for layer, block in enumerate(self.blocks):
            hint_TD = hints_LTD[layer]
            if now_LTD is not None:
                state_TD = state_TD + now_LTD[layer]
            state_TD = state_TD + block(state_TD + hint_TD)
            states.append(state_TD + hint_TD)
        states_LTD = nn.functional.layer_norm(torch.stack(states), state_TD.shape[-1:]) * self.norm_scale[: self.layers]
        logits_LTO = torch.bmm(states_LTD, self.head[: self.layers])
        logits_TLHE = logits_LTO.transpose(0, 1).reshape(tokens, self.layers, shape.horizon, shape.experts).float()
        direct_HTLE = [
            torch.einsum("tgle,lg->tle", torch.log1p(used_TGLE / LITTLE_USE), self.direct[: used_TGLE.shape[2], hop])
            for hop, used_TGLE in enumerate(used_HTGLE)
        ]
        padded = [nn.functional.pad(direct, (0, 0, 0, self.layers - direct.shape[1])) for direct in direct_HTLE]
        logits_TLHE = logits_TLHE + torch.stack(padded, dim=2)
        if self.layers < shape.layers:
            logits_TLHE = nn.functional.pad(logits_TLHE, (0, 0, 0, 0, 0, 1))
        return logits_TLHE + self.bias_LHE


class UnknownTokenDropout(nn.Module):
    """Replaces random token rows with row 0, that of unknown tokens, during training.

    New texts contain tokens without their own embedding; the network must learn to predict without one.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return rows
        return rows * (torch.rand(rows.shape, device=rows.device) >= self.share)
