"""The loop of the scoring process: read a request, score it, publish; and stay within its share of processor time."""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from analysis.documents.evaluation import EVALUATION_FILE, read_evaluation
from profiler.errors import SpecmoeError, TraceError, counted
from profiler.live.metrics import (
    DRIFT,
    GAP,
    HIT_RATE,
    LAYER_RECALL,
    RECALL,
    REFERENCE,
    SCORED,
    SCORED_REQUESTS,
    SHADOW_CPU,
    SHADOW_WINDOW_TOKENS,
    SHARE,
    TOTAL,
    WINDOW,
    Samples,
)
from profiler.live.options import ShadowOptions
from profiler.live.publication import Publisher
from profiler.live.shadow_stream import ShadowModel, ShadowRequest, read_model, read_request
from speculation.data.routes import Routes
from speculation.offload.policy_scores import token_scores
from speculation.predictors.base import Predictor
from speculation.shadow.caches import Played, play_policies, rules_of, usual_slots
from speculation.shadow.scoring import ScoredRequest, Scores, count_hits, routes_of_request
from speculation.training.runs import Run, load_run

BASELINES = ("popularity", "previous-token")
# Caches are played at most once in so many seconds.
PLAY_SECONDS = 5.0
# Scores that a learned policy keeps for the window.
SCORE_BYTES = 256 << 20


def yield_to_the_engine(cores: Sequence[int]) -> None:
    """Compute only when no other process wants the core, on any of `cores`."""
    if cores:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cores)
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            return
    os.nice(19)


