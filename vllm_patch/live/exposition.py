"""Put the published metrics where Prometheus scrapes them: on vLLM's own `/metrics`, and on a port of ours if one was chosen.

vLLM serves `prometheus_client`'s default registry or, with several API servers, a registry with a `MultiProcessCollector`. In
both cases a collector of ours reads the files that the engine's processes publish, at each scrape.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, multiprocess
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from profiler.live.metrics import COMMON_LABELS, METRICS
from profiler.live.publication import read_publications

log = logging.getLogger("vllm.specmoe")


class LiveCollector(Collector):
    """Collects what the processes of a folder publish."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def describe(self) -> Iterable[Any]:
        """Nothing: a registry would otherwise read the files to learn the names."""
        return []

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """The metrics of all processes, each family once."""
        publications = list(read_publications(self.folder))
        for metric in METRICS:
            cls = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = cls(metric.name, metric.about, labels=[*COMMON_LABELS, *metric.labels])
            for each in publications:
                for labels, value in each.samples.values.get(metric.name, {}).items():
                    family.add_metric([each.model, each.engine, *labels], value)
            if family.samples:
                yield family


def expose(folder: Path) -> None:
    """Serve the metrics of a folder wherever this process serves vLLM's. Once for each process."""
    registry = prometheus_client.REGISTRY
    if getattr(registry, "specmoe_folder", None) == folder:
        return
    # Marks the registry as ours. mypy: classes of prometheus_client do not declare it.
    registry.specmoe_folder = folder  # type: ignore[attr-defined]
    collector = LiveCollector(folder)
    registry.register(collector)
    # mypy: as above, and assigning a method.
    start: Any = multiprocess.MultiProcessCollector.__init__

    @functools.wraps(start)
    def start_and_register(self: Any, registry: CollectorRegistry | None, *args: Any, **kwargs: Any) -> None:
        start(self, registry, *args, **kwargs)
        if registry is not None:
            registry.register(collector)

    multiprocess.MultiProcessCollector.__init__ = start_and_register  # type: ignore[method-assign]


def serve_metrics(folder: Path, host: str, port: int) -> None:
    """Serve the metrics of a folder on a port, in a thread. If it is taken, the reason is logged."""
    registry = CollectorRegistry()
    registry.register(LiveCollector(folder))
    try:
        prometheus_client.start_http_server(port, host, registry)
    except OSError as error:
        log.error("live metrics are not served on %s:%d: %s", host, port, error)
    else:
        log.warning("live metrics are served on http://%s:%d/metrics", host, port)
