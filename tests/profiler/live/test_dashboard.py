"""The Grafana dashboard in `examples/` asks for metrics and labels that exist, and shows every kind of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from profiler.live.metrics import COMMON_LABELS, COUNTING, METRICS, SHADOW_WINDOW_TOKENS, WINDOW_TOKENS

DASHBOARD = json.loads((Path(__file__).parents[3] / "examples" / "grafana-live.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
BY_EXPOSED_NAME = {metric.exposed: metric for metric in METRICS}
# A metric with its matchers; the labels of an aggregation or of a legend.
SELECTOR = re.compile(r"\b(specmoe_\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"")


def queries() -> list[tuple[str, str]]:
    """(query, legend) of every panel and variable."""
    found = [(target["expr"], target["legendFormat"]) for panel in PANELS for target in panel["targets"]]
    variables = [one for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]
    assert variables
    return found + [(one["definition"], "") for one in variables]


@pytest.mark.parametrize(("query", "legend"), queries())
def test_a_query_names_metrics_and_labels_that_exist(query: str, legend: str) -> None:
    selectors = SELECTOR.findall(query)
    assert selectors
    for name, matchers in selectors:
        assert name in BY_EXPOSED_NAME
        labels = {*COMMON_LABELS, *BY_EXPOSED_NAME[name].labels}
        assert set(MATCHER.findall(matchers)) <= labels
        grouped = [label.strip() for group in re.findall(r"\bby \(([^)]*)\)", query) for label in group.split(",")]
        assert set(grouped) <= labels
        shown = set(re.findall(r"\{\{(\w+)\}\}", legend))
        assert shown <= (set(grouped) if grouped else labels)
    assert query.count("(") == query.count(")")


def test_every_metric_with_labels_of_its_own_is_shown() -> None:
    named = {name for query, _ in queries() for name, _ in SELECTOR.findall(query)}
    plain = {"specmoe_steps_total", "specmoe_capture_rows_total", "specmoe_capture_wait_seconds_total"}
    plain |= {"specmoe_shadow_scored_tokens_total", SHADOW_WINDOW_TOKENS.exposed, WINDOW_TOKENS.exposed}
    assert named == {metric.exposed for metric in METRICS} - plain
    assert COUNTING.exposed in named


def test_panels_have_numbers_and_places_of_their_own() -> None:
    every: list[dict[str, Any]] = DASHBOARD["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    taken: set[tuple[int, int]] = set()
    for panel in every:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
