"""What a running model foresees: the experts to prefetch, and how soon each expert is used again."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from profiler.errors import SpecmoeError
from profiler.models.moe_modules import MoEBlock
from speculation.data.history import ABSTAIN, History, Prediction
from speculation.data.tasks import Shape, Task
from speculation.predictors.base import Predictor


@dataclass(frozen=True)
class Foreseen:
    """An expert that is predicted to be needed.

    Attributes:
        layer: The index of its MoE layer.
        layers_ahead: How many layers after the last one that has been routed.
        expert: The expert.
        score: The sum of its probabilities over the sequences of the step.
    """

    layer: int
    layers_ahead: int
    expert: int
    score: float


@dataclass(frozen=True)
class RoutedLayer:
    """What is known once a layer's router has chosen.

    Attributes:
        layer: The index of the MoE layer.
        expert_ids_SK: The experts of the sequences that decode in this step.
        weights_SK: Their routing weights.
        hidden_SD: What the experts get as input, on the device.
    """

    layer: int
    expert_ids_SK: npt.NDArray[np.int64]
    weights_SK: npt.NDArray[np.float32]
    hidden_SD: torch.Tensor


class Prefetcher(Protocol):
    """Says which experts to prefetch while text is generated."""

    def before_layers(self, histories: Sequence[History]) -> list[Foreseen]:
        """Called when the tokens of a step are known, before its first layer."""
        ...

    def after_layer(self, histories: Sequence[History], routed: RoutedLayer) -> list[Foreseen]:
        """Called when a layer's router has chosen."""
        ...


class PredictorPrefetcher:
    """Prefetches what a trained predictor predicts.

    Args:
        predictor: A predictor of experts, for any task.
        experts: Experts to prefetch per prediction, layer and sequence.
        threshold: Only those with at least this predicted probability.

    Raises:
        SpecmoeError: The predictor's task is `reuse`.
    """

    def __init__(self, predictor: Predictor, experts: int, threshold: float = 0.0) -> None:
        if not predictor.shape.task.predicts_experts:
            raise SpecmoeError(
                f"a predictor for {predictor.shape.task} says how soon experts are used again, not which come next: use it as "
                "the policy"
            )
        self.predictor, self._experts, self._threshold = predictor, experts, threshold

    def before_layers(self, histories: Sequence[History]) -> list[Foreseen]:
        if self.predictor.shape.task != Task.WHOLE_PATH:
            return []
        found = [self.predictor.predict(history) for history in histories]
        return [
            foreseen
            for layer in range(self.predictor.shape.layers)
            for foreseen in self._best([(p.expert_ids[layer, 0], p.scores[layer, 0]) for p in found], layer, layer + 1)
        ]

    def after_layer(self, histories: Sequence[History], routed: RoutedLayer) -> list[Foreseen]:
        shape, layer = self.predictor.shape, routed.layer
        is_last = layer == shape.layers - 1
        if shape.task == Task.NEXT_LAYER and not is_last:
            found = [self.predictor.predict(history) for history in histories]
            return [
                foreseen
                for hop in range(len(found[0].expert_ids))
                for foreseen in self._best([(p.expert_ids[hop], p.scores[hop]) for p in found], layer + hop + 1, hop + 1)
            ]
        if shape.task == Task.NEXT_TOKEN and is_last:
            found = [self.predictor.predict(history) for history in histories]
            return [
                foreseen
                for later in range(shape.layers)
                for foreseen in self._best([(p.expert_ids[later, 0], p.scores[later, 0]) for p in found], later, later + 1)
            ]
        return []

    def _best(self, ranked: list[tuple[Any, Any]], layer: int, layers_ahead: int) -> list[Foreseen]:
        """The likeliest experts of each sequence, by the sum of their probabilities."""
        sums: dict[int, float] = {}
        for ids_E, scores_E in ranked:
            for expert, score in zip(ids_E[: self._experts].tolist(), scores_E[: self._experts].tolist(), strict=True):
                if expert != ABSTAIN and score >= self._threshold:
                    sums[expert] = sums.get(expert, 0.0) + score
        ordered = sorted(sums.items(), key=lambda item: -item[1])
        return [Foreseen(layer, layers_ahead, expert, score) for expert, score in ordered]


