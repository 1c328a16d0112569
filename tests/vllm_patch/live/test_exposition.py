"""Metrics on a page: names, labels and values are those that were published, with one API server or several."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from profiler.live.metrics import COMMON_LABELS, METRICS, PREFIX, Samples
from profiler.live.publication import Publisher
from profiler.live.scrape import parse
from vllm_patch.live.exposition import LiveCollector, serve_metrics


def publish_everything(folder: Path) -> list[Samples]:
    """Two engines that publish a value of every metric, with awkward texts for labels."""
    found = []
    for number in range(2):
        samples = Samples()
        for place, metric in enumerate(METRICS):
            labels = [f'{name} "{place}"\\\n' if name == "predictor" else str(place) for name in metric.labels]
            samples.add(metric, number + place / 4, *labels)
        Publisher.of_engine(folder, "a model").publish(samples)
        found.append(samples)
    return found


def test_a_page_has_what_was_published(tmp_path: Path) -> None:
    published = publish_everything(tmp_path)
    registry = CollectorRegistry()
    registry.register(LiveCollector(tmp_path))
    text = generate_latest(registry).decode()
    assert [(each.model, each.engine, each.samples) for each in parse(text)] == [
        ("a model", str(number), samples) for number, samples in enumerate(published)
    ]
    # Each family once, although two engines publish it.
    assert text.count("# HELP specmoe_tokens_total") == text.count("# TYPE specmoe_tokens_total counter") == 1


def test_names_and_labels_are_valid_and_described() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert metric.name.startswith(PREFIX)
        assert not metric.name.endswith("_total")
        assert metric.about
        for name in (metric.name, *metric.labels):
            assert name.replace("_", "").isalnum()
            assert name.islower()
        assert not set(metric.labels) & set(COMMON_LABELS)


PROGRAM = """
import sys
from pathlib import Path
from prometheus_client import CollectorRegistry, REGISTRY, generate_latest, multiprocess
from vllm_patch.live.exposition import expose

expose(Path(sys.argv[1]))
expose(Path(sys.argv[1]))
registry = REGISTRY
if len(sys.argv) > 2:
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=sys.argv[2])
sys.stdout.buffer.write(generate_latest(registry))
"""


@pytest.mark.parametrize("servers", [1, 2])
def test_vllms_registries_have_the_metrics(tmp_path: Path, servers: int) -> None:
    """vLLM serves the default registry or, with several API servers, one of a `MultiProcessCollector`."""
    published = publish_everything(tmp_path / "live")
    (tmp_path / "shared").mkdir()
    shared = [str(tmp_path / "shared")] if servers > 1 else []
    environment = os.environ | ({"PROMETHEUS_MULTIPROC_DIR": shared[0]} if shared else {})
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "live"), *shared]
    text = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert [each.samples for each in parse(text)] == published
    assert text.count("# TYPE specmoe_tokens_total") == 1


def test_a_port_of_our_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import socket

    published = publish_everything(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve_metrics(tmp_path, "127.0.0.1", port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        assert [each.samples for each in parse(answer.read().decode())] == published
    serve_metrics(tmp_path, "127.0.0.1", port)
    assert f"live metrics are not served on 127.0.0.1:{port}" in caplog.text


def test_an_idle_folder_has_no_metrics(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    registry.register(LiveCollector(tmp_path / "absent"))
    assert generate_latest(registry) == b""
