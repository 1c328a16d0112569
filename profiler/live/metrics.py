"""Every metric that live counting and shadow mode publish: name, kind, labels and meaning.

All metrics also have the labels `model_name` and `engine`, as vLLM's own do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

COMMON_LABELS = ("model_name", "engine")
# Values of the label `over`.
WINDOW, TOTAL = "window", "total"
# Values of the label `steps`.
DECODE, MIXED = "decode", "mixed"
STEP_KINDS = (DECODE, MIXED)
PREFIX = "specmoe_"


@dataclass(frozen=True)
class Metric:
    """A family of time series. A counter's name gets the suffix `_total` when it is exposed."""

    name: str
    kind: Literal["gauge", "counter"]
    about: str
    labels: tuple[str, ...] = ()

    @property
    def exposed(self) -> str:
        """The name of its samples, as queries use it."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


_OVER = "over=window: the rolling window; over=total: since the engine started"
_ROLLING = "over the window of scored requests"

TOKENS = Metric("specmoe_tokens", "counter", "Tokens routed: rows of forward passes, counted once for all layers")
STEPS = Metric(
    "specmoe_steps",
    "counter",
    "Forward passes with tokens; steps=decode: one token of each sequence; steps=mixed: prompts among them",
    ("steps",),
)
ENTROPY = Metric(
    "specmoe_load_entropy_share",
    "gauge",
    f"Entropy of the load of a layer's experts divided by log2(experts): 1 for even load. {_OVER}",
    ("layer", "over"),
)
MAX_OVER_MEAN = Metric(
    "specmoe_load_max_over_mean", "gauge", f"Load of the busiest expert divided by the mean load. {_OVER}", ("layer", "over")
)
BUSIEST = Metric(
    "specmoe_load_busiest_share",
    "gauge",
    f"Share of a layer's selections (top-K of every token) that went to its busiest expert. {_OVER}",
    ("layer", "over"),
)
REPEATED = Metric(
    "specmoe_repeated_share",
    "gauge",
    f"Experts that a token has in common with the token before it in its sequence, divided by K. {_OVER}",
    ("layer", "over"),
)
STEP_EXPERTS = Metric(
    "specmoe_step_experts",
    "gauge",
    f"Distinct experts that a forward pass needs in a layer, the union over its batch: mean over passes. {_OVER}",
    ("layer", "steps", "over"),
)
MOST_STEP_EXPERTS = Metric(
    "specmoe_step_experts_max",
    "gauge",
    f"The same, of the pass that needs the most: what a cache must hold so that no pass exceeds it. {_OVER}",
    ("layer", "steps", "over"),
)
EXPERT_TOKENS = Metric(
    "specmoe_expert_tokens",
    "counter",
    "Tokens that selected an expert; only with SPECMOE_LIVE_EXPERTS=1",
    ("layer", "expert"),
)
WINDOW_TOKENS = Metric("specmoe_window_tokens", "gauge", "Tokens in the rolling window")
COUNTING = Metric("specmoe_counting", "gauge", "1 while routing is counted, 0 after an error, which the engine's log names")
DROPPED = Metric("specmoe_dropped_tokens", "counter", "Tokens that were not counted because counting fell behind")
CAPTURE_ROWS = Metric("specmoe_capture_rows", "counter", "Rows (tokens x layers) that a recording has written")
CAPTURE_WAITS = Metric("specmoe_capture_waits", "counter", "How often the engine waited for a recording's writer")
CAPTURE_WAIT_SECONDS = Metric("specmoe_capture_wait_seconds", "counter", "How long the engine waited for it")

SAMPLED = Metric(
    "specmoe_shadow_requests",
    "counter",
    "Requests chosen for scoring; outcome=sent: passed to the scoring process; outcome=dropped: it or the engine was busy",
    ("outcome",),
)
SCORED = Metric("specmoe_shadow_scored_tokens", "counter", "Tokens of the requests that were scored")
SCORED_REQUESTS = Metric("specmoe_shadow_scored_requests", "counter", "Requests that were scored")
SHARE = Metric("specmoe_shadow_share", "gauge", "Scored tokens divided by all tokens of the engine")
RECALL = Metric(
    "specmoe_shadow_recall",
    "gauge",
    f"recall@K: predicted top K that were selected, divided by K. over=window: {_ROLLING}; over=total: over all scored",
    ("predictor", "horizon", "over"),
)
LAYER_RECALL = Metric(
    "specmoe_shadow_layer_recall",
    "gauge",
    f"recall@K by layer of the predicted experts, horizon 1, {_ROLLING}",
    ("predictor", "layer"),
)
REFERENCE = Metric(
    "specmoe_shadow_reference_recall",
    "gauge",
    "recall@K in the run's own evaluation.json, on problems that it was not trained on",
    ("predictor", "horizon"),
)
DRIFT = Metric(
    "specmoe_shadow_drift",
    "gauge",
    "Recall over the window minus the reference: negative if today's traffic is predicted worse",
    ("predictor", "horizon"),
)
HIT_RATE = Metric(
    "specmoe_shadow_cache_hit_rate",
    "gauge",
    f"Share of generated tokens' experts that a cache with this many slots per layer holds, {_ROLLING}, one after another",
    ("policy", "slots"),
)
GAP = Metric(
    "specmoe_shadow_cache_gap_captured",
    "gauge",
    "(hits - hits of lru) / (hits of belady - hits of lru), of the same caches",
    ("policy", "slots"),
)
SHADOW_WINDOW_TOKENS = Metric("specmoe_shadow_window_tokens", "gauge", "Tokens in the window of scored requests")
SHADOW_CPU = Metric("specmoe_shadow_cpu_seconds", "counter", "Processor time of the scoring process")

METRICS = (
    TOKENS,
    STEPS,
    ENTROPY,
    MAX_OVER_MEAN,
    BUSIEST,
    REPEATED,
    STEP_EXPERTS,
    MOST_STEP_EXPERTS,
    EXPERT_TOKENS,
    WINDOW_TOKENS,
    COUNTING,
    DROPPED,
    CAPTURE_ROWS,
    CAPTURE_WAITS,
    CAPTURE_WAIT_SECONDS,
    SAMPLED,
    SCORED,
    SCORED_REQUESTS,
    SHARE,
    RECALL,
    LAYER_RECALL,
    REFERENCE,
    DRIFT,
    HIT_RATE,
    GAP,
    SHADOW_WINDOW_TOKENS,
    SHADOW_CPU,
)
BY_NAME = {metric.name: metric for metric in METRICS}


@dataclass
class Samples:
    """Values of metrics: `values[name]` maps the values of a metric's own labels, in its order, to a number."""

    values: dict[str, dict[tuple[str, ...], float]] = field(default_factory=dict)

    def add(self, metric: Metric, value: float, *labels: object) -> None:
        """Set one value. Raises `ValueError` if the number of labels is not that of the metric."""
        if len(labels) != len(metric.labels):
            raise ValueError(f"{metric.name}: labels {labels}, expected values of {metric.labels}")
        self.values.setdefault(metric.name, {})[tuple(map(str, labels))] = value

    def add_layers(self, metric: Metric, layers: Sequence[int], values_L: Sequence[float], *labels: object) -> None:
        """Set one value for each layer; `layer` is the metric's first label. Values that are not a number are left out."""
        for layer, value in zip(layers, values_L, strict=True):
            if value == value:
                self.add(metric, value, layer, *labels)

    def get(self, metric: Metric, *labels: object) -> float:
        """One value. Raises `KeyError` if it was not published."""
        return self.values[metric.name][tuple(map(str, labels))]
