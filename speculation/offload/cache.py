"""A cache of experts for a program that holds them in real slots. It evicts exactly what the simulation evicts."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from profiler.errors import SpecmoeError, UsageError
from speculation.offload.eviction_policies import (
    begin_step,
    choose_victim,
    demote_oldest,
    note_load,
    note_use,
    set_scores,
    start_expert,
)
from speculation.offload.state import ABSENT, COMING, NEVER, ORDER, PRESENT, Rule, expert_records

NO_SCORES: npt.NDArray[np.float32] = np.zeros(0, dtype=np.float32)


class Placed(NamedTuple):
    """Where an expert was placed: its slot, and the expert that was evicted for it, if any."""

    slot: int
    evicted: int | None


class ExpertCache:
    """Which expert is in which slot. Every layer has its own slots, filled at first with the most popular experts.

    Experts are numbered `layer * E + expert`, slots from 0 over all layers. A program calls, in this order: `begin_step` for
    each step; for each layer `look_up`, `load` for every chosen expert that is missing, `note_use`, and `release` once the
    experts are computed; and any time between, `predict` and `load` for prefetches.

    Args:
        rule: Which expert is evicted; any but `Rule.BELADY`, which needs the future.
        capacities: Slots of each layer, L numbers.
        num_experts: E, the experts of a layer.
        popularity: Rank `[L * E]` of each expert, the most popular highest.
        time_constant: Steps over which `Rule.EWMA` and `Rule.LFU_AGED` forget.

    Attributes:
        slot_of_X: int64 `[L * E]`, the slot of each expert; -1 if it is not cached.
        request: The number of the last look-up, from 0; -1 before the first one.

    Raises:
        SpecmoeError: The policy needs the future, or the time constant is not positive.
    """

    def __init__(
        self,
        rule: Rule,
        capacities: Sequence[int],
        num_experts: int,
        popularity: npt.NDArray[np.int64],
        time_constant: float,
    ) -> None:
        if rule == Rule.BELADY:
            raise SpecmoeError("Belady's policy needs to know the future: it can be simulated, but not run")
        if not 0 < time_constant < inf:
            raise UsageError(f"time constant {time_constant}: expected more than 0 steps")
        layers = len(capacities)
        self.rule, self.capacities, self.num_experts = rule, [min(size, num_experts) for size in capacities], num_experts
        self._layers, self._time_constant = layers, time_constant
        self._experts = expert_records(np.full(layers * num_experts, NEVER, dtype=np.int64))
        self._first_slots = np.concatenate(([0], np.cumsum(self.capacities)))
        self._slots = [np.zeros(size, dtype=np.int64) for size in self.capacities]
        self._held = [0] * layers
        self.request, self._step, self._in_use = -1, -1, False
        self._scores_X = NO_SCORES
        self.slot_of_X = np.full(layers * num_experts, -1, dtype=np.int64)
        for layer, capacity in enumerate(self.capacities):
            ranks = popularity[layer * num_experts : (layer + 1) * num_experts]
            for rank, expert in enumerate(np.argsort(-ranks, kind="stable").tolist()):
                x = layer * num_experts + expert
                start_expert(self._experts[x], -1 - rank if rank < capacity else 0, popularity[x], int(rule))
                if rank < capacity:
                    self._put(layer, x, rank)
                    self._held[layer] += 1

    def begin_step(self, scores_X: npt.NDArray[np.float32] = NO_SCORES) -> None:
        """Begin a step of the model.

        Args:
            scores_X: The worth of every expert `[L * E]` from when its layer is next looked up, for `Rule.LEARNED`.
        """
        self._step += 1
        self._scores_X = scores_X
        begin_step(self._step, int(self.rule), self._time_constant, self._experts)

    def look_up(self, layer: int, chosen: Sequence[int]) -> list[bool]:
        """Whether each chosen expert of a layer is cached, or will be soon. Until `release`, none of them is evicted."""
        self.request += 1
        self._in_use = True
        if self.rule == Rule.LEARNED:
            set_scores(self._scores_X, layer * self.num_experts, self.num_experts, self._experts)
        numbers = [layer * self.num_experts + expert for expert in chosen]
        for x in numbers:
            self._experts[x]["chosen_by"] = self.request
            if self.slot_of_X[x] >= 0:
                self._experts[x]["where"] = PRESENT
        return [bool(self.slot_of_X[x] >= 0) for x in numbers]

    def predict(self, layer: int, expert: int, layers_ahead: int) -> None:
        """Note that an expert is predicted for the layer that many layers ahead: it is spared until then."""
        record = self._experts[layer * self.num_experts + expert]
        record["predicted_for"] = max(int(record["predicted_for"]), self.request + layers_ahead)

    def load(
        self, layer: int, expert: int, place: int, layers_ahead: int | None = None, score: float = 1.0, *, coming: bool = False
    ) -> Placed | None:
        """Give an expert that is not cached a slot.

        Args:
            layer: Its layer.
            expert: The expert.
            place: Its place among the chosen experts.
            layers_ahead: For a prefetch: how many layers ahead it is needed. None for a demand load.
            score: For a prefetch: the probability with which it is predicted. `Rule.LEARNED` evicts nothing that is worth more.
            coming: For a prefetch: whether its transfer takes time. Until `arrive`, it is not evicted.

        Returns:
            The slot; None if no expert can be evicted.
        """
        slots, held = self._slots[layer], self._held[layer]
        x, evicted = layer * self.num_experts + expert, None
        if held < self.capacities[layer]:
            slot = held
            self._held[layer] += 1
        else:
            is_prefetch, soon = layers_ahead is not None, self.request + 1
            # Between two requests, the next one has not chosen any expert yet, so that none is spared for being in use.
            request = self.request if self._in_use else soon
            slot = choose_victim(slots, held, int(self.rule), self._layers, request, soon, 0.0, is_prefetch, self._experts)
            if slot < 0 or (is_prefetch and self.rule == Rule.LEARNED and self._experts[slots[slot]]["key"] > score):
                return None
            evicted = int(slots[slot])
            self._experts[evicted]["where"] = ABSENT
            self.slot_of_X[evicted] = -1
        if layers_ahead is None:
            note_load(self._experts[x], self.request, (self.request + 1) * ORDER - 2 * place, int(self.rule))
        else:
            note_load(self._experts[x], -1, (self.request + layers_ahead) * ORDER + 1, int(self.rule))
        self._put(layer, x, slot)
        if coming:
            self._experts[x]["where"], self._experts[x]["arrival"] = COMING, inf
        return Placed(int(self.slot_of_X[x]), evicted)

    def arrive(self, layer: int, expert: int) -> None:
        """Note that an expert's transfer has ended, so that it can be evicted."""
        record = self._experts[layer * self.num_experts + expert]
        if record["where"] == COMING:
            record["where"] = PRESENT

    def note_use(self, layer: int, chosen: Sequence[int]) -> None:
        """Note that the chosen experts of a layer are used."""
        for place, expert in enumerate(chosen):
            record = self._experts[layer * self.num_experts + expert]
            order = (self.request + 1) * ORDER - 2 * place
            if note_use(record, self.request, self._step, order, int(self.rule), self._time_constant):
                demote_oldest(self._slots[layer], self._held[layer], self.capacities[layer], self._experts)

    def release(self) -> None:
        """Note that the experts of the last look-up are computed, so that they can be evicted."""
        self._in_use = False

    def _put(self, layer: int, x: int, slot: int) -> None:
        self._slots[layer][slot] = x
        self.slot_of_X[x] = self._first_slots[layer] + slot
        self._experts[x]["where"] = PRESENT
