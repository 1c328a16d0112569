"""Training options, and the types in which training reports its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Epochs = list[dict[str, float]]
"""One entry per epoch, with losses by name; empty for counting predictors, which make a single pass."""
Progress = Callable[[int, int, dict[str, float]], None]
"""Called with the number of completed epochs, the total number of epochs, and the entry of the last one."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Training options of neural predictors. Each class has its own defaults (`Predictor.defaults`).

    Counting predictors ignore all of them except `seed` and `shards_per_group`.

    Args:
        seed: Seed of weights, batches and dropout.
        epochs: The maximum number of epochs. None: as many as it takes to see `seen_tokens`, but 2 to 30.
        seen_tokens: Tokens to train on, counted once per epoch, if `epochs` is None: little data needs more epochs.
        batch_tokens: Tokens per step and process, each with all its layers.
        learning_rate: The peak learning rate of AdamW.
        weight_decay: The weight decay of matrices; biases and norms have none.
        dropout: The dropout probability.
        warm_up: The share of the updates during which the learning rate rises.
        clip: The maximum gradient norm.
        average: The stored weights are a moving average over about this many updates.
        accumulate: Steps per update of the weights (gradient accumulation).
        patience: Epochs without a better validation loss before training stops.
        precision: Mixed precision: "no", "bf16" or "fp16". None: the best that the device supports.
        max_seconds: Stop after the epoch that exceeds this time.
        checkpoint_seconds: Seconds between checkpoints.
        epoch_tokens: Tokens per epoch, drawn at random. None: all tokens.
        width: The width of the network's states. None: the predictor's own.
        context: The number of tokens whose routes the network sees in order. None: the predictor's own.
        adaptive_context: Use the whole context only where the routing of the last known token is uncertain, otherwise two
            tokens.
        shared_layers: Use one head for all layers instead of one per layer.
        shards_per_group: Keep only about this many routing files of the trace in memory at a time. An epoch then goes through
            these groups in random order. None: the whole trace.
        router_inputs: Use the router inputs in addition to the routes.
    """

    seed: int = 0
    epochs: int | None = 12
    seen_tokens: int = 1_000_000
    batch_tokens: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    dropout: float = 0.1
    warm_up: float = 0.02
    clip: float = 1.0
    average: int = 1000
    accumulate: int = 1
    patience: int = 5
    precision: str | None = None
    max_seconds: float | None = None
    checkpoint_seconds: float = 300.0
    epoch_tokens: int | None = None
    width: int | None = None
    context: int | None = None
    adaptive_context: bool = False
    shared_layers: bool = False
    shards_per_group: int | None = None
    router_inputs: bool = False
