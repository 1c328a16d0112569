"""Start counting in a worker whose model is loaded, and the scoring process if there is a predictor to score."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from profiler.live.options import FOLDER_VARIABLE, LiveOptions, ShadowOptions
from profiler.live.publication import Publisher
from profiler.live.shadow_stream import ShadowModel
from vllm_patch.capture.recorder import Recorder
from vllm_patch.live.counter import LiveCounter
from vllm_patch.live.shadow_feed import ShadowFeed

log = logging.getLogger("vllm.specmoe")


def start_counter(recorder: Recorder, config: Any, options: LiveOptions) -> LiveCounter:
    """Count every step from now on.

    recorder: the worker's recorder, whose buffers the hooks fill. config: vLLM's `VllmConfig`.
    """
    name = getattr(config.model_config, "served_model_name", None) or config.model_config.model
    publisher = Publisher.of_engine(Path(os.environ[FOLDER_VARIABLE]), name if isinstance(name, str) else name[0])
    feed = None if options.shadow is None else _start_feed(recorder, config, options.shadow, publisher)

    def recorder_status() -> dict[str, Any] | None:
        return recorder.status() if recorder.recording else None

    shape = len(recorder.moe_layers), recorder.num_experts, recorder.top_k
    log.warning("counting routing: %d MoE layers of %d experts, top-%d", *shape)
    return LiveCounter(
        recorder.buffers,
        publisher,
        moe_layers=recorder.moe_layers,
        num_experts=recorder.num_experts,
        top_k=recorder.top_k,
        window_seconds=options.window_seconds,
        experts=options.experts,
        feed=feed,
        recorder_status=recorder_status,
    )


def _start_feed(recorder: Recorder, config: Any, options: ShadowOptions, publisher: Publisher) -> ShadowFeed | None:
    if config.speculative_config is not None:
        log.error("the predictor is not scored: with speculative decoding, the last rows of a request are of rejected drafts")
        return None
    model = ShadowModel(
        moe_layers=recorder.moe_layers,
        num_experts=recorder.num_experts,
        top_k=recorder.top_k,
        model=publisher.model,
        engine=publisher.engine,
    )
    published = publisher.path.with_name(f"shadow-{publisher.engine}{publisher.path.suffix}")
    return ShadowFeed(options, model, published)
