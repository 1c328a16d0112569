"""The routes of training texts, which a predictor keeps to look up what was used after the same tokens there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from profiler.errors import SpecmoeError
from speculation.data.repeats import UNKNOWN_TOKEN
from speculation.data.routes import Routes, RouteSource, each_group, pack_routes
from speculation.data.tasks import Shape
from speculation.predictors.base import Arrays
from speculation.predictors.features import token_rows

PREFIX = "memory."
_STORED = {"keys": "M", "first": "M", "expert_ids": "MLK"}


@dataclass(frozen=True)
class TextMemory:
    """Routes of M tokens of texts.

    Attributes:
        keys_M: int64, the identity of each token.
        first_M: int64, the first token of each token's text.
        expert_ids_MLK: The routes.
        problem_ids_M: int32, the problem of each token; -1 if it is not known any more.
    """

    keys_M: npt.NDArray[np.int64]
    first_M: npt.NDArray[np.int64]
    expert_ids_MLK: npt.NDArray[Any]
    problem_ids_M: npt.NDArray[np.int32]

    @classmethod
    def of(cls, source: RouteSource, max_bytes: int) -> Self:
        """Whole texts in a random order, the same each time, as long as their routes take at most `max_bytes`."""
        kept: list[Routes] = []
        room = max_bytes
        for routes in each_group(source):
            texts, sizes = np.unique(routes.first_T, return_counts=True)
            order = np.random.default_rng(0).permutation(len(texts))
            per_token = routes.expert_ids_TLK[0].nbytes
            fits = np.cumsum(sizes[order]) * per_token <= room
            kept.append(routes.of_problems(np.isin(routes.first_T, texts[order[fits]])))
            room -= int(sizes[order[fits]].sum()) * per_token
        begins = np.cumsum([0, *(len(routes) for routes in kept)])
        return cls(
            np.concatenate([routes.token_keys_T for routes in kept]),
            np.concatenate([routes.first_T + begin for routes, begin in zip(kept, begins, strict=False)]),
            np.concatenate([routes.expert_ids_TLK for routes in kept]),
            np.concatenate([routes.problem_ids_T for routes in kept]),
        )

    @classmethod
    def typical(cls, source: RouteSource, keys: npt.NDArray[np.int64], shape: Shape) -> Self:
        """For each of these tokens the K experts that it uses most often at each layer, as a text of a single token.

        Args:
            source: The routes.
            keys: The tokens, ascending; tokens that do not occur are left out.
            shape: The sizes of the model.
        """
        counts_NLE = np.zeros((len(keys) + 1, shape.layers, shape.experts), dtype=np.int32)
        for routes in each_group(source):
            rows_T = token_rows(keys, routes.token_keys_T)
            np.add.at(
                counts_NLE,
                (rows_T[:, None, None], np.arange(shape.layers)[:, None], routes.expert_ids_TLK.astype(np.int64)),
                1,
            )
        occurs_N = counts_NLE[1:, 0].any(-1)
        ids_NLK = np.argsort(-counts_NLE[1:][occurs_N], axis=-1, kind="stable")[..., : shape.top_k]
        places = np.arange(int(occurs_N.sum()))
        dtype = np.uint8 if shape.experts <= 256 else np.uint16
        return cls(keys[occurs_N], places, ids_NLK.astype(dtype), np.full(len(places), -1, dtype=np.int32))

    @classmethod
    def empty(cls, shape: Shape) -> Self:
        """No texts."""
        nothing = np.zeros(0, dtype=np.int64)
        return cls(nothing, nothing, np.zeros((0, shape.layers, shape.top_k), dtype=np.uint8), nothing.astype(np.int32))

    def arrays(self) -> Arrays:
        """What `restore` needs. The problems' ids are not among it: they serve only to leave out a text's own routes."""
        return {f"{PREFIX}{name}": getattr(self, f"{name}_{axes}") for name, axes in _STORED.items()}

    @classmethod
    def restore(cls, arrays: Arrays, shape: Shape) -> Self:
        """The texts stored in `arrays`. Raises `SpecmoeError` if they do not suit a model of this shape."""
        keys, first, ids = (arrays.get(f"{PREFIX}{name}") for name in _STORED)
        if keys is None or first is None or ids is None or keys.ndim != 1 or first.shape != keys.shape:
            raise SpecmoeError("stored predictor: expected the memory's keys, first and expert_ids, as many of each")
        if keys.dtype != np.int64 or first.dtype != np.int64 or ids.dtype not in (np.uint8, np.uint16):
            raise SpecmoeError("stored predictor: memory: expected keys and first of int64, expert_ids of uint8 or uint16")
        if ids.shape != (len(keys), shape.layers, shape.top_k) or (len(ids) and ids.max() >= shape.experts):
            raise SpecmoeError(f"stored predictor: memory: expert_ids {ids.shape} do not fit a model of {shape}")
        places = np.arange(len(keys))
        if (first < 0).any() or (first > places).any() or (first[first] != first).any() or (np.diff(first) < 0).any():
            raise SpecmoeError("stored predictor: memory: first does not say where each token's text begins")
        return cls(keys, first, ids, np.full(len(keys), -1, dtype=np.int32))

    @cached_property
    def ends_M(self) -> npt.NDArray[np.int64]:
        """The end of each token's text."""
        firsts, counts = np.unique(self.first_M, return_counts=True)
        return np.repeat(firsts + counts, counts)

    @cached_property
    def by_key(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The keys of all known tokens in ascending order, and the token of each."""
        known = np.flatnonzero(self.keys_M != UNKNOWN_TOKEN)
        order = known[np.argsort(self.keys_M[known], kind="stable")]
        return self.keys_M[order], order

    def packed(self, experts: int) -> npt.NDArray[np.uint64]:
        """The routes as bits, as of `Routes.packed`."""
        if "_packed" not in vars(self):
            vars(self)["_packed"] = pack_routes(self.expert_ids_MLK, experts)
        found: npt.NDArray[np.uint64] = vars(self)["_packed"]
        return found