class NextGatePrefetcher:
    """Prefetches what the next layer's own router chooses for this layer's input. Nothing is trained.

    It works because a layer changes the residual stream little. The input is normalized with this layer's scale, which is not
    corrected (arXiv:2312.17238).

    Args:
        blocks: The model's MoE layers, in order.
        top_k: K, the experts that a router chooses.
        experts: Experts to prefetch per sequence.
        threshold: Only those with at least this probability, as `NextGate` in `speculation.predictors` defines it.
    """

    def __init__(self, blocks: Sequence[MoEBlock], top_k: int, experts: int, threshold: float = 0.0) -> None:
        self._blocks, self._top_k, self._experts, self._threshold = blocks, top_k, experts, threshold

    def before_layers(self, histories: Sequence[History]) -> list[Foreseen]:
        return []

    @torch.inference_mode()
    def after_layer(self, histories: Sequence[History], routed: RoutedLayer) -> list[Foreseen]:
        target = routed.layer + 1
        if target == len(self._blocks):
            return []
        block = self._blocks[target]
        weight, bias = block.gate.get_parameter("weight"), getattr(block.gate, "bias", None)
        logits_SE = torch.nn.functional.linear(routed.hidden_SD.to(weight.dtype), weight, bias).float()
        correction_E = block.correction_E
        if correction_E is not None:
            logits_SE = (logits_SE.sigmoid() + correction_E.float()).clamp_min(1e-6).log()
        chance_SE = self._top_k * logits_SE.softmax(-1)
        best, chosen = (chance_SE / (1 + chance_SE)).topk(min(self._experts, chance_SE.shape[-1]), dim=-1)
        sums: dict[int, float] = {}
        for expert, score in zip(chosen.flatten().tolist(), best.flatten().tolist(), strict=True):
            if score >= self._threshold:
                sums[expert] = sums.get(expert, 0.0) + score
        return [Foreseen(target, 1, expert, score) for expert, score in sorted(sums.items(), key=lambda item: -item[1])]


def reuse_scores(predictor: Predictor, histories: Sequence[History]) -> npt.NDArray[np.float32]:
    """How soon each expert is used again, 0 to 1, float32 `[L * E]`, from a predictor of the task `reuse`.

    The scores of several sequences are combined as in the simulation: one minus the product of `1 - score`.
    """
    later_X = np.ones(predictor.shape.layers * predictor.shape.experts, dtype=np.float32)
    for history in histories:
        later_X *= 1 - _by_expert(predictor.predict(history))
    return 1 - later_X


def _by_expert(prediction: Prediction) -> npt.NDArray[np.float32]:
    """Scores `[L * E]` in the order of the experts, from a ranking `[L, 1, E]`."""
    scores_LE = np.zeros(prediction.scores[:, 0].shape, dtype=np.float32)
    np.put_along_axis(scores_LE, prediction.expert_ids[:, 0], prediction.scores[:, 0], axis=1)
    return scores_LE.reshape(-1)


