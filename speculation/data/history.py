"""The interface between an offloading runtime and a predictor: a `History` goes in, a `Prediction` comes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.errors import SpecmoeError, counted
from speculation.data.ranking import rank_rows
from speculation.data.repeats import RUN_LENGTHS, UNKNOWN_TOKEN, Matches
from speculation.data.router_inputs import RouterInputs
from speculation.data.routes import Routes, pack_routes
from speculation.data.tasks import Shape

FIRST_CAPACITY = 256
# The expert id in a `Prediction` where the predictor abstains.
ABSTAIN = -1


@dataclass(frozen=True)
class Prediction:
    """A ranking of the experts, most probable first, with a probability for each.

    For `next-layer`, row h - 1 of the first axis is about the layer h ahead. Near the last layer there are fewer than H rows:
    only layers that exist have one. For `next-token` and `whole-path`, a prediction covers every layer.

    Args:
        expert_ids: int64 `[H, E]` (`next-layer`) or `[L, H, E]` (other tasks). Expert ids in descending order of score, or -1
            everywhere in a row where the predictor abstains.
        scores: float32, same shape. The predicted probability, 0 to 1, that the expert is among the K selected ones; 0
            where the predictor abstains.

    Example:
        >>> import numpy as np
        >>> prediction = Prediction.of(np.array([[0.25, 0.75, 0.5]]))
        >>> prediction.expert_ids.tolist(), prediction.scores.tolist()
        ([[1, 2, 0]], [[0.75, 0.5, 0.25]])
    """

    expert_ids: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]

    @classmethod
    def of(cls, probabilities: npt.NDArray[np.floating[Any]]) -> Prediction:
        """Rank experts by probability, ties by expert id.

        Args:
            probabilities: `[..., E]`, the probability of each expert.
        """
        ids = np.empty(probabilities.shape, dtype=np.int64)
        scores = np.empty(probabilities.shape, dtype=np.float32)
        experts = probabilities.shape[-1]
        rank_rows(probabilities.reshape(-1, experts), ids.reshape(-1, experts), scores.reshape(-1, experts))
        return cls(ids, scores)


@dataclass
class History:
    """The tokens and routes of one sequence that are known so far.

    A runtime calls `begin` for each token, and `add` for each MoE layer of that token, in the order of the layers. After any
    of these calls, `Predictor.predict` predicts from the history, if the predictor's task allows a prediction there.

    Args:
        shape: The shape of the predictors that will use this history (`predictor.shape`).
        position: The position of the first token in the sequence, from 0. Set it if the history starts in the middle of a
            sequence.
        tokens: The number of tokens begun. Updated by `begin`.
        layer: The index, among the MoE layers, of the last layer added for the current token; -1 before its first layer.
            Updated by `add`.
        cache: State that predictors keep between calls, by predictor name.

    Example:
        >>> history = History(Shape(layers=2, experts=4, top_k=2, horizon=1))
        >>> history.begin(vocab_id=17)
        >>> history.add(expert_ids=[3, 1], weights=[0.25, 0.75])
        >>> history.tokens, history.layer
        (1, 0)
        >>> history.routes.expert_ids_TLK[0, 0].tolist()  # sorted by weight
        [1, 3]
    """

    shape: Shape
    position: int = 0
    tokens: int = 0
    layer: int = -1
    cache: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        dtype = np.uint8 if self.shape.experts <= 256 else np.uint16
        sizes = (FIRST_CAPACITY, self.shape.layers, self.shape.top_k)
        self._arrays: dict[str, npt.NDArray[Any]] = {
            "expert_ids_TLK": np.zeros(sizes, dtype=dtype),
            "weights_TLK": np.zeros(sizes, dtype=np.float16),
            "problem_ids_T": np.zeros(FIRST_CAPACITY, dtype=np.int32),
            "token_ids_T": np.arange(FIRST_CAPACITY, dtype=np.int32),
            "token_keys_T": np.full(FIRST_CAPACITY, UNKNOWN_TOKEN, dtype=np.int64),
            "is_decode_T": np.zeros(FIRST_CAPACITY, dtype=np.bool_),
            "first_T": np.zeros(FIRST_CAPACITY, dtype=np.int64),
            "index_T": np.full(FIRST_CAPACITY, -1, dtype=np.int64),
            "order_T": np.zeros(FIRST_CAPACITY, dtype=np.int64),
            "by_length_TR": np.full((FIRST_CAPACITY, len(RUN_LENGTHS)), -1, dtype=np.int64),
            "previous_T": np.arange(-1, FIRST_CAPACITY - 1, dtype=np.int64),
        }
        self._arrays["token_ids_T"] += self.position
        self._last_at: dict[tuple[int, ...], int] = {}
        self._routes: Routes | None = None
        self._packed = _PackedRoutes(self.shape)
        self._hidden_TLD: npt.NDArray[np.float16] | None = None

    def begin(self, vocab_id: int | None, *, is_decode: bool = True) -> None:
        """Start the next token.

        Args:
            vocab_id: The token's vocabulary id, or None if it is unknown.
            is_decode: Whether the token was generated (decode) rather than part of the prompt (prefill).

        Raises:
            SpecmoeError: Routes of the previous token are missing at some layer.
        """
        if self.tokens and self.layer != self.shape.layers - 1:
            raise SpecmoeError(
                f"token {self.tokens - 1} has routes of {counted(self.layer + 1, 'layer')}, expected {self.shape.layers}"
            )
        token = self.tokens
        if token == len(self._arrays["first_T"]):
            self._grow()
        self._arrays["token_keys_T"][token] = UNKNOWN_TOKEN if vocab_id is None else vocab_id
        self._arrays["is_decode_T"][token] = is_decode
        keys = self._arrays["token_keys_T"][max(0, token + 1 - RUN_LENGTHS[-1]) : token + 1].tolist()
        for number, length in enumerate(RUN_LENGTHS, start=1):
            run = tuple(keys[-length:])
            if len(run) == length and UNKNOWN_TOKEN not in run:
                if run in self._last_at:
                    self._arrays["index_T"][token] = self._last_at[run]
                    self._arrays["order_T"][token] = number
                    self._arrays["by_length_TR"][token, number - 1] = self._last_at[run]
                self._last_at[run] = token
        self.tokens, self.layer, self._routes = token + 1, -1, None
        self._packed.tokens, self._packed.layer = self.tokens, self.layer

    def add(
        self, expert_ids: npt.ArrayLike, weights: npt.ArrayLike | None = None, router_input: npt.ArrayLike | None = None
    ) -> None:
        """Add the experts that the current token selected at the next MoE layer.

        Args:
            expert_ids: `[K]`, in any order.
            weights: `[K]`, the routing weights in the same order; 1 / K each if None.
            router_input: `[D]`, the router's input at this layer, for predictors that need it. If it is given once, it must be
                given for every token and layer.

        Raises:
            SpecmoeError: No layer is expected here, or a shape or value is invalid. The history is unchanged.
        """
        ids = np.asarray(expert_ids)
        if self.tokens == 0 or self.layer == self.shape.layers - 1:
            raise SpecmoeError("no MoE layer is expected here: begin a token first")
        given = np.full(ids.shape, 1 / self.shape.top_k) if weights is None else np.asarray(weights)
        if ids.shape != (self.shape.top_k,) or given.shape != ids.shape or ids.min() < 0 or ids.max() >= self.shape.experts:
            raise SpecmoeError(f"experts {ids.tolist()}: expected {self.shape.top_k} from 0 to {self.shape.experts - 1}")
        if len(set(ids.tolist())) < len(ids) or not np.isfinite(given).all():
            raise SpecmoeError(f"experts {ids.tolist()}, weights {given.tolist()}: expected distinct experts, finite weights")
        if router_input is not None:
            self._set_router_input(np.asarray(router_input, dtype=np.float16))
        elif self._hidden_TLD is not None:
            raise SpecmoeError("router input is missing: expected one for every token and layer, as given so far")
        self.layer = self._packed.layer = self.layer + 1
        order = np.argsort(-given, kind="stable")
        self._arrays["expert_ids_TLK"][self.tokens - 1, self.layer] = ids[order]
        self._arrays["weights_TLK"][self.tokens - 1, self.layer] = given[order]

    @property
    def routes(self) -> Routes:
        """The routes of all tokens so far, as views of the history's arrays.

        Layers of the current token that have not been added yet hold zeros.
        """
        if self._routes is None:
            views = {name: array[: self.tokens] for name, array in self._arrays.items()}
            matches = Matches(views.pop("index_T"), views.pop("order_T"), views.pop("by_length_TR"))
            previous_T = views.pop("previous_T")
            self._routes = Routes(**views, router=self._router())
            # They would compute the same by themselves, but in time proportional to the length of the sequence.
            vars(self._routes).update(matches=matches, previous_T=previous_T)
            vars(self._routes).update(_packed=self._packed, _packed_for=self.shape.experts)
        return self._routes

    def _set_router_input(self, given: npt.NDArray[np.float16]) -> None:
        """Store the router input of the layer that is added next."""
        expected = given.shape[:1] if self._hidden_TLD is None else self._hidden_TLD.shape[2:]
        if given.ndim != 1 or given.shape != expected:
            raise SpecmoeError(f"router input of shape {given.shape}, expected {expected}")
        if self._hidden_TLD is None or len(self._hidden_TLD) < self.tokens:
            # The same capacity as the other arrays, so that all grow together.
            grown = np.zeros((len(self._arrays["first_T"]), self.shape.layers, len(given)), dtype=np.float16)
            if self._hidden_TLD is not None:
                grown[: len(self._hidden_TLD)] = self._hidden_TLD
            self._hidden_TLD, self._routes = grown, None
        self._hidden_TLD[self.tokens - 1, self.layer + 1] = given

    def _router(self) -> RouterInputs | None:
        """The router inputs, without the routers' weights: predictors store the weights that they need."""
        if self._hidden_TLD is None or len(self._hidden_TLD) < self.tokens:
            return None
        nothing = np.zeros((self.shape.layers, self.shape.experts), dtype=np.float32)
        return RouterInputs(self._hidden_TLD[: self.tokens], np.zeros((self.shape.layers, 0, 0), np.float32), nothing, None)

    def _grow(self) -> None:
        count = len(self._arrays["first_T"])
        fresh = History(self.shape)._arrays
        for name, array in self._arrays.items():
            grown = np.resize(fresh[name], (2 * count, *array.shape[1:]))
            grown[:count] = array
            self._arrays[name] = grown
        self._arrays["token_ids_T"][:] = np.arange(self.position, self.position + 2 * count)
        self._arrays["previous_T"][:] = np.arange(-1, 2 * count - 1)