class Shadow:
    """Scores requests of one model with one run.

    Args:
        run: The run to score.
        model: The model whose requests follow.
        options: What to score, and how.

    Raises:
        SpecmoeError: The run is of a model of another shape, or needs router inputs; or a policy is unknown.
    """

    def __init__(self, run: Run, model: ShadowModel, options: ShadowOptions) -> None:
        shape = run.predictor.shape
        sizes = [(len(model.moe_layers), model.top_k, model.num_experts), (shape.layers, shape.top_k, shape.experts)]
        if sizes[0] != sizes[1]:
            theirs, ours = (
                f"{counted(layers, 'MoE layer')} and top-{top_k} of {experts} experts" for layers, top_k, experts in sizes
            )
            raise SpecmoeError(f"the engine's model has {theirs}, but that of {run.path} has {ours}")
        if run.predictor.takes_router_inputs:
            raise SpecmoeError(f"{run.path} takes router inputs, which a running engine does not pass on")
        self._model, self._shape = model, shape
        predicts = shape.task.predicts_experts
        self._predictors: dict[str, Predictor] = {name: run.baselines[name] for name in BASELINES}
        if predicts:
            self._predictors[run.name] = run.predictor
        self._reuse = None if predicts else run.predictor
        self._reference = {} if not predicts else reference_recall(run)
        self._popularity_LE = run.baselines["popularity"].arrays()["probability_LE"]
        self._rules = rules_of(options.policies, None if predicts else run.name)
        self._slots = options.slots or usual_slots(shape.experts, shape.top_k)
        window = options.window_tokens
        if self._reuse is not None:
            window = min(window, max(1, SCORE_BYTES // (4 * shape.layers * shape.experts)))
        self.scores = Scores(window)
        self._played: list[Played] = []
        self._played_requests = 0
        self._engine_tokens = 0

    def score(self, request: ShadowRequest) -> None:
        """Add a finished request. Raises `TraceError` if its rows are not routing."""
        routes = routes_of_request(request, self._shape.experts)
        self.scores.add(self._score(routes))
        self._engine_tokens = max(self._engine_tokens, request.engine_tokens)

    def play(self) -> None:
        """Play the caches on the window, unless it is that of the last time."""
        if self._played_requests != self.scores.requests:
            self._played = play_policies(self.scores.window, self._popularity_LE, self._rules, self._slots)
            self._played_requests = self.scores.requests

    def warm_up(self) -> None:
        """Compile and allocate what scoring needs, so that it is not counted as the cost of a request."""
        shape = self._shape
        ids_LK = np.broadcast_to(np.arange(shape.top_k), (3, shape.layers, shape.top_k))
        request = ShadowRequest(
            expert_ids_TLK=ids_LK.astype(np.uint16),
            weights_TLK=np.full(ids_LK.shape, 1 / shape.top_k, dtype=np.float16),
            positions_T=np.arange(3, dtype=np.int32),
            vocab_ids_T=np.full(3, -1, dtype=np.int32),
            prompt_tokens=1,
            engine_tokens=0,
        )
        scored = self._score(routes_of_request(request, shape.experts))
        play_policies([scored], self._popularity_LE, self._rules, self._slots[:1])

    def samples(self) -> Samples:
        """What is published now."""
        samples, scores = Samples(), self.scores
        samples.add(SCORED, scores.tokens)
        samples.add(SCORED_REQUESTS, scores.requests)
        samples.add(SHADOW_WINDOW_TOKENS, scores.window_tokens)
        samples.add(SHADOW_CPU, time.process_time())
        if self._engine_tokens:
            samples.add(SHARE, scores.tokens / self._engine_tokens)
        for over, by_name in ((WINDOW, scores.recent), (TOTAL, scores.total)):
            for name, hits in by_name.items():
                for horizon, recall in enumerate(hits.recall_H, start=1):
                    if recall == recall:
                        samples.add(RECALL, recall, name, horizon, over)
        for name, hits in scores.recent.items():
            for layer, recall in zip(self._model.moe_layers, hits.recall_L, strict=True):
                if recall == recall:
                    samples.add(LAYER_RECALL, recall, name, layer)
        for (name, horizon), reference in self._reference.items():
            samples.add(REFERENCE, reference, name, horizon)
            recall = scores.recent[name].recall_H[horizon - 1] if name in scores.recent else np.nan
            if recall == recall:
                samples.add(DRIFT, recall - reference, name, horizon)
        for played in self._played:
            samples.add(HIT_RATE, played.hit_rate, played.policy, played.slots)
            if played.gap is not None:
                samples.add(GAP, played.gap, played.policy, played.slots)
        return samples

    def _score(self, routes: Routes) -> ScoredRequest:
        hits = {name: count_hits(predictor, routes) for name, predictor in self._predictors.items()}
        return ScoredRequest(routes, hits, None if self._reuse is None else token_scores(self._reuse, routes))


def reference_recall(run: Run) -> dict[tuple[str, int], float]:
    """recall@K in the run's own `evaluation.json`, by predictor and horizon; empty, with a note, without a held-out one."""
    advice = f"'specmoe evaluate {run.path} --trace TRACE --json {run.path / EVALUATION_FILE}' gives live recall a reference"
    if not (run.path / EVALUATION_FILE).is_file():
        print(f"specmoe: {advice}", file=sys.stderr)
        return {}
    evaluation, shape = read_evaluation(run.path), run.predictor.shape
    if evaluation.trained_on or evaluation.predictor != run.name or evaluation.task != shape.task:
        what = "of problems that it was trained on" if evaluation.trained_on else "of another run"
        print(f"specmoe: {run.path / EVALUATION_FILE} is {what}: {advice}", file=sys.stderr)
        return {}
    return {
        (name, horizon): metrics[f"recall@{shape.top_k}"]
        for name, result in evaluation.results.items()
        if name in {*BASELINES, run.name}
        for horizon in range(1, shape.horizon + 1)
        if (metrics := result.metrics.get(f"h={horizon}"))
    }


def run(stream: IO[bytes], options: ShadowOptions, published: Path) -> None:
    """Score the requests of a stream until it ends.

    Raises:
        SpecmoeError: The run cannot be loaded, or not be scored for this model.
    """
    model = read_model(stream)
    if model is None:
        return
    shadow = Shadow(load_run(Path(options.run)), model, options)
    _compute_on_one_thread()
    shadow.warm_up()
    publisher = Publisher(published, model.model, model.engine)
    # One request waits here, the others in the pipe and in the engine, which drops what is too much.
    arrived: queue.Queue[ShadowRequest | None] = queue.Queue(1)
    threading.Thread(target=_read, args=(stream, arrived), daemon=True).start()
    played = 0.0
    while True:
        request = _next(arrived)
        began, wall = time.process_time(), time.monotonic()
        if isinstance(request, ShadowRequest):
            try:
                shadow.score(request)
            except TraceError as error:
                print(f"specmoe: a live request is not scored: {error}", file=sys.stderr)
        elif request is None:
            return
        if wall - played > PLAY_SECONDS and shadow.scores.requests:
            shadow.play()
            played = time.monotonic()
        with contextlib.suppress(OSError):
            publisher.publish(shadow.samples())
        spent, took = time.process_time() - began, time.monotonic() - wall
        time.sleep(max(0.0, spent / options.cpu - took))


class _Nothing:
    """No request has come for a second."""


def _next(arrived: queue.Queue[ShadowRequest | None]) -> ShadowRequest | _Nothing | None:
    try:
        return arrived.get(timeout=1.0)
    except queue.Empty:
        return _Nothing()


def _read(stream: IO[bytes], arrived: queue.Queue[ShadowRequest | None]) -> None:
    while (request := read_request(stream)) is not None:
        arrived.put(request)
    arrived.put(None)


def _compute_on_one_thread() -> None:
    import torch

    torch.set_num_threads(1)
