"""The terminal view of live metrics: load by layer, a heat map, recall of a predictor, hit rates of caches."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from profiler.errors import printable
from profiler.live.metrics import (
    BUSIEST,
    CAPTURE_ROWS,
    CAPTURE_WAITS,
    COUNTING,
    DECODE,
    DRIFT,
    DROPPED,
    ENTROPY,
    EXPERT_TOKENS,
    GAP,
    HIT_RATE,
    MAX_OVER_MEAN,
    MIXED,
    MOST_STEP_EXPERTS,
    RECALL,
    REFERENCE,
    REPEATED,
    SAMPLED,
    SCORED_REQUESTS,
    SHADOW_WINDOW_TOKENS,
    SHARE,
    STEP_EXPERTS,
    TOKENS,
    TOTAL,
    WINDOW,
    WINDOW_TOKENS,
    Metric,
    Samples,
)
from profiler.live.publication import Publication

# Scrapes that the heat map looks back at.
KEPT_SCRAPES = 60
MAP_COLUMNS = 96
SHADES = " ░▒▓█"
# From dark blue to yellow, for even steps of load: distinguishable in print and by people with any color vision.
COLORS = ("#0d0887", "#5b02a3", "#9a179b", "#cb4678", "#eb7852", "#fbb32f", "#f0f921")


class WatchView:
    """Renders the metrics of consecutive scrapes. Feed it with `update`, then call `render`."""

    def __init__(self) -> None:
        self._scrapes: deque[dict[tuple[str, str], Samples]] = deque(maxlen=KEPT_SCRAPES)

    def update(self, publications: Sequence[Publication]) -> None:
        """Add a scrape."""
        self._scrapes.append({(each.model, each.engine): each.samples for each in publications})

    def render(self) -> RenderableType:
        """The view of the last scrape; heat maps also show those before it."""
        if not self._scrapes or not self._scrapes[-1]:
            return Text("no live metrics on this page: start vLLM with SPECMOE_LIVE=1")
        return Group(*(self._engine(key) for key in self._scrapes[-1]))

    def _engine(self, key: tuple[str, str]) -> RenderableType:
        past = [scrape[key] for scrape in self._scrapes if key in scrape]
        samples = past[-1]
        model, engine = key
        parts: list[RenderableType] = [Text(f"{printable(model)}, engine {printable(engine)}", style="bold"), _summary(samples)]
        if _layers(samples):
            parts += [_layer_table(samples), *_heat_map(past)]
        parts += [*_recall_table(samples), *_cache_table(samples)]
        return Group(*parts)


def _summary(samples: Samples) -> Text:
    window = samples.values.get(WINDOW_TOKENS.name, {}).get((), 0)
    text = f"{_value(samples, TOKENS):,.0f} tokens, {window:,.0f} of them in the window"
    if dropped := _value(samples, DROPPED):
        text += f"; {dropped:,.0f} were not counted, because counting fell behind"
    if CAPTURE_ROWS.name in samples.values:
        text += (
            f"; recording: {_value(samples, CAPTURE_ROWS):,.0f} rows, "
            f"the engine waited {_value(samples, CAPTURE_WAITS):,.0f} times"
        )
    if COUNTING.name in samples.values and not _value(samples, COUNTING):
        text += "; counting has ended: see the engine's log"
    return Text(text)


def _layer_table(samples: Samples) -> Table:
    over = WINDOW if _has(samples, ENTROPY, WINDOW) else TOTAL
    title = f"load by layer ({over}); experts that a step needs: mean and most while generating, mean with prompts"
    table = Table(box=None, title=title, title_justify="left")
    columns: list[tuple[str, Metric, tuple[str, ...]]] = [
        ("entropy/max", ENTROPY, (over,)),
        ("busiest/mean", MAX_OVER_MEAN, (over,)),
        ("busiest share", BUSIEST, (over,)),
        ("repeats", REPEATED, (over,)),
        ("per step", STEP_EXPERTS, (DECODE, over)),
        ("at most", MOST_STEP_EXPERTS, (DECODE, over)),
        ("with prompts", STEP_EXPERTS, (MIXED, over)),
    ]
    table.add_column("layer", justify="right")
    for name, _, _ in columns:
        table.add_column(name, justify="right")
    for layer in _layers(samples):
        cells = [samples.values.get(metric.name, {}).get((layer, *labels)) for _, metric, labels in columns]
        table.add_row(layer, *("-" if cell is None else f"{cell:.3f}" if cell < 10 else f"{cell:.1f}" for cell in cells))
    return table


def _heat_map(past: list[Samples]) -> list[RenderableType]:
    """Tokens of each expert since the first kept scrape, if they are published; else the busiest expert over time."""
    layers = _layers(past[-1])
    experts = past[-1].values.get(EXPERT_TOKENS.name)
    if experts:
        numbers = sorted({int(expert) for _, expert in experts})
        now, before = (
            np.array([[each.get((layer, str(expert)), 0.0) for expert in numbers] for layer in layers])
            for each in (experts, past[0].values.get(EXPERT_TOKENS.name, {}))
        )
        recent_LE = now - before if (now > before).any() else now
        mean_L1 = np.maximum(recent_LE.mean(1, keepdims=True), 1e-9)
        return [*_map("load by layer and expert, relative to the layer's mean", layers, recent_LE / mean_L1, "experts")]
    values = [[_layer_value(samples, layer) for samples in past] for layer in layers]
    return [*_map("busiest expert relative to the mean, by layer", layers, np.array(values), "scrapes, the last one right")]


def _layer_value(samples: Samples, layer: str) -> float:
    found = samples.values.get(MAX_OVER_MEAN.name, {})
    return found.get((layer, WINDOW), found.get((layer, TOTAL), 1.0))


def _map(title: str, rows: list[str], values_RC: npt.NDArray[np.float64], columns: str) -> list[RenderableType]:
    count = values_RC.shape[1]
    edges = np.linspace(0, count, min(count, MAP_COLUMNS) + 1).astype(int)[:-1]
    values_RC = np.maximum.reduceat(values_RC, edges, axis=1)
    highest = max(float(values_RC.max()), 1.0)
    repeat = max(1, min(4, MAP_COLUMNS // len(edges)))
    lines: list[RenderableType] = [Text(f"{title} ({columns}: {count}; brightest: {highest:.2f})")]
    for name, values_C in zip(rows, values_RC, strict=True):
        line = Text(f"{name:>5} ")
        for value in values_C.tolist():
            level = min(value / highest, 1.0)
            color = COLORS[round(level * (len(COLORS) - 1))]
            line.append(SHADES[round(level * (len(SHADES) - 1))] * repeat, style=f"{color} on {color}")
        lines.append(line)
    return lines


def _recall_table(samples: Samples) -> list[RenderableType]:
    found = samples.values.get(RECALL.name, {})
    if not found:
        sampled = samples.values.get(SAMPLED.name)
        return [Text("shadow mode: no request has been scored yet")] if sampled else []
    share = f"{_value(samples, SHARE):.1%} of all tokens" if SHARE.name in samples.values else "share unknown"
    dropped = samples.values.get(SAMPLED.name, {}).get(("dropped",), 0)
    title = (
        f"recall@K of {_value(samples, SCORED_REQUESTS):,.0f} scored requests ({share}; {dropped:,.0f} dropped), "
        f"window of {_value(samples, SHADOW_WINDOW_TOKENS):,.0f} tokens"
    )
    table = Table(box=None, title=title, title_justify="left")
    for header in ("predictor", "horizon", "window", "total", "reference", "drift"):
        table.add_column(header, justify="left" if header == "predictor" else "right")
    for predictor, horizon in dict.fromkeys((predictor, horizon) for predictor, horizon, _ in found):
        own = (predictor, horizon)
        values = [found.get((*own, WINDOW)), found.get((*own, TOTAL))]
        values += [samples.values.get(metric.name, {}).get(own) for metric in (REFERENCE, DRIFT)]
        signs = ["", "", "", "+"]
        shown = ["-" if value is None else f"{value:{sign}.3f}" for value, sign in zip(values, signs, strict=True)]
        table.add_row(escape(printable(predictor)), printable(horizon), *shown)
    return [table]


def _cache_table(samples: Samples) -> list[RenderableType]:
    found = samples.values.get(HIT_RATE.name, {})
    if not found:
        return []
    table = Table(
        box=None, title="hit rate of caches, in brackets the share of the gap from lru to belady", title_justify="left"
    )
    table.add_column("policy")
    sizes = sorted({slots for _, slots in found}, key=int)
    for slots in sizes:
        table.add_column(f"{slots} slots", justify="right")
    for policy in dict.fromkeys(policy for policy, _ in found):
        cells = []
        for slots in sizes:
            hit_rate, gap = found.get((policy, slots)), samples.values.get(GAP.name, {}).get((policy, slots))
            cells.append("-" if hit_rate is None else f"{hit_rate:.3f}" + ("" if gap is None else f" ({gap:.2f})"))
        table.add_row(escape(printable(policy)), *cells)
    return [table]


def _layers(samples: Samples) -> list[str]:
    """The layers that have metrics, ascending."""
    return sorted({labels[0] for labels in samples.values.get(ENTROPY.name, {})}, key=int)


def _has(samples: Samples, metric: Metric, over: str) -> bool:
    return any(labels[-1] == over for labels in samples.values.get(metric.name, {}))


def _value(samples: Samples, metric: Metric) -> float:
    return samples.values.get(metric.name, {}).get((), 0.0)
