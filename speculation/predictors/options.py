"""Settings of training, and what it tells while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Epochs = list[dict[str, float]]
"""An entry per epoch, of losses by name; empty for what is counted in one pass."""
Progress = Callable[[int, int, dict[str, float]], None]
"""Called with how many epochs are done, of how many, and the last one's entry."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Settings that neural predictors use, each class with defaults of its own; counting predictors ignore them.

    batch_tokens: tokens per step and process, each with all its layers. warm_up: share of the updates during which the learning
    rate rises. average: the weights kept are a mean over about so many last updates. accumulate: steps per update. patience:
    epochs without a better validation loss before stopping. precision: no, bf16 or fp16; None for what the device is good at.
    checkpoint_seconds: between checkpoints. epoch_tokens: an epoch is so many tokens, drawn at random; None for all. width,
    context: of the network's states, and tokens that it sees; None for the predictor's own. adaptive_context: all of it only
    where the routing of the last known token is uncertain, else two tokens. shared_layers: one head for all layers.
    router_inputs: look at these besides the routes. shards_per_group: routes are in memory by groups of about so many routing
    files of the trace, not all at a time; an epoch takes group by group, in random order.
    """

    seed: int = 0
    epochs: int = 12
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
