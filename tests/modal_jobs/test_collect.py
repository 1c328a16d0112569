"""`modal run modal_jobs/collect.py` with vLLM in its containers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import warm
from support.offline_modal import OfflineModal, needs_modal

from profiler.engines.vllm import is_installed
from profiler.trace.reader import Trace

pytestmark = [pytest.mark.modal, needs_modal, pytest.mark.skipif(not is_installed(), reason="vLLM is not installed")]

PROBLEMS, NEW_TOKENS = 40, 96


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems in the form of GSM8K's, of different lengths."""
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    names = ("Ann", "Bo", "Cy", "Dee", "Eve")
    lines = [
        {"question": f"{names[n % 5]} has {n} apples and buys {n * 7 % 31} more. " * (1 + n % 4) + "How many are there?"}
        for n in range(PROBLEMS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# vLLM's engine in the process that starts it, which imports vLLM once instead of three times.
IN_ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
SERVER: dict[str, Any] = {"environment": IN_ONE_PROCESS}


@pytest.fixture(scope="module")
def local(questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """The same problems, collected in one run on this machine."""
    out = tmp_path_factory.mktemp("local") / "trace"
    command = ["collect", "--model", "demo", "--dataset", "gsm8k", "--data-files", str(questions)]
    command += ["--num-problems", str(PROBLEMS), "--max-new-tokens", str(NEW_TOKENS), "--dtype", "float32", "--out", str(out)]
    assert warm.run("specmoe", *command, environment=IN_ONE_PROCESS).returncode == 0
    return Trace.open(out)


def arguments(questions: Path, out: Path) -> list[str]:
    # float32: a token's experts must not depend on the other tokens of its batch.
    return [
        *("run", "modal_jobs/collect.py", "--dataset", "gsm8k", "--data-files", str(questions), "--model", "demo"),
        *("--num-problems", str(PROBLEMS), "--max-new-tokens", str(NEW_TOKENS), "--dtype", "float32"),
        *("--containers", "2", "--out", str(out)),
    ]


def equal(trace: Trace, other: Trace) -> bool:
    return (
        trace.to_arrow().equals(other.to_arrow())
        and trace.tokens.equals(other.tokens)
        and trace.problems.equals(other.problems)
        and trace.metadata.sampling == other.metadata.sampling
        and trace.metadata.datasets == other.metadata.datasets
        and trace.metadata.versions == other.metadata.versions
    )


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> OfflineModal:
    return OfflineModal(tmp_path_factory.mktemp("modal") / "account")


def test_two_containers_of_which_one_is_preempted_make_the_trace_of_one_machine(
    questions: Path, local: Trace, account: OfflineModal, tmp_path: Path
) -> None:
    # Without preemption it is the same with less: tests/modal_jobs/test_resuming.py has that.
    done = account.run(*arguments(questions, tmp_path / "trace"), preempt={1}, preempt_after=0.3, **SERVER)
    assert done.returncode == 0, done.stdout + done.stderr
    trace = Trace.open(tmp_path / "trace")
    assert trace.faults(verify=True) == []
    assert equal(trace, local)
    # The preempted input was done again, in another container.
    given = [event for event in account.events("input") if event.function == "Collector.*" and event.input == 1]
    assert len({event.container for event in given}) == 2
    assert {event.input for event in account.events("preempt")} == {1}
    assert trace.metadata.capture["devices"] == {"CPU": 2}
    for shard in (1, 2):
        assert f"shard {shard} of 2: 20 of 20 problems" in done.stdout
    assert "0 shards left" in done.stdout
    assert "40 problems" in done.stdout
    assert "complete" in done.stdout
    assert not (tmp_path / "trace.shards").exists()


def test_a_shard_that_is_missing_is_the_only_one_computed_again(
    questions: Path, local: Trace, account: OfflineModal, tmp_path: Path
) -> None:
    run = next(path for path in account.volume("specmoe-traces").iterdir() if path.name.startswith("demo-"))
    for manifest in (run / "shard-00001").glob("*/manifest.json"):
        manifest.unlink()
    done = account.run(*arguments(questions, tmp_path / "trace"), **SERVER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 2 shards are finished" in done.stdout
    written = [name for event in account.events("volume_commit") for name in event.files]
    assert {name.split("/")[1] for name in written if name.startswith("demo-")} == {"shard-00001"}
    assert equal(Trace.open(tmp_path / "trace"), local)
