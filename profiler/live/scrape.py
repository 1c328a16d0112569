"""Read live metrics back from what a server exposes to Prometheus."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.parse
import urllib.request

from profiler.errors import SpecmoeError
from profiler.live.metrics import COMMON_LABELS, METRICS, Samples
from profiler.live.publication import Publication

TIMEOUT_SECONDS = 10.0
MAX_BYTES = 64 << 20
_BY_EXPOSED_NAME = {metric.exposed: metric for metric in METRICS}


def fetch_page(url: str) -> str:
    """The metrics page of a server.

    Args:
        url: Its address; without a path, `/metrics` is read, without a scheme, by HTTP.

    Raises:
        SpecmoeError: There is no such page, or it is longer than 64 MiB.
    """
    address = url if "://" in url else f"http://{url}"
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in {"http", "https"} or not parts.netloc:
        raise SpecmoeError(f"{url!r} is not an address of a server: expected one such as http://localhost:8000")
    if parts.path in {"", "/"}:
        address = urllib.parse.urlunsplit(parts._replace(path="/metrics"))
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as answer:
            content: bytes = answer.read(MAX_BYTES + 1)
    except (OSError, urllib.error.URLError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise SpecmoeError(f"{address} cannot be read: {reason}") from error
    if len(content) > MAX_BYTES:
        raise SpecmoeError(f"{address} is longer than {MAX_BYTES >> 20} MiB: this is not a metrics page of vLLM")
    return content.decode("utf-8", errors="replace")


def parse(text: str) -> list[Publication]:
    """The live metrics of each engine in a metrics page, by engine. Other metrics are left out.

    Raises:
        SpecmoeError: The text is not in Prometheus' format.
        ModuleNotFoundError: `prometheus_client` is not installed.
    """
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[tuple[str, str], Samples] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                metric = _BY_EXPOSED_NAME.get(sample.name)
                if metric is not None:
                    model, engine = (sample.labels.get(name, "") for name in COMMON_LABELS)
                    labels = [sample.labels.get(name, "") for name in metric.labels]
                    found.setdefault((model, engine), Samples()).add(metric, sample.value, *labels)
    except (ValueError, KeyError, IndexError) as error:
        raise SpecmoeError(f"not a metrics page in Prometheus' text format: {error}") from error
    return [Publication(model, engine, samples) for (model, engine), samples in sorted(found.items())]