class Foresight:
    """Follows the sequences that run, and predicts from them.

    Args:
        shape: The sizes of the model.
        prefetcher: What to prefetch; None for nothing.
        reuse: A predictor of the task `reuse`, for `Rule.LEARNED`; else None.
        on_foreseen: Gets the experts to prefetch, and the request after which they were foreseen.
        on_scores: Gets the scores of all experts.

    Attributes:
        is_behind: Whether later calls wait already: then sequences are followed, but nothing is predicted.
    """

    def __init__(
        self,
        shape: Shape,
        prefetcher: Prefetcher | None,
        reuse: Predictor | None,
        on_foreseen: Callable[[Sequence[Foreseen], int], None],
        on_scores: Callable[[npt.NDArray[np.float32]], None],
    ) -> None:
        self._shape, self._prefetcher, self._reuse = shape, prefetcher, reuse
        self._on_foreseen, self._on_scores = on_foreseen, on_scores
        self.is_behind = False
        self._histories: list[History] = []
        needs_history = isinstance(prefetcher, PredictorPrefetcher) or reuse is not None
        self._shape_of_history = shape if needs_history else None

    def start(self, sequences: int) -> None:
        """Forget all sequences; start new ones."""
        self._histories = [History(self._shape) for _ in range(sequences)]

    def _followed(self, rows: Sequence[int]) -> list[History]:
        """The histories of some sequences; none after a fault, until sequences start again."""
        return [self._histories[row] for row in rows] if self._histories else []

    def begin_decode(self, request: int, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        """Begin a step that decodes one token of each of some sequences.

        Args:
            request: The number of the last request, in the cache's count.
            rows: The sequences.
            token_ids: The token of each of them.
        """
        histories = self._followed(rows)
        if not histories:
            return
        if self._shape_of_history is not None:
            for history, token in zip(histories, token_ids, strict=True):
                history.begin(token)
        if self._reuse is not None and not self.is_behind:
            self._on_scores(reuse_scores(self._reuse, histories))
        if self._prefetcher is not None and not self.is_behind:
            self._on_foreseen(self._prefetcher.before_layers(histories), request)

    def begin_prefill(self, rows: Sequence[int], first_tokens: Sequence[int]) -> None:
        """Begin a step that computes part of the prompts of some sequences.

        The scores are those at each part's first token: its later tokens' routes are not known yet.
        """
        histories = self._followed(rows)
        if self._reuse is None or not histories:
            return
        for history, token in zip(histories, first_tokens, strict=True):
            history.begin(token, is_decode=False)
        self._on_scores(reuse_scores(self._reuse, histories))

    def after_layer(self, request: int, rows: Sequence[int], routed: RoutedLayer) -> None:
        """A layer's router has chosen, in a step that decodes: the cache's request of that number."""
        histories = self._followed(rows)
        if not histories:
            return
        if self._shape_of_history is not None:
            for history, ids_K, weights_K in zip(histories, routed.expert_ids_SK, routed.weights_SK, strict=True):
                history.add(ids_K, weights_K)
        if self._prefetcher is not None and not self.is_behind:
            self._on_foreseen(self._prefetcher.after_layer(histories, routed), request)

    def end_prefill(
        self,
        row: int,
        token_ids: Sequence[int],
        expert_ids_TLK: npt.NDArray[np.int64],
        weights_TLK: npt.NDArray[np.float32],
    ) -> None:
        """A part of a prompt is computed: its tokens, and the experts that they were routed to."""
        if self._shape_of_history is None or not self._histories:
            return
        history = self._histories[row]
        for place, token in enumerate(token_ids):
            # The first token was begun to score it.
            if place or self._reuse is None:
                history.begin(token, is_decode=False)
            for ids_K, weights_K in zip(expert_ids_TLK[place], weights_TLK[place], strict=True):
                history.add(ids_K, weights_K)


class ForesightThread:
    """Runs a `Foresight` in a thread of its own, for predictors that would hold up the model.

    Args:
        foresight: What to run. Nothing else may use it afterwards.
    """

    def __init__(self, foresight: Foresight) -> None:
        self._foresight = foresight
        self._calls: queue.SimpleQueue[Callable[[Foresight], None] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="specmoe-predict", daemon=True)
        self._thread.start()

    def call(self, work: Callable[[Foresight], None]) -> None:
        """Queue a call of one of the foresight's methods.

        Raises:
            SpecmoeError: An earlier one failed. Sequences that are started after this are followed again.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        self._calls.put(work)

    def close(self) -> None:
        """Stop the thread, after what is queued."""
        self._calls.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._calls.get()) is not None:
            self._foresight.is_behind = not self._calls.empty()
            try:
                work(self._foresight)
            except BaseException as error:  # the next call raises it
                self._error = error
                # Not followed any more, until sequences start.
                self._foresight.start(0)
