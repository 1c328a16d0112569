"""A small neural predictor: residual MLP over summed embeddings of the routes seen so far."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from analysis.load import count_experts
from profiler.errors import SpecmoeError
from speculation.predictors import Arrays, Predictor, TrainingOptions, expected_array
from speculation.predictors.token_identity import frequent_tokens, stored_keys, token_rows
from speculation.routes import Routes
from speculation.tasks import Shape, Task

WIDTH = 192
BLOCKS = 2
# Tokens with an embedding of their own: the most frequent ones that occur twice, as one cannot teach; all others share one.
MAX_VOCABULARY = 8192
DROPOUT = 0.1
WARM_UP = 0.05


class MlpPredictor(Predictor):
    """Inputs for layer l: the token's routes at layers <= l, all routes of the preceding token, and which
    token it is.

    One network serves all layers; a head per layer gives E logits for each of the H layers ahead. Trained with binary
    cross-entropy on membership in the true set, AdamW, cosine schedule with warm-up, early stopping on validation loss.
    """

    name: ClassVar[str] = "mlp"
    about: ClassVar[str] = "residual MLP over the routes of layers <= l, the preceding token's routes and the token"
    source: ClassVar[str] = "the usual small predictor, here over routes"
    inputs: ClassVar[str] = "routes of layers <= l, of the preceding token, which token it is"
    tasks: ClassVar[frozenset[Task]] = frozenset({Task.NEXT_LAYER})

    def __init__(self, shape: Shape, keys: npt.NDArray[np.int64] | None = None) -> None:
        super().__init__(shape)
        # Ascending; row 0 of the embedding is "any other token".
        self._keys = np.zeros(0, dtype=np.int64) if keys is None else keys
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._network = RouteNetwork(shape, len(self._keys)).to(self._device)

    def fit(
        self,
        train: Routes,
        validation: Routes | None,
        options: TrainingOptions,
        on_progress: Callable[[int, int, dict[str, float]], None],
    ) -> list[dict[str, float]]:
        torch.manual_seed(options.seed)
        random = np.random.default_rng(options.seed)
        self._keys = frequent_tokens(train, MAX_VOCABULARY, at_least=2)
        self._network = RouteNetwork(self.shape, len(self._keys)).to(self._device)
        self._network.start_at_popularity(count_experts(train.expert_ids_TLK, self.shape.experts) / len(train))
        optimizer = torch.optim.AdamW(self._network.parameters(), lr=options.learning_rate, weight_decay=0.05)
        batches = math.ceil(len(train) / options.batch_tokens)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(options.epochs * batches))
        history: list[dict[str, float]] = []
        best_loss, best_state, best_epoch = math.inf, None, 0
        began = time.monotonic()
        for epoch in range(options.epochs):
            self._network.train()
            total = 0.0
            order_T = random.permutation(len(train))
            for start in range(0, len(train), options.batch_tokens):
                tokens = order_T[start : start + options.batch_tokens]
                loss = self._loss(train, tokens)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call] # PyTorch leaves it without annotations
                nn.utils.clip_grad_norm_(self._network.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                total += loss.item() * len(tokens)
            if not math.isfinite(total):
                raise SpecmoeError(f"training diverged in epoch {epoch + 1}: choose a smaller --learning-rate")
            entry = {"epoch": epoch + 1, "train_loss": total / len(train)}
            if validation is not None:
                entry["validation_loss"] = self._mean_loss(validation)
                if entry["validation_loss"] < best_loss:
                    best_loss, best_epoch = entry["validation_loss"], epoch
                    best_state = copy.deepcopy(self._network.state_dict())
            history.append(entry)
            on_progress(epoch + 1, options.epochs, entry)
            out_of_time = options.max_seconds is not None and time.monotonic() - began > options.max_seconds
            if out_of_time or (best_state is not None and epoch - best_epoch >= options.patience):
                break
        if best_state is not None:
            self._network.load_state_dict(best_state)
        return history

    @torch.inference_mode()
    def probabilities(self, routes: Routes, tokens: slice) -> npt.NDArray[np.float32]:
        self._network.eval()
        index_T = np.arange(*tokens.indices(len(routes)))
        logits_TLHE = self._network(*self._inputs(routes, index_T))
        return np.asarray(logits_TLHE.sigmoid().float().cpu().numpy())

    def arrays(self) -> Arrays:
        weights = {f"network.{name}": tensor.cpu().numpy() for name, tensor in self._network.state_dict().items()}
        return weights | {"keys": self._keys}

    def settings(self) -> dict[str, Any]:
        return {"width": WIDTH, "blocks": BLOCKS}

    @classmethod
    def restore(cls, shape: Shape, settings: dict[str, Any], arrays: Arrays) -> Self:
        if (settings.get("width"), settings.get("blocks")) != (WIDTH, BLOCKS):
            raise SpecmoeError(f"stored predictor: width and blocks {settings}, this release has {WIDTH} and {BLOCKS}")
        predictor = cls(shape, stored_keys(arrays, MAX_VOCABULARY))
        for name in arrays:
            expected_array(arrays, name, arrays[name].shape)
        weights = {name[8:]: torch.from_numpy(a) for name, a in arrays.items() if name.startswith("network.")}
        try:
            predictor._network.load_state_dict(weights)
        except RuntimeError as error:
            raise SpecmoeError(f"stored predictor: weights do not fit: {' '.join(str(error).split())}") from error
        return predictor

    def _loss(self, routes: Routes, tokens: npt.NDArray[np.int64]) -> torch.Tensor:
        logits_TLHE = self._network(*self._inputs(routes, tokens))
        target_TLHE = self._targets(routes, tokens)
        losses = nn.functional.binary_cross_entropy_with_logits(logits_TLHE, target_TLHE, reduction="none")
        return (losses * self._network.is_target_LH[..., None]).sum() / (
            self._network.is_target_LH.sum() * losses.shape[0] * losses.shape[-1]
        )

    @torch.inference_mode()
    def _mean_loss(self, routes: Routes) -> float:
        self._network.eval()
        total = 0.0
        for start in range(0, len(routes), 1024):
            tokens = np.arange(start, min(start + 1024, len(routes)))
            total += self._loss(routes, tokens).item() * len(tokens)
        return total / len(routes)

    def _inputs(self, routes: Routes, tokens: npt.NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
        previous_T = routes.previous_T[tokens]
        # A first token has no predecessor: its row is masked out.
        has_previous_T = previous_T >= 0
        row_T = token_rows(self._keys, routes.token_keys_T[tokens])
        arrays = (
            routes.expert_ids_TLK[tokens].astype(np.int64),
            _relative(routes.weights_TLK[tokens]),
            routes.expert_ids_TLK[previous_T].astype(np.int64),
            _relative(routes.weights_TLK[previous_T]) * has_previous_T[:, None, None],
            row_T,
        )
        return tuple(torch.from_numpy(array).to(self._device) for array in arrays)

    def _targets(self, routes: Routes, tokens: npt.NDArray[np.int64]) -> torch.Tensor:
        """1 where expert e is among the K of layer l+h: `[T, L, H, E]`; 0 where l+h is past the last layer."""
        ids_TLK = torch.from_numpy(routes.expert_ids_TLK[tokens].astype(np.int64)).to(self._device)
        layers, horizon = self.shape.layers, self.shape.horizon
        is_selected_TLE = torch.zeros(len(tokens), layers, self.shape.experts, device=self._device)
        is_selected_TLE.scatter_(2, ids_TLK, 1.0)
        target_TLHE = torch.zeros(len(tokens), layers, horizon, self.shape.experts, device=self._device)
        for hop in range(1, horizon + 1):
            target_TLHE[:, : layers - hop, hop - 1] = is_selected_TLE[:, hop:]
        return target_TLHE


class RouteNetwork(nn.Module):
    """Embeddings of (layer, expert) pairs, summed with the routing weights; cumulative over layers, so that layer l sees
    no later layer.
    """

    is_target_LH: torch.Tensor
    offset_L: torch.Tensor

    def __init__(self, shape: Shape, kinds: int) -> None:
        super().__init__()
        self.shape = shape
        pairs = shape.layers * shape.experts
        self.seen = nn.Embedding(pairs, WIDTH)
        self.current = nn.Embedding(pairs, WIDTH)
        self.previous = nn.Embedding(pairs, WIDTH)
        self.previous_ahead = nn.Embedding(pairs, WIDTH)
        self.token = nn.Embedding(kinds + 1, WIDTH)
        self.layer = nn.Embedding(shape.layers, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(2 * WIDTH, WIDTH)
            )
            for _ in range(BLOCKS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        outputs = shape.horizon * shape.experts
        self.head = nn.Parameter(torch.randn(shape.layers, WIDTH, outputs) * 0.01)
        self.bias = nn.Parameter(torch.zeros(shape.layers, outputs))
        for embedding in (self.seen, self.current, self.previous, self.previous_ahead, self.token, self.layer):
            nn.init.normal_(embedding.weight, std=0.1)
        hop_H = torch.arange(1, shape.horizon + 1)
        is_target_LH = torch.arange(shape.layers)[:, None] + hop_H < shape.layers
        self.register_buffer("is_target_LH", is_target_LH.float(), persistent=False)
        self.register_buffer("offset_L", torch.arange(shape.layers)[:, None] * shape.experts, persistent=False)

    def start_at_popularity(self, frequency_LE: npt.NDArray[np.float64]) -> None:
        """Set the bias to the log-odds of each expert's frequency, so that training starts from the popularity baseline."""
        log_odds_LE = torch.logit(torch.from_numpy(frequency_LE), eps=1e-4).float()
        bias_LHE = self.bias.data.view(self.shape.layers, self.shape.horizon, self.shape.experts)
        for hop in range(1, self.shape.horizon + 1):
            bias_LHE[: self.shape.layers - hop, hop - 1] = log_odds_LE[hop:]

    def forward(
        self,
        ids_TLK: torch.Tensor,
        weights_TLK: torch.Tensor,
        previous_ids_TLK: torch.Tensor,
        previous_weights_TLK: torch.Tensor,
        token_row_T: torch.Tensor,
    ) -> torch.Tensor:
        """Logits `[T, L, H, E]`."""
        now, before = ids_TLK + self.offset_L, previous_ids_TLK + self.offset_L
        seen_TLD = _weighted(self.seen(now), weights_TLK).cumsum(1)
        previous_TD = _weighted(self.previous(before), previous_weights_TLK).sum(1)
        ahead_TLD = _weighted(self.previous_ahead(before), previous_weights_TLK)
        # Layer l is given the preceding token's route at the layer that it predicts first.
        ahead_TLD = torch.cat([ahead_TLD[:, 1:], torch.zeros_like(ahead_TLD[:, :1])], dim=1)
        per_token_TD = previous_TD + self.token(token_row_T)
        state = seen_TLD + _weighted(self.current(now), weights_TLK) + ahead_TLD + per_token_TD[:, None] + self.layer.weight
        for block in self.blocks:
            state = state + block(state)
        logits = torch.einsum("tld,ldo->tlo", self.norm(state), self.head) + self.bias
        return logits.view(*logits.shape[:2], self.shape.horizon, self.shape.experts)


def _weighted(embedded_TLKD: torch.Tensor, weights_TLK: torch.Tensor) -> torch.Tensor:
    return torch.einsum("tlkd,tlk->tld", embedded_TLKD, weights_TLK)


def _relative(weights_TLK: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
    """Weights over their mean within each (token, layer): comparable between models that renormalise and those that do not."""
    weights = weights_TLK.astype(np.float32)
    return np.asarray(weights / np.maximum(weights.mean(-1, keepdims=True), 1e-6))


def _cosine(steps: int) -> Callable[[int], float]:
    warm_up = max(1, int(WARM_UP * steps))

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))

    return factor
