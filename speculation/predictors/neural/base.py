"""What neural predictors share: token embeddings, training, and weights stored in half precision."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from profiler.errors import SpecmoeError, UsageError
from profiler.trace.schema import MAX_HIDDEN_SIZE
from speculation.data.routes import Routes, RouteSource, router_input_scale, router_inputs_of
from speculation.data.tasks import Shape, Task, targets
from speculation.predictors.base import Arrays, Predictor, expected_array, stored_weights
from speculation.predictors.features import at_targets, expert_frequency, frequent_tokens, stored_keys
from speculation.predictors.neural.training_loop import fit_network
from speculation.predictors.options import Epochs, Progress, TrainingOptions

PREFIX = "network."
MAX_SETTING = 8192


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The sizes of a network that do not follow from the `Shape`; stored in config.json.

    width: the width of its states.
    context: the number of tokens whose routes it sees in order; 1 if it has no such context.
    uncertain_above: it sees its whole context only where the `uncertainty` of the last known token's routing is above this, and
    two tokens elsewhere. None: always the whole context.
    shared_layers: whether one head serves all layers.
    hidden: D, the width of the router inputs that it sees in addition to the routes; 0 if it sees none.

    Raises `SpecmoeError` if a value is invalid.
    """

    width: int
    context: int = 1
    uncertain_above: float | None = None
    shared_layers: bool = False
    hidden: int = 0

    def __post_init__(self) -> None:
        for name, size in (("width", self.width), ("context", self.context)):
            if type(size) is not int or not 1 <= size <= MAX_SETTING:
                raise SpecmoeError(f"{name} {size!r}, expected 1 to {MAX_SETTING:,}")
        limit = self.uncertain_above
        if limit is not None and not (isinstance(limit, int | float) and 0 <= limit <= 1):
            raise SpecmoeError(f"uncertain_above {limit!r}, expected 0 to 1")
        if type(self.hidden) is not int or not 0 <= self.hidden <= MAX_HIDDEN_SIZE:
            raise SpecmoeError(f"hidden {self.hidden!r}, expected 0 to {MAX_HIDDEN_SIZE:,}")
        if type(self.shared_layers) is not bool:
            raise SpecmoeError(f"shared_layers {self.shared_layers!r}, expected true or false")


