"""MoE layers whose experts are in a cache: look up, load what is missing, prefetch, compute."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from profiler.errors import SpecmoeError
from profiler.trace.rows import sort_pairs
from speculation.data.tasks import Shape
from speculation.offload.cache import NO_SCORES, ExpertCache
from speculation.predictors.base import Predictor
from speculation.runtime.foresight import Foreseen, Foresight, ForesightThread, Prefetcher, RoutedLayer
from speculation.runtime.forward import weighted_sum
from speculation.runtime.slots import BUFFERS, Slots
from speculation.runtime.steps import ForwardPass
from speculation.runtime.storage.expert_stores import HostStore
from speculation.runtime.storage.layout import Weights
from speculation.runtime.transfers import Transfer, TransferCounts, Transfers

# Predictions that take a larger share of the time, after so many tokens without the first ones, get a thread of their own.
MAX_FORESIGHT, PACE_TOKENS, WARM_UP_TOKENS = 0.1, 20, 4


@dataclass
class PhaseCounts:
    """Events of prompts (prefill) or of generated tokens (decode).

    Attributes:
        tokens: Tokens that were computed.
        requested: Experts that layers needed, each once per layer and step.
        hits: Those that were in the cache.
        late: Those whose prefetch was in transfer.
        misses: Those that were not: demand-loaded, or computed on the host.
        host: Those that were computed on the host.
        streamed: Those for which the cache had no room.
        bytes: Bytes that were copied to the device while these tokens were computed.
        transfers: Transfers of experts that ended while these tokens were computed.
        transfer_seconds: The time that these transfers took.
        seconds: Time from the first layer to the last, over all steps.
        stall: Part of `seconds` during which this thread waited for an expert.
        compute: Part of `seconds` during which experts were computed. On a GPU only the time to start their kernels.
        foresight: Part of `seconds` during which predictions were made, on the thread that computes.
    """

    tokens: int = 0
    requested: int = 0
    hits: int = 0
    late: int = 0
    misses: int = 0
    host: int = 0
    streamed: int = 0
    bytes: int = 0
    transfers: int = 0
    transfer_seconds: float = 0.0
    seconds: float = 0.0
    stall: float = 0.0
    compute: float = 0.0
    foresight: float = 0.0


# Called at the end of each step with the experts `[N, L, K]` and weights of its real tokens, in the order of `is_real_BT`.
OnRouted = Callable[[ForwardPass, npt.NDArray[np.int64], npt.NDArray[np.float32]], None]


class OffloadedExperts:
    """All MoE layers of a running model.

    Args:
        transfers: The cache, and the thread that fills it.
        slots: The memory of the cache.
        shape: The sizes of the model.
        prefetcher: What to prefetch; None for nothing.
        reuse: The predictor of the policy `Rule.LEARNED`; else None.
        host: The store in host memory whose experts are computed there when the cache lacks them; None if they are copied.

    Attributes:
        on_routed: Gets the routing of each step; None if nothing needs it.
        prefill, decode: What happened so far.
        hits_R: Set it to a list to get the hits of every request, one for each layer of each step.
        notes: What a user should know of how it ran, a line each.
    """

    def __init__(
        self,
        transfers: Transfers,
        slots: Slots,
        shape: Shape,
        prefetcher: Prefetcher | None = None,
        reuse: Predictor | None = None,
        host: HostStore | None = None,
    ) -> None:
        self.transfers, self.slots, self._host = transfers, slots, host
        self.on_routed: OnRouted | None = None
        self.prefill, self.decode = PhaseCounts(), PhaseCounts()
        self.hits_R: list[int] | None = None
        self.notes: list[str] = []
        self._foresight: Foresight | ForesightThread = Foresight(
            shape, prefetcher, reuse, on_foreseen=self.prefetch, on_scores=self.use_scores
        )
        self._step: ForwardPass | None = None
        self._rows: list[int] = []
        self._computed_N: torch.Tensor | None = None
        self._layers, self._sequences = shape.layers, 0
        self._routed: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]] = []
        self._scores_X = NO_SCORES
        self._began, self._counts_before = 0.0, TransferCounts()
        self._warm_up = (0.0, 0.0)

    @property
    def cache(self) -> ExpertCache:
        """The cache."""
        return self.transfers.cache

    def begin_step(self, step: ForwardPass) -> None:
        """Begin a forward pass.

        Raises:
            EngineError: An earlier transfer failed.
        """
        self._step, self._rows, self._routed = step, step.rows, []
        is_computed_N = step.is_computed_BT.reshape(-1)
        self._computed_N = (
            None if is_computed_N.all() else torch.from_numpy(np.flatnonzero(is_computed_N)).to(self.slots.device)
        )
        self._began = time.perf_counter()
        self._counts_before = replace(self.transfers.counts)
        rows, firsts = self._rows, [int(step.token_ids_BT[row][step.is_real_BT[row]][0]) for row in self._rows]
        request, sequences = self.cache.request, len(step.token_ids_BT)
        if step.is_new or sequences != self._sequences:
            # Sequences that continue from elsewhere are followed from here.
            self._sequences = sequences
            self._foresee(lambda foresight: foresight.start(sequences))
        if step.is_decode:
            self._foresee(lambda foresight: foresight.begin_decode(request, rows, firsts))
        else:
            self._foresee(lambda foresight: foresight.begin_prefill(rows, firsts))
        with self.transfers.lock:
            self.transfers.check()
            self.cache.begin_step(self._scores_X)

    def end_step(self) -> None:
        """End a forward pass. One that failed in the middle counts for nothing."""
        step, self._step = self._step, None
        if step is None or len(self._routed) < self._layers:
            return
        phase = self.decode if step.is_decode else self.prefill
        computed_N = step.is_real_BT.reshape(-1)[step.is_computed_BT.reshape(-1)]
        expert_ids_NLK = np.stack([ids for ids, _ in self._routed], axis=1)[computed_N]
        weights_NLK = np.stack([weights for _, weights in self._routed], axis=1)[computed_N]
        if not step.is_decode:
            self._foresee(lambda foresight: _end_prefill(foresight, step, expert_ids_NLK, weights_NLK), phase)
        phase.seconds += time.perf_counter() - self._began
        phase.tokens += int(step.is_real_BT.sum())
        before, now = self._counts_before, self.transfers.counts
        phase.bytes += now.bytes - before.bytes
        phase.transfers += now.transfers - before.transfers
        phase.transfer_seconds += now.seconds - before.seconds
        self._check_pace()
        if self.on_routed is not None:
            self.on_routed(step, expert_ids_NLK, weights_NLK)

    def use_scores(self, scores_X: npt.NDArray[np.float32]) -> None:
        """Use these scores of all experts from the next step on."""
        self._scores_X = scores_X

    def prefetch(self, foreseen: Sequence[Foreseen], request: int) -> None:
        """Queue experts that were predicted after a request."""
        if not foreseen:
            return
        with self.transfers.lock:
            for each in foreseen:
                self.transfers.prefetch(each.layer, each.expert, request + each.layers_ahead, each.score)

    def forward(
        self, layer: int, experts: Any, hidden_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """The output of a layer's experts, `[T, D]`; zeros for sequences that have finished.

        Args:
            layer: The index of the MoE layer.
            experts: The module.
            hidden_TD: Its input.
            expert_ids_TK: The experts of each token.
            weights_TK: Their routing weights.

        Raises:
            EngineError: An expert cannot be read.
        """
        if self._step is None:
            raise SpecmoeError("this model's experts are offloaded: call the whole model, not a part of it")
        if self._computed_N is None:
            return self._compute(layer, experts, hidden_TD, expert_ids_TK, weights_TK)
        some_N = self._computed_N
        out_TD = torch.zeros_like(hidden_TD)
        if len(some_N):
            out_TD[some_N] = self._compute(layer, experts, hidden_TD[some_N], expert_ids_TK[some_N], weights_TK[some_N])
        return out_TD

    @property
    def _is_decode(self) -> bool:
        return self._step is not None and self._step.is_decode

    @property
    def _phase(self) -> PhaseCounts:
        return self.decode if self._is_decode else self.prefill

    def _compute(
        self, layer: int, experts: Any, hidden_ND: torch.Tensor, expert_ids_NK: torch.Tensor, weights_NK: torch.Tensor
    ) -> torch.Tensor:
        ids_NK, scale_NK = expert_ids_NK.detach().cpu().numpy(), weights_NK.detach().float().cpu().numpy()
        self._routed.append((ids_NK, scale_NK))
        routed = RoutedLayer(layer, ids_NK, scale_NK, hidden_ND.detach())
        ready = self._ready(routed, strongest_first(ids_NK, scale_NK))
        return weighted_sum(experts, hidden_ND, expert_ids_NK, weights_NK, ready)

    def _ready(self, routed: RoutedLayer, chosen: list[int]) -> Iterator[tuple[int, Weights]]:
        """The chosen experts with their weights, each as soon as it is on the device."""
        layer, phase = routed.layer, self._phase
        there: list[tuple[int, int]] = []
        awaited: deque[Transfer] = deque()
        streamed: deque[int] = deque()
        on_host: list[int] = []
        if self.cache.capacities[layer] == self.cache.num_experts:
            # Every expert has its slot: there is nothing to decide.
            slots = self.cache.slot_of_X[layer * self.cache.num_experts :].tolist()
            phase.requested += len(chosen)
            phase.hits += len(chosen)
            self._note_hits(len(chosen))
            for expert in chosen:
                yield expert, self.slots.weights(layer, slots[expert])
            return
        with self.transfers.lock, self._unbroken():
            for place, (expert, is_cached) in enumerate(zip(chosen, self.cache.look_up(layer, chosen), strict=True)):
                x = layer * self.cache.num_experts + expert
                coming = self.transfers.coming(x) if is_cached else None
                if is_cached and coming is None:
                    there.append((expert, int(self.cache.slot_of_X[x])))
                elif coming is not None:
                    # Its transfer has begun, or was queued before those of this layer.
                    awaited.appendleft(coming)
                    phase.late += 1
                else:
                    phase.misses += 1
                    # A prompt's experts have many tokens each: they are copied.
                    if self._host is not None and self._is_decode:
                        on_host.append(expert)
                        self.transfers.fill(layer, expert)
                    else:
                        self._load(layer, expert, place, awaited, streamed)
            phase.requested += len(chosen)
            phase.hits += len(there)
            phase.streamed += len(streamed)
            phase.host += len(on_host)
            self._note_hits(len(there))
            for buffer in range(min(BUFFERS, len(streamed))):
                awaited.append(self.transfers.demand(layer, streamed.popleft(), -1 - buffer))
            self.cache.note_use(layer, chosen)
        if self._is_decode:
            request, rows = self.cache.request, self._rows
            self._foresee(lambda foresight: foresight.after_layer(request, rows, routed))
        for expert, slot in there:
            began = time.perf_counter()
            yield expert, self.slots.weights(layer, slot)
            phase.compute += time.perf_counter() - began
        for expert in on_host:
            assert self._host is not None
            began = time.perf_counter()
            yield expert, self.slots.weights_in(layer, self._host.held(layer * self.cache.num_experts + expert))
            phase.compute += time.perf_counter() - began
        used = [slot for _, slot in there]
        while awaited:
            transfer = awaited.popleft()
            began = time.perf_counter()
            self.transfers.wait(transfer)
            there_at = time.perf_counter()
            phase.stall += there_at - began
            yield transfer.expert, self.slots.weights(layer, transfer.slot)
            phase.compute += time.perf_counter() - there_at
            used.append(transfer.slot)
            if transfer.slot < 0:
                self.transfers.note_computation(layer, [transfer.slot])
                if streamed:
                    with self.transfers.lock:
                        awaited.append(self.transfers.demand(layer, streamed.popleft(), transfer.slot))
        self.transfers.note_computation(layer, used)
        with self.transfers.lock:
            self.cache.release()

    @contextmanager
    def _unbroken(self) -> Iterator[None]:
        """Whatever interrupts the block leaves the cache unusable, and later calls say so."""
        try:
            yield
        except BaseException as error:
            self.transfers.break_off(error)
            raise

    def _note_hits(self, hits: int) -> None:
        if self.hits_R is not None:
            self.hits_R.append(hits)

    def _foresee(self, work: Callable[[Foresight], None], phase: PhaseCounts | None = None) -> None:
        """Follow and predict: here, or in a thread of its own once this turns out to hold up the model.

        phase: whose time it is, if not that of the step in progress.
        """
        if isinstance(self._foresight, ForesightThread):
            self._foresight.call(work)
            return
        began = time.perf_counter()
        work(self._foresight)
        (phase or self._phase).foresight += time.perf_counter() - began

    def _check_pace(self) -> None:
        """Give predictions a thread of their own if they have taken too large a share of the time."""
        phase = self.decode
        if isinstance(self._foresight, ForesightThread) or not phase.foresight:
            return
        if phase.tokens <= WARM_UP_TOKENS:
            self._warm_up = (phase.foresight, phase.seconds)
        if phase.tokens < PACE_TOKENS:
            return
        share = (phase.foresight - self._warm_up[0]) / max(phase.seconds - self._warm_up[1], 1e-9)
        if share > MAX_FORESIGHT:
            self._foresight = ForesightThread(self._foresight)
            self.notes.append(
                f"predictions took {share:.0%} of the time of the first {phase.tokens} generated tokens: after these, they "
                "are made in a thread of their own, and some come too late or are left out"
            )

    def close(self) -> None:
        """Stop all threads."""
        if isinstance(self._foresight, ForesightThread):
            self._foresight.close()
        self.transfers.close()

    def _load(self, layer: int, expert: int, place: int, awaited: deque[Transfer], streamed: deque[int]) -> None:
        """Begin the transfer of a missing expert into a slot, or leave it for a buffer if there is no room."""
        placed = self.cache.load(layer, expert, place) if self.cache.capacities[layer] else None
        if placed is None:
            streamed.append(expert)
            return
        if placed.evicted is not None:
            self.transfers.evicted(placed.evicted)
        awaited.append(self.transfers.demand(layer, expert, placed.slot))


def _end_prefill(
    foresight: Foresight, step: ForwardPass, expert_ids_NLK: npt.NDArray[np.int64], weights_NLK: npt.NDArray[np.float32]
) -> None:
    row_N = np.nonzero(step.is_real_BT)[0]
    for row in step.rows:
        tokens = step.token_ids_BT[row][step.is_real_BT[row]].tolist()
        foresight.end_prefill(row, tokens, expert_ids_NLK[row_N == row], weights_NLK[row_N == row])


def strongest_first(ids_NK: npt.NDArray[np.int64], weights_NK: npt.NDArray[np.float32]) -> list[int]:
    """The experts of some tokens, each once: the strongest of every token first, then the second strongest, and so on.

    The simulation orders the requests of a trace in the same way, whose weights are float16.
    """
    ids, weights = ids_NK.astype(np.uint16)[:, None], weights_NK.astype(np.float16)[:, None]
    ordered_K = sort_pairs(ids, weights)[0][:, 0].T.reshape(-1)
    if len(ids_NK) == 1:
        return [int(expert) for expert in ordered_K]
    _, first = np.unique(ordered_K, return_index=True)
    return [int(expert) for expert in ordered_K[np.sort(first)]]
