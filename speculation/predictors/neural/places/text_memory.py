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
        """Whole texts whose routes take at most `max_bytes`.

        Texts are taken in a random order, the same each time, from each group of the source in proportion to its size. A text
        that does not fit is left out, and so are texts without any known token, in which nothing could be found.
        """
        kept: list[Routes] = []
        for routes in each_group(source):
            room = max_bytes * len(routes) // (len(source) * routes.expert_ids_TLK[0].nbytes)
            texts, text_T, sizes = np.unique(routes.first_T, return_inverse=True, return_counts=True)
            known = np.bincount(text_T, routes.token_keys_T != UNKNOWN_TOKEN, len(texts))
            is_kept = np.zeros(len(texts), dtype=np.bool_)
            for text in np.random.default_rng(0).permutation(len(texts)).tolist():
                if known[text] and sizes[text] <= room:
                    is_kept[text] = True
                    room -= int(sizes[text])
            kept.append(routes.of_problems(is_kept[text_T]))
        begins = np.cumsum([0, *(len(routes) for routes in kept)])
        return cls(
            np.concatenate([routes.token_keys_T for routes in kept]),
            np.concatenate([routes.first_T + begin for routes, begin in zip(kept, begins, strict=False)]),
            np.concatenate([routes.expert_ids_TLK for routes in kept]),
            np.concatenate([routes.problem_ids_T for routes in kept]),
        )

    @classmethod
    def typical(cls, source: RouteSource, keys: npt.NDArray[np.int64], shape: Shape, parts: int = 1) -> Self:
        """For each of these tokens the K experts that it uses most often at each layer, as a text of a single token.

        Args:
            source: The routes.
            keys: The tokens, ascending; tokens that do not occur are left out.
            shape: The sizes of the model.
            parts: From how many parts of the problems. With 2, a token has one typical route from the problems with even ids
                and one from those with odd ids, and `problem_ids_M` is 0 or 1: so a problem can be kept from its own routes.
        """
        counts_PNLE = np.zeros((parts, len(keys) + 1, shape.layers, shape.experts), dtype=np.int32)
        for routes in each_group(source):
            rows_T = token_rows(keys, routes.token_keys_T)
            at = (routes.problem_ids_T % parts, rows_T)
            at_TLK = tuple(index_T[:, None, None] for index_T in at)
            np.add.at(counts_PNLE, (*at_TLK, np.arange(shape.layers)[:, None], routes.expert_ids_TLK.astype(np.int64)), 1)
        part_M, row_M = np.nonzero(counts_PNLE[:, 1:, 0].any(-1))
        ids_MLK = np.argsort(-counts_PNLE[part_M, row_M + 1], axis=-1, kind="stable")[..., : shape.top_k]
        dtype = np.uint8 if shape.experts <= 256 else np.uint16
        return cls(keys[row_M], np.arange(len(row_M)), ids_MLK.astype(dtype), part_M.astype(np.int32))

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
        if vars(self).get("_packed_for") != experts:
            vars(self).update(_packed=pack_routes(self.expert_ids_MLK, experts), _packed_for=experts)
        found: npt.NDArray[np.uint64] = vars(self)["_packed"]
        return found