class _PackedRoutes:
    """The routes of a history as bits (see `pack_routes`). What was added is packed when a predictor needs it: most do not.

    It does not refer to the history, whose memory would then be freed late.

    tokens, layer: as of the history.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.tokens, self.layer = 0, -1
        self._complete = 0
        self._packed_TW = np.zeros((0, -(-shape.layers * shape.experts // 64)), dtype=np.uint64)

    def __call__(self, expert_ids_TLK: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
        """The bits `[T, W]` of the first T tokens of the history, whose experts these are. Unknown layers have none."""
        count, shape = len(expert_ids_TLK), self.shape
        if count > len(self._packed_TW):
            grown_TW = np.zeros((max(count, 2 * len(self._packed_TW)), self._packed_TW.shape[1]), dtype=np.uint64)
            grown_TW[: len(self._packed_TW)] = self._packed_TW
            self._packed_TW = grown_TW
        complete = min(count, self.tokens if self.layer == shape.layers - 1 else max(0, self.tokens - 1))
        if complete > self._complete:
            self._packed_TW[self._complete : complete] = pack_routes(expert_ids_TLK[self._complete : complete], shape.experts)
            self._complete = complete
        if complete < count:
            # The current token is packed again each time, because layers may have been added.
            known_TW = pack_routes(expert_ids_TLK[complete:, : self.layer + 1], shape.experts)
            self._packed_TW[complete, : known_TW.shape[1]] = known_TW
        return self._packed_TW[:count]