class NeuralPredictor(Predictor):
    """A network from arrays of routes to logits `[T, L, H, E]`, trained with binary cross-entropy: is the expert among the K?

    max_vocabulary: the maximum number of distinct tokens with their own embedding. The most frequent ones get one, if they
    occur at least twice: little can be learned from a single occurrence. All other tokens share row 0.
    memory_bytes: what the texts of training problems that it keeps (token ids and routes) may take; 0 if it keeps none.
    """

    max_vocabulary: ClassVar[int] = 8192
    memory_bytes: ClassVar[int] = 0
    default_width: ClassVar[int]

    # Whether one head can serve all layers; and what the width must be a multiple of, because attention heads divide it.
    can_share: ClassVar[bool] = False
    width_multiple: ClassVar[int] = 1

    def __init__(self, shape: Shape, keys: npt.NDArray[np.int64] | None = None, config: NetworkConfig | None = None) -> None:
        super().__init__(shape)
        self.keys = np.zeros(0, dtype=np.int64) if keys is None else keys
        self.config = config or NetworkConfig(width=self.default_width, context=self.default_context())
        if self.config.width % self.width_multiple:
            raise UsageError(f"width {self.config.width}: expected a multiple of {self.width_multiple} for {self.name}")
        self.network = self.build(len(self.keys) + 1)

    @classmethod
    def keeps_training_texts(cls) -> bool:
        return cls.memory_bytes > 0

    def default_context(self) -> int:
        """C, the number of tokens whose routes the network sees in order; 1 if it has no such context."""
        return 1

    def config_for(self, options: TrainingOptions, train: RouteSource) -> NetworkConfig:
        """The network that these options request. Raises `SpecmoeError` if this predictor does not support an option."""
        if options.shared_layers and not self.can_share:
            raise UsageError(f"{self.name} has no head that could be shared: leave out shared_layers")
        if self.config.context == 1 and (options.context or options.adaptive_context):
            raise UsageError(f"{self.name} has no context to choose: leave out context and adaptive_context")
        chosen = {"width": options.width, "context": options.context}
        sizes = {name: size for name, size in chosen.items() if size is not None}
        if options.router_inputs:
            if self.shape.task == Task.WHOLE_PATH:
                raise UsageError("whole-path sees nothing of the token's routers: leave out router_inputs")
            sizes["hidden"] = router_inputs_of(train.group(0), self.name).hidden_TLD.shape[2]
        return type(self)(self.shape, config=replace(self.config, **sizes, shared_layers=options.shared_layers)).config

    @abstractmethod
    def build(self, vocabulary_size: int) -> nn.Module:
        """A new network whose token embedding has `vocabulary_size` rows, with a parameter `bias_LHE` added to its logits."""

    @abstractmethod
    def inputs(self, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        """The arguments of the network's `forward` for these tokens, by name."""

    def training_inputs(self, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        """The same in training: a predictor that keeps training texts must find nothing of a token's own problem in them."""
        return self.inputs(routes, tokens_T)

    def fit(
        self,
        train: RouteSource,
        validation: RouteSource | None,
        options: TrainingOptions,
        on_progress: Progress,
        out: Path | None = None,
    ) -> Epochs:
        torch.manual_seed(options.seed)
        self.keys = frequent_tokens(train, self.max_vocabulary, min_count=2)
        self.config = self.config_for(options, train)
        self.network = self.build(len(self.keys) + 1)
        for module in self.network.modules():
            if isinstance(module, nn.Dropout):
                module.p = options.dropout
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = options.dropout
        self.prepare(train)
        epochs = fit_network(self, train, validation, options, on_progress, out)
        # As they are stored, so that this predictor is the one that will be loaded.
        for tensor in self.network.state_dict().values():
            tensor.copy_(torch.from_numpy(stored_weights(tensor.cpu().numpy()).astype(np.float32)))
        return epochs

    def prepare(self, train: RouteSource) -> None:
        """Initialize the new network from the training routes.

        Its bias is set to the log-odds of each expert's frequency, so that training starts from the popularity baseline.
        """
        log_odds_LE = torch.logit(torch.from_numpy(expert_frequency(train, self.shape)), eps=1e-4).numpy()
        bias: Any = self.network.bias_LHE
        bias.data.copy_(torch.from_numpy(at_targets(log_odds_LE, self.shape)))
        for module in self.network.modules():
            if isinstance(module, RouterInputEmbedding):
                module.scale.copy_(torch.from_numpy(router_input_scale(train, self.name)))

    @property
    def takes_router_inputs(self) -> bool:
        return self.needs_router_inputs or self.config.hidden > 0

    def hidden_of(self, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        """The network's input `hidden` `[T, L, D]`, the router inputs of these tokens; empty if it does not use them."""
        if not self.config.hidden:
            return {}
        return {"hidden": router_inputs_of(routes, self.name, self.config.hidden).hidden_TLD[tokens_T].astype(np.float32)}

    def loss(self, network: nn.Module, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> torch.Tensor:
        """The mean binary cross-entropy over the experts of all valid predictions."""
        logits_TLHE = network(**self.tensors(routes, tokens_T, in_training=network.training))
        return mean_cross_entropy(logits_TLHE, *self.truth(routes, tokens_T))

    @torch.inference_mode()
    def probabilities(self, routes: Routes, tokens: slice) -> npt.NDArray[np.float32]:
        self.network.eval()
        tokens_T = np.arange(*tokens.indices(len(routes)))
        size = self._inference_batch_tokens
        parts = [tokens_T[start : start + size] for start in range(0, len(tokens_T), size)] or [tokens_T]
        # Also if the caller computes in a lower precision, in which many experts would have equal scores.
        with torch.autocast(next(self.network.parameters()).device.type, enabled=False):
            return np.concatenate([self.network(**self.tensors(routes, part)).sigmoid().cpu().numpy() for part in parts])

    @property
    def _inference_batch_tokens(self) -> int:
        # Inference needs no gradients, so twice a training batch fits into the same memory.
        return 2 * self.defaults.batch_tokens

    def arrays(self) -> Arrays:
        weights = self.network.state_dict().items()
        return {f"{PREFIX}{name}": stored_weights(tensor.cpu().numpy()) for name, tensor in weights} | {"keys": self.keys}

    @classmethod
    def parameters_for(cls, shape: Shape) -> int | None:
        with torch.device("meta"):
            network = cls(shape, np.arange(cls.max_vocabulary)).network
        return sum(parameter.numel() for parameter in network.parameters())

    def settings(self) -> dict[str, Any]:
        return asdict(self.config)

    @classmethod
    def restore(cls, shape: Shape, settings: dict[str, Any], arrays: Arrays) -> Self:
        keys = stored_keys(arrays, cls.max_vocabulary)
        try:
            config = NetworkConfig(**settings)
        except (SpecmoeError, TypeError) as error:
            raise SpecmoeError(f"stored predictor: settings: {error}") from error
        weights = {
            name.removeprefix(PREFIX): torch.from_numpy(expected_array(arrays, name, array.shape))
            for name, array in arrays.items()
            if name.startswith(PREFIX)
        }
        try:
            # Compare the shapes on the meta device first, so that untrusted settings cannot make us allocate more memory than
            # the stored weights take.
            with torch.device("meta"):
                expected = cls(shape, keys, config).network.state_dict()
            for name in sorted(expected.keys() | weights.keys()):
                sides = [tuple(side[name].shape) if name in side else "missing" for side in (weights, expected)]
                if sides[0] != sides[1]:
                    raise SpecmoeError(
                        f"stored predictor: weights {name!r} are {sides[0]}, expected {sides[1]}: they were changed, or stored "
                        f"by an earlier version of {cls.name}, whose network was another one; train it again"
                    )
            predictor = cls(shape, keys, config)
            predictor.network.load_state_dict(weights)
        except (RuntimeError, AssertionError) as error:
            raise SpecmoeError(f"stored predictor: weights do not fit: {' '.join(str(error).split())[:500]}") from error
        if torch.cuda.is_available():
            predictor.network.cuda()
        return predictor

    def tensors(self, routes: Routes, tokens_T: npt.NDArray[np.int64], *, in_training: bool = False) -> dict[str, torch.Tensor]:
        """`inputs`, or `training_inputs`, on the network's device."""
        device = next(self.network.parameters()).device
        arrays = self.training_inputs(routes, tokens_T) if in_training else self.inputs(routes, tokens_T)
        return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}

    def truth(self, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Targets `[T, L, H, E]`, 1 where an expert is in the true set, and a mask `[T, L, H]`, 1 where the target exists."""
        shape, device = self.shape, next(self.network.parameters()).device
        true_TLHE = torch.zeros(len(tokens_T), shape.layers, shape.horizon, shape.experts, device=device)
        is_valid_TLH = np.zeros(true_TLHE.shape[:3], dtype=np.float32)
        for hop in range(1, shape.horizon + 1):
            true = targets(routes, shape, tokens_T, hop)
            ids_TLK = torch.from_numpy(true.ids_TLK.astype(np.int64)).to(device)
            true_TLHE[:, :, hop - 1].scatter_(2, ids_TLK, 1.0)
            is_valid_TLH[:, :, hop - 1] = true.is_valid_TL
        return true_TLHE, torch.from_numpy(is_valid_TLH).to(device)


def mean_cross_entropy(logits_TLHE: torch.Tensor, true_TLHE: torch.Tensor, is_valid_TLH: torch.Tensor) -> torch.Tensor:
    """The mean binary cross-entropy over the experts of all valid predictions."""
    losses = nn.functional.binary_cross_entropy_with_logits(logits_TLHE.float(), true_TLHE, reduction="none").mean(-1)
    return (losses * is_valid_TLH).sum() / is_valid_TLH.sum().clamp(min=1)


def relative_weights(weights_TLK: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
    """Weights divided by their sum for each token and layer, so that models with and without renormalization are comparable."""
    weights = weights_TLK.astype(np.float32)
    return np.asarray(weights / np.maximum(weights.sum(-1, keepdims=True), 1e-6))


class PairEmbedding(nn.Module):
    """Embeds a route: the weighted sum of the embeddings of its K (layer, expert) pairs.

    Takes expert ids and weights `[T, L, K]`, returns `[T, L, D]`.
    """

    offset_L1: torch.Tensor

    def __init__(self, layers: int, experts: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(layers * experts, width) * 0.3)
        self.register_buffer("offset_L1", torch.arange(layers)[:, None] * experts, persistent=False)

    def forward(self, ids_TLK: torch.Tensor, weights_TLK: torch.Tensor) -> torch.Tensor:
        tokens, layers, top_k = ids_TLK.shape
        rows = (ids_TLK + self.offset_L1).view(-1, top_k)
        weights = weights_TLK.reshape(-1, top_k).to(self.table.dtype)
        return nn.functional.embedding_bag(rows, self.table, per_sample_weights=weights, mode="sum").view(tokens, layers, -1)


class RouterInputEmbedding(nn.Module):
    """Scales router inputs `[T, L, D]` by the statistics of the training tokens and projects them, with one matrix for all
    layers.
    """

    scale: torch.Tensor

    def __init__(self, layers: int, hidden: int, width: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(layers, hidden))
        self.rise = nn.Linear(hidden, width, bias=False)

    def forward(self, hidden_TLD: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.rise(hidden_TLD * self.scale)
        return states


class Block(nn.Module):
    """A residual branch: norm and an MLP with dropout whose hidden layer is `times` as wide as the state `[..., D]`.

    Returns the branch only; the caller adds it to the state.
    """

    def __init__(self, width: int, times: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.rise = nn.Linear(width, times * width)
        self.dropout = nn.Dropout(0.1)
        self.fall = nn.Linear(times * width, width)
        nn.init.normal_(self.fall.weight, std=0.3 / (times * width) ** 0.5)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = self.fall(self.dropout(nn.functional.gelu(self.rise(self.norm(state)))))
        return added.float()
