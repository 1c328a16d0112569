"""Earlier places of the same token, in its own text and in training texts, and how much they agree with what is known now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from speculation.data.routes import Routes
from speculation.predictors.neural.places.text_memory import TextMemory

# The number of places that are compared in each of the two: the latest ones of the text, and a spread over all training texts.
SCANNED = 1024
# Tokens before the place that are compared.
LONGEST_RUN = 8
# What is known of a place, in this order: how many of the tokens before it are the same, on a logarithmic scale from 0 to
# about 1; the share of experts that its last known token, and the token before that one, have in common with those here;
# whether it is in the text itself; how recent it is there, from 1 to 0.
FACTS = 5
# What a place is worth for the choice among them: the best of a few weights tried on gpt-oss-20b. The network has its own.
_RUN, _OWN, _COMMON, _COMMON_BEFORE = 1.5, 1.0, 9.6, 5.8


@dataclass(frozen=True)
class Places:
    """For each of T tokens up to P earlier places of the same token, the most similar one first.

    Attributes:
        index_TP: int64, the token at the place: its index in the routes of the text if `is_own_TP`, else in the memory. -1 if
            there is none.
        is_own_TP: Whether the place is in the token's own text.
        facts_TPF: float32, see FACTS.
    """

    index_TP: npt.NDArray[np.int64]
    is_own_TP: npt.NDArray[np.bool_]
    facts_TPF: npt.NDArray[np.float32]


@dataclass(frozen=True)
class RoutesAtPlaces:
    """What was selected at places.

    Attributes:
        ids_TPSLK: int64, the experts at the place (S = 1) or at the S tokens after it.
        exists_TPS: Whether there is such a token, and its routes are known.
        common_TPL: float32, for each layer, the share of the K experts that the place's last known token has in common with the
            last known token here.
    """

    ids_TPSLK: npt.NDArray[np.int64]
    exists_TPS: npt.NDArray[np.bool_]
    common_TPL: npt.NDArray[np.float32]


def find_places(
    routes: Routes,
    memory: TextMemory,
    tokens_T: npt.NDArray[np.int64],
    experts: int,
    places: int,
    known_back: int,
    without_T: npt.NDArray[np.int32] | None = None,
) -> Places:
    """Find the places of the same token that are the most similar to each of these tokens.

    Places are similar if the same tokens come before them, and if the last two known tokens selected the same experts.

    Args:
        routes: The text. Only routes of known tokens are read.
        memory: The training texts.
        tokens_T: The tokens.
        experts: E, the number of experts of a layer.
        places: P, the number of places to find.
        known_back: How many tokens before each token the last one with known routes is: 0 or 1.
        without_T: For each token, a problem of the memory in which nothing is looked for.
    """
    keys, order = memory.by_key
    found = Places(
        np.full((len(tokens_T), places), -1, dtype=np.int64),
        np.zeros((len(tokens_T), places), dtype=np.bool_),
        np.zeros((len(tokens_T), places, FACTS), dtype=np.float32),
    )
    now_T = routes.token_keys_T[tokens_T]
    _find(
        tokens_T,
        known_back,
        1 / (routes.expert_ids_TLK.shape[1] * routes.expert_ids_TLK.shape[2]),
        routes.token_keys_T,
        routes.first_T,
        routes.matches.by_length_TR[:, 0],
        routes.packed(experts),
        memory.keys_M,
        memory.first_M,
        memory.problem_ids_M,
        memory.packed(experts),
        order,
        np.searchsorted(keys, now_T, "left"),
        np.searchsorted(keys, now_T, "right"),
        np.full(len(tokens_T), -2, dtype=np.int32) if without_T is None else without_T,
        found.index_TP,
        found.is_own_TP,
        found.facts_TPF,
    )
    return found


def routes_at(
    places: Places, routes: Routes, memory: TextMemory, tokens_T: npt.NDArray[np.int64], known_back: int, ahead: range
) -> RoutesAtPlaces:
    """The routes at places that `find_places` found.

    Args:
        places: The places.
        routes: The text.
        memory: The training texts.
        tokens_T: The tokens that the places were found for.
        known_back: As for `find_places`.
        ahead: The S tokens of each place, counted from it: 0 for the place itself, 1 for the token after it.
    """
    layers, top_k = routes.expert_ids_TLK.shape[1:]
    sizes = places.index_TP.shape
    found = RoutesAtPlaces(
        np.zeros((*sizes, len(ahead), layers, top_k), dtype=np.int64),
        np.zeros((*sizes, len(ahead)), dtype=np.bool_),
        np.zeros((*sizes, layers), dtype=np.float32),
    )
    _look_up(
        places.index_TP,
        places.is_own_TP,
        tokens_T,
        known_back,
        ahead.start,
        routes.expert_ids_TLK,
        routes.first_T,
        memory.expert_ids_MLK,
        memory.first_M,
        memory.ends_M,
        found.ids_TPSLK,
        found.exists_TPS,
        found.common_TPL,
    )
    return found


def common_now(routes: Routes, tokens_T: npt.NDArray[np.int64], ids_TPLK: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """For each layer, the share of the K experts that places have in common with these tokens, float32 `[T, P, L]`."""
    found_TPL = np.zeros(ids_TPLK.shape[:3], dtype=np.float32)
    _compare(routes.expert_ids_TLK, tokens_T, ids_TPLK, found_TPL)
    return found_TPL


@numba.njit(nogil=True, inline="always")
def _ones(bits: np.uint64) -> np.uint64:
    """The number of ones."""
    bits = bits - ((bits >> np.uint64(1)) & np.uint64(0x5555555555555555))
    bits = (bits & np.uint64(0x3333333333333333)) + ((bits >> np.uint64(2)) & np.uint64(0x3333333333333333))
    bits = (bits + (bits >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (bits * np.uint64(0x0101010101010101)) >> np.uint64(56)


@numba.njit(cache=True, nogil=True)
def _common(one: npt.NDArray[np.uint64], other: npt.NDArray[np.uint64]) -> int:
    total = np.uint64(0)
    for w in range(len(one)):
        total += _ones(one[w] & other[w])
    return int(total)


@numba.njit(cache=True, nogil=True)
def _find(
    tokens_T: npt.NDArray[np.int64],
    known_back: int,
    per_expert: float,
    keys: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
    same_before: npt.NDArray[np.int64],
    packed: npt.NDArray[np.uint64],
    memory_keys: npt.NDArray[np.int64],
    memory_first: npt.NDArray[np.int64],
    memory_problems: npt.NDArray[np.int32],
    memory_packed: npt.NDArray[np.uint64],
    order: npt.NDArray[np.int64],
    begin_T: npt.NDArray[np.int64],
    end_T: npt.NDArray[np.int64],
    without_T: npt.NDArray[np.int32],
    index: npt.NDArray[np.int64],
    is_own: npt.NDArray[np.bool_],
    facts: npt.NDArray[np.float32],
) -> None:
    places = index.shape[1]
    worth = np.zeros(places)
    fact = np.zeros(FACTS, dtype=np.float32)
    for n in range(len(tokens_T)):
        token = tokens_T[n]
        if keys[token] < 0:
            continue
        known = token - known_back
        count, scanned = 0, 0
        own = same_before[token]
        in_memory = min(SCANNED, end_T[n] - begin_T[n])
        at = 0
        while True:
            # First the text itself, from the latest place on; then places spread evenly over the memory.
            if own >= 0 and scanned < SCANNED:
                place, place_is_own = own, True
                own = same_before[own]
                scanned += 1
                place_keys, place_first, place_packed = keys, first[place], packed
            elif at < in_memory:
                place, place_is_own = order[begin_T[n] + at * (end_T[n] - begin_T[n]) // in_memory], False
                at += 1
                if memory_problems[place] == without_T[n]:
                    continue
                place_keys, place_first, place_packed = memory_keys, memory_first[place], memory_packed
            else:
                break
            run = 0
            while (
                run < LONGEST_RUN
                and token - run > first[token]
                and place - run > place_first
                and keys[token - run - 1] == place_keys[place - run - 1]
                and keys[token - run - 1] >= 0
            ):
                run += 1
            place_known = place - known_back
            common, common_before = 0.0, 0.0
            if known >= first[token] and place_known >= place_first:
                common = per_expert * _common(packed[known], place_packed[place_known])
                if known > first[token] and place_known > place_first:
                    common_before = per_expert * _common(packed[known - 1], place_packed[place_known - 1])
            same = np.log2(1.0 + run) / 3
            value = _RUN * same + _OWN * place_is_own + _COMMON * common + _COMMON_BEFORE * common_before
            if count == places and value <= worth[-1]:
                continue
            fact[0], fact[1], fact[2] = same, common, common_before
            fact[3], fact[4] = place_is_own, 0
            if place_is_own:
                fact[4] = 1 / (1 + np.log2(token - place))
            # Insert it behind those that are worth as much.
            count = min(count + 1, places)
            slot = count - 1
            while slot > 0 and worth[slot - 1] < value:
                worth[slot], index[n, slot], is_own[n, slot] = worth[slot - 1], index[n, slot - 1], is_own[n, slot - 1]
                facts[n, slot] = facts[n, slot - 1]
                slot -= 1
            worth[slot], index[n, slot], is_own[n, slot] = value, place, place_is_own
            facts[n, slot] = fact


@numba.njit(cache=True, nogil=True)
def _look_up(
    index: npt.NDArray[np.int64],
    is_own: npt.NDArray[np.bool_],
    tokens_T: npt.NDArray[np.int64],
    known_back: int,
    ahead: int,
    routes: npt.NDArray[Any],
    first: npt.NDArray[np.int64],
    memory: npt.NDArray[Any],
    memory_first: npt.NDArray[np.int64],
    memory_ends: npt.NDArray[np.int64],
    ids: npt.NDArray[np.int64],
    exists: npt.NDArray[np.bool_],
    common: npt.NDArray[np.float32],
) -> None:
    steps, layers, top_k = ids.shape[2:]
    for n in range(len(index)):
        known = tokens_T[n] - known_back
        for p in range(index.shape[1]):
            place = index[n, p]
            if place < 0:
                continue
            own = is_own[n, p]
            start = first[place] if own else memory_first[place]
            end = known + 1 if own else memory_ends[place]
            for s in range(steps):
                at = place + ahead + s
                exists[n, p, s] = at < end
                if at < end:
                    for layer in range(layers):
                        for k in range(top_k):
                            ids[n, p, s, layer, k] = routes[at, layer, k] if own else memory[at, layer, k]
            at = place - known_back
            if known >= first[tokens_T[n]] and at >= start:
                for layer in range(layers):
                    same = 0
                    for k in range(top_k):
                        expert = routes[known, layer, k]
                        for j in range(top_k):
                            same += expert == (routes[at, layer, j] if own else memory[at, layer, j])
                    common[n, p, layer] = same / top_k


@numba.njit(cache=True, nogil=True)
def _compare(
    routes: npt.NDArray[Any], tokens_T: npt.NDArray[np.int64], ids: npt.NDArray[np.int64], common: npt.NDArray[np.float32]
) -> None:
    places, layers, top_k = ids.shape[1:]
    for n in range(len(tokens_T)):
        for p in range(places):
            for layer in range(layers):
                same = 0
                for k in range(top_k):
                    expert = routes[tokens_T[n], layer, k]
                    for j in range(top_k):
                        same += expert == ids[n, p, layer, j]
                common[n, p, layer] = same / top_k
