"""The browser, and a report with everything that a report can show."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, sync_playwright
from support.browser import FLAGS, PROGRAMS, Opened
from support.traces import write_synthetic_trace

from analysis.analyze import analyze_trace
from analysis.documents.simulation import SimulatedDevice, SimulatedRow, Simulation
from analysis.documents.token_results import CachedProblem, SimulatedSample
from profiler.trace.splits import problem_digests
from speculation.data.tasks import Task
from speculation.evaluation.evaluate import evaluate
from speculation.training.fit import train

EVIL = "<img src=x onerror='window.hacked=1'></script><script>window.hacked=1</script>"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        if "SPECMOE_NEED_BROWSER" in os.environ:
            pytest.fail("no Chromium, and SPECMOE_NEED_BROWSER is set")
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Routing with a dependency between layers, and a token that one expert prefers; with an evaluation and a simulation."""
    folder = tmp_path_factory.mktemp("report")
    random = np.random.default_rng(0)
    problems, vocab = [], []
    for _ in range(10):
        ids = random.random((60, 5, 8)).argsort(-1)[:, :, :2]
        for layer in range(1, 5):
            follows = random.random(60) < 0.6
            ids[follows, layer] = (ids[follows, layer - 1] + layer) % 8
        tokens = random.integers(0, 6, 61)
        ids[tokens[:60] == 4, 2] = [7, 1]
        problems.append((ids, np.tile([0.75, 0.25], (60, 5, 1))))
        vocab.append(tokens)
    trace = write_synthetic_trace(
        folder / "trace",
        problems,
        8,
        model_id=EVIL,
        # The first MoE layer is the second of the decoder.
        first_layer=1,
        datasets=[(EVIL, "math", "code")[number % 3] for number in range(10)],
        vocab_ids=vocab,
    )
    run = train(trace, "popularity", folder / "run", task=Task.NEXT_LAYER)
    evaluation = evaluate(run, trace, part="all", with_baselines=False, with_sample=True)
    row = SimulatedRow(
        device=None, capacity=4, share=0.5, gigabytes=None, policy="lru", prefetch="none", hit_rate=0.5, tokens_per_second=None,
        times_on_demand=None,
    )  # fmt: skip
    # All of the first token's experts are hits at the first layer, and the second one's late and demand-loaded.
    outcomes_TLK = np.ones((60, 5, 2), dtype=int)
    outcomes_TLK[1, 0] = [2, 3]
    cached = [CachedProblem.of(problem_digests(trace)[0], np.arange(60), outcomes_TLK)]
    sample = SimulatedSample(device=None, capacity=4, share=0.5, policy=EVIL, prefetch=EVIL, problems=cached)
    devices = [SimulatedDevice(name=None, assumptions=[])]
    simulation = Simulation(trace="t", model="m", devices=devices, notes=[EVIL], best=[], rows=[row], sample=sample)
    analyze_trace(trace, folder / "out", hops=3, evaluations=[evaluation], simulations=[simulation])
    return folder / "out"


@pytest.fixture(scope="module")
def view(browser: Browser, report: Path) -> Iterator[Opened]:
    """The report, loaded once for the tests of a file."""
    opened = Opened(browser, report / "report.html")
    opened.page.wait_for_function("window.answers && window.answers.cells.problem")
    yield opened
    assert opened.complaints == []
    opened.page.close()
