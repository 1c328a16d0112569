"""What an offloading runtime tells a predictor, token by token and layer by layer, and what it gets back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.errors import SpecmoeError
from speculation.data.repeats import RUN_LENGTHS, UNKNOWN_TOKEN, Matches
from speculation.data.router_inputs import RouterInputs
from speculation.data.routes import Routes
from speculation.data.tasks import Shape

FIRST_CAPACITY = 256
# In place of an expert, where a predictor abstains.
NOBODY = -1


@dataclass(frozen=True)
class Prediction:
    """Experts, the likeliest first, and P(expert is among the K) of each: both `[H, E]`, or `[L, H, E]` of a whole token.

    Near the last layer there are fewer than H rows: those of layers that exist.
    """

    expert_ids: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]

    @classmethod
    def of(cls, probabilities: npt.NDArray[np.floating[Any]]) -> Prediction:
        """Sorted along the last axis; equal scores by expert id."""
        order = np.argsort(-probabilities, axis=-1, kind="stable")
        return cls(order, np.take_along_axis(probabilities, order, -1).astype(np.float32))


@dataclass
class History:
    """One sequence as far as it is known: `begin` a token, then `add` its routes in the order of the MoE layers.

    position: of the first token in the sequence, if what came before is not told. layer: place of the last layer known of
    the current token, -1 before the first. cache: what predictors carry on.
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
            "previous_T": np.arange(-1, FIRST_CAPACITY - 1, dtype=np.int64),
        }
        self._arrays["token_ids_T"] += self.position
        self._last_at: dict[tuple[int, ...], int] = {}
        self._routes: Routes | None = None
        self._hidden_TLD: npt.NDArray[np.float16] | None = None

    def begin(self, vocab_id: int | None, *, is_decode: bool = True) -> None:
        """The next token; vocab_id: None if unknown. Raises `SpecmoeError` if routes of the last one are missing."""
        if self.tokens and self.layer != self.shape.layers - 1:
            raise SpecmoeError(f"token {self.tokens - 1} has routes of {self.layer + 1} layers, expected {self.shape.layers}")
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
                self._last_at[run] = token
        self.tokens, self.layer, self._routes = token + 1, -1, None

    def add(
        self, expert_ids: npt.ArrayLike, weights: npt.ArrayLike | None = None, router_input: npt.ArrayLike | None = None
    ) -> None:
        """The K experts of the current token at the next MoE layer, and their weights, in any order; equal if not told.

        router_input: `[D]`, for predictors that need it: then of every token and layer.
        """
        ids = np.asarray(expert_ids)
        if self.tokens == 0 or self.layer == self.shape.layers - 1:
            raise SpecmoeError("no layer is expected: begin a token first")
        given = np.full(ids.shape, 1 / self.shape.top_k) if weights is None else np.asarray(weights)
        if ids.shape != (self.shape.top_k,) or given.shape != ids.shape or ids.min() < 0 or ids.max() >= self.shape.experts:
            raise SpecmoeError(f"experts {ids.tolist()}: expected {self.shape.top_k} from 0 to {self.shape.experts - 1}")
        if len(set(ids.tolist())) < len(ids) or not np.isfinite(given).all():
            raise SpecmoeError(f"experts {ids.tolist()}, weights {given.tolist()}: expected different ones, and finite weights")
        if router_input is not None:
            self._set_router_input(np.asarray(router_input, dtype=np.float16))
        elif self._hidden_TLD is not None:
            raise SpecmoeError("router input: expected one for every token and layer, as for those before")
        self.layer += 1
        order = np.argsort(-given, kind="stable")
        self._arrays["expert_ids_TLK"][self.tokens - 1, self.layer] = ids[order]
        self._arrays["weights_TLK"][self.tokens - 1, self.layer] = given[order]

    @property
    def routes(self) -> Routes:
        """All tokens (views); layers of the current one that are not known yet are zeros."""
        if self._routes is None:
            views = {name: array[: self.tokens] for name, array in self._arrays.items()}
            matches = Matches(views.pop("index_T"), views.pop("order_T"))
            previous_T = views.pop("previous_T")
            self._routes = Routes(**views, router=self._router())
            # As the cached properties would find them, in time that grows with the sequence.
            vars(self._routes).update(matches=matches, previous_T=previous_T)
        return self._routes

    def _set_router_input(self, given: npt.NDArray[np.float16]) -> None:
        """Of the layer that is added next."""
        expected = given.shape[:1] if self._hidden_TLD is None else self._hidden_TLD.shape[2:]
        if given.ndim != 1 or given.shape != expected:
            raise SpecmoeError(f"router input of shape {given.shape}, expected {expected}")
        if self._hidden_TLD is None or len(self._hidden_TLD) < self.tokens:
            # With as many tokens as the other arrays have room for.
            grown = np.zeros((len(self._arrays["first_T"]), self.shape.layers, len(given)), dtype=np.float16)
            if self._hidden_TLD is not None:
                grown[: len(self._hidden_TLD)] = self._hidden_TLD
            self._hidden_TLD, self._routes = grown, None
        self._hidden_TLD[self.tokens - 1, self.layer + 1] = given

    def _router(self) -> RouterInputs | None:
        """Without the routers' weights: predictors have them."""
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
