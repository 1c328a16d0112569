"""A real server under load: its `/metrics` has what the analysis, an evaluation and a simulation of its own trace find."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import warm
from support.traces import write_synthetic_trace

from analysis.statistics.compute import Statistics, compute_statistics
from profiler.engines.vllm import is_installed
from profiler.live.metrics import (
    BUSIEST,
    CAPTURE_ROWS,
    CAPTURE_WAITS,
    COUNTING,
    DRIFT,
    DROPPED,
    ENTROPY,
    EXPERT_TOKENS,
    HIT_RATE,
    LAYER_RECALL,
    MAX_OVER_MEAN,
    MIXED,
    MOST_STEP_EXPERTS,
    RECALL,
    REFERENCE,
    REPEATED,
    SAMPLED,
    SCORED,
    SCORED_REQUESTS,
    SHARE,
    STEP_EXPERTS,
    TOKENS,
    TOTAL,
    WINDOW,
    WINDOW_TOKENS,
    Samples,
)
from profiler.live.scrape import parse
from profiler.models.resolve import demo_model_folder
from profiler.trace.reader import Trace
from speculation.evaluation.evaluate import evaluate
from speculation.offload.studies.simulation_options import SimulationStudy
from speculation.offload.studies.simulation_study import run_study
from speculation.training.fit import train
from speculation.training.runs import Run, load_run

pytestmark = [pytest.mark.engine, pytest.mark.skipif(not is_installed(), reason="vLLM is not installed")]

REQUESTS = 8
PREDICTOR = "conditional-counts"


def wait_for(what: Callable[[], Any], seconds: float = 90.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def post(port: int, body: dict[str, Any]) -> None:
    address, headers = f"http://127.0.0.1:{port}/v1/completions", {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(address, json.dumps(body).encode(), headers), timeout=120).close()


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text: str = answer.read().decode()
        return text


def is_healthy(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
    except (urllib.error.URLError, ConnectionError):
        return False
    return True


@dataclass(frozen=True)
class Served:
    """The last metrics page of a server, its port's page, the trace of the same requests, and the run that was scored."""

    page: str
    own_page: str
    trace: Trace
    run: Run

    @property
    def samples(self) -> Samples:
        (publication,) = parse(self.page)
        assert (publication.model, publication.engine) == ("demo", "0")
        return publication.samples


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """One server: recording, counting, and scoring every request. Prompts of many lengths; half of them at the same time."""
    folder = tmp_path_factory.mktemp("live")
    random = np.random.default_rng(0)
    problems = [(random.random((20, 8, 8)).argsort(-1)[:, :, :2], np.tile([0.7, 0.3], (20, 8, 1))) for _ in range(30)]
    trained = train(write_synthetic_trace(folder / "training", problems, 8), PREDICTOR, folder / "run")
    (folder / "run" / "evaluation.json").write_text(evaluate(trained, Trace.open(folder / "training")).to_json())
    port, own_port = (free_port() for _ in range(2))
    environment = {
        "SPECMOE_CAPTURE": "1",
        "SPECMOE_CAPTURE_OUT": str(folder / "served"),
        "SPECMOE_LIVE": "1",
        "SPECMOE_LIVE_EXPERTS": "1",
        "SPECMOE_LIVE_PORT": str(own_port),
        "SPECMOE_SHADOW": str(folder / "run"),
        "SPECMOE_SHADOW_SHARE": "1",
        "SPECMOE_SHADOW_CPU": "1",
        "SPECMOE_SHADOW_SLOTS": "2,4",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        # Not the test's folder: vLLM's sockets are there, and a socket's path may have 107 characters.
        "TMPDIR": (temporary := tempfile.mkdtemp()),
    }
    command = ["--model", str(demo_model_folder()), "--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--no-enable-prefix-caching"]
    server = warm.start(
        "vllm.entrypoints.openai.api_server", *command, environment=environment, log=folder / "log", warm_children=True
    )

    def scored() -> str:
        assert server.runs, (folder / "log").read_text()[-3000:]
        page = scrape(port)
        values = {name: found for each in parse(page) for name, found in each.samples.values.items()}
        done = values.get(SCORED_REQUESTS.name, {}).get((), 0) == REQUESTS and HIT_RATE.name in values
        # What is counted is published about once a second.
        return page if done and values[TOKENS.name][()] == values[SCORED.name][()] else ""

    try:
        wait_for(lambda: is_healthy(port) or not server.runs, 120)
        # Requests end in the order of their numbers, so that the caches are played in that of the trace.
        bodies = [
            {
                "model": "demo",
                "prompt": "A train leaves the station. " * (1 + number % 3),
                "max_tokens": 12 + 8 * number,
                "temperature": 0,
                "ignore_eos": True,
                "vllm_xargs": {"problem_id": number},
            }
            for number in range(REQUESTS)
        ]
        for body in bodies[: REQUESTS // 2]:
            post(port, body)
        with ThreadPoolExecutor(REQUESTS) as clients:
            list(clients.map(lambda body: post(port, body), bodies[REQUESTS // 2 :]))
        page = wait_for(scored)
        # Once more after that, when the caches were played on all requests.
        time.sleep(6)
        page, own_page = scrape(port), scrape(own_port)
        os.kill(server.pid, signal.SIGTERM)
        server.wait(60)
    finally:
        if server.runs:
            os.killpg(server.pid, signal.SIGKILL)
    wait_for((folder / "served" / "trace-00000" / "manifest.json").exists, 60)
    left = sorted(Path(temporary).glob("specmoe-live-*"))
    shutil.rmtree(temporary)
    assert left == []
    return Served(page, own_page, Trace.open(folder / "served" / "trace-00000"), load_run(folder / "run"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def statistics(served: Served) -> Statistics:
    return compute_statistics(served.trace, hops=1)


def test_counters_equal_the_analysis_of_the_trace(served: Served, statistics: Statistics) -> None:
    samples, load = served.samples, statistics.loads["all", "all"]
    assert samples.get(TOKENS) == load.tokens == statistics.tokens
    for number, layer in enumerate(served.trace.metadata.model.moe_layers):
        assert [samples.get(EXPERT_TOKENS, layer, expert) for expert in range(8)] == load.counts_LE[number].tolist()
        assert samples.get(ENTROPY, layer, TOTAL) == pytest.approx(load.entropy_share[number])
        assert samples.get(MAX_OVER_MEAN, layer, TOTAL) == pytest.approx(load.max_over_mean[number])
        assert samples.get(BUSIEST, layer, TOTAL) == pytest.approx(load.share_LE[number].max())
        assert samples.get(REPEATED, layer, TOTAL) == pytest.approx(statistics.repetitions[0].shared[0, number])
        # Prompts of several tokens need more experts than one token does, and no step more than there are.
        assert 2 < samples.get(STEP_EXPERTS, layer, MIXED, TOTAL) <= samples.get(MOST_STEP_EXPERTS, layer, MIXED, TOTAL) <= 8
    assert (samples.get(DROPPED), samples.get(COUNTING), samples.get(CAPTURE_WAITS)) == (0, 1, 0)
    assert samples.get(CAPTURE_ROWS) == 8 * statistics.tokens
    assert 0 < samples.get(WINDOW_TOKENS) <= samples.get(TOKENS)


def test_recall_equals_the_evaluation_on_the_trace(served: Served) -> None:
    samples, expected = served.samples, evaluate(served.run, served.trace, part="all")
    for name in ("popularity", "previous-token", PREDICTOR):
        result = expected.results[name]
        recall = result.metrics["h=1"]["recall@2"]
        assert samples.get(RECALL, name, 1, TOTAL) == samples.get(RECALL, name, 1, WINDOW) == pytest.approx(recall, abs=1e-12)
        assert samples.get(DRIFT, name, 1) == pytest.approx(recall - samples.get(REFERENCE, name, 1))
        for number, metrics in enumerate(result.by_target_layer["h=1"]):
            if metrics is not None:
                assert samples.get(LAYER_RECALL, name, number) == pytest.approx(metrics["recall@2"], abs=1e-12)
    assert samples.get(SCORED) == len(served.trace.load().problem_ids_T)
    assert samples.get(SHARE) == 1
    assert (samples.get(SAMPLED, "sent"), samples.get(SAMPLED, "dropped")) == (REQUESTS, 0)


def test_hit_rates_equal_the_simulation_of_the_trace(served: Served) -> None:
    policies = ("lru", "ewma", "belady")
    study = SimulationStudy(
        trace=served.trace, part="all", predictors=("none", str(served.run.path)), policies=policies, fractions=(0.25, 0.5)
    )
    rows = [row for row in run_study(study).rows if row.prefetch == "none" and row.policy in policies]
    assert len(rows) == 6
    for row in rows:
        assert served.samples.get(HIT_RATE, row.policy, row.capacity) == pytest.approx(row.hit_rate, abs=1e-9)


def test_both_pages_have_the_same_metrics_and_vllms_own_stay(served: Served) -> None:
    (own,) = parse(served.own_page)
    assert own.samples.values.keys() == served.samples.values.keys()
    assert own.samples.get(TOKENS) == served.samples.get(TOKENS)
    assert 'vllm:prompt_tokens_total{engine="0",model_name="demo"}' in served.page
