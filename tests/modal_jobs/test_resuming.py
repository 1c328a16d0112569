"""What happens to a job on Modal when something goes wrong; with the transformers engine, which starts faster."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.offline_modal import OfflineModal, last_line, needs_modal
from typer.testing import CliRunner

from profiler.trace.reader import Trace
from specmoe import app

pytestmark = [pytest.mark.modal, needs_modal]

COLLECT = ["run", "modal_jobs/collect.py", "--model", "demo", "--engine", "transformers", "--dtype", "float32"]
JOB = [*COLLECT, "--dataset", "demo-math,demo-code", "--num-problems", "8", "--max-new-tokens", "4", "--shard-size", "3"]


def planned_run() -> str:
    """The run's id, as `specmoe plan` says it before anything runs."""
    plan = CliRunner().invoke(app, ["plan", "--json", *JOB[2:]])
    return str(json.loads(plan.stdout)["run_id"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[OfflineModal, Path, str]:
    """An account with a run of three shards, one of which failed at first; the trace; and the run's id."""
    folder = tmp_path_factory.mktemp("modal")
    account = OfflineModal(folder / "account")
    run_id = planned_run()
    # Something in the way of the second shard's folder.
    (folder / "obstacle").write_text("in the way")
    assert account.run("volume", "create", "specmoe-traces").returncode == 0
    put = account.run("volume", "put", "specmoe-traces", str(folder / "obstacle"), f"/{run_id}/shard-00001")
    assert put.returncode == 0, put.stderr

    done = account.run(*JOB, "--out", str(folder / "trace"))
    assert done.returncode == 1
    assert f"shard 2 of 3 failed: /traces/{run_id}/shard-00001 is a file, not a folder" in done.stdout
    assert last_line(done) == "collect: 1 of 3 shards failed: run again to resume; finished ones are kept"
    assert not (folder / "trace").exists()
    early = account.run("run", "modal_jobs/collect.py::download", "--run-id", run_id, "--out", str(folder / "early"))
    assert early.returncode == 1
    assert f"2 of 3 shards of {run_id} are finished: run the same collection again to resume" in last_line(early)

    (account.volume("specmoe-traces") / run_id / "shard-00001").unlink()
    again = account.run(*JOB, "--out", str(folder / "trace"), "--containers", "2")
    assert again.returncode == 0, again.stderr
    assert "2 of 3 shards are finished" in again.stdout
    committed = [name for event in account.events("volume_commit") for name in event.files]
    assert {name.split("/")[1] for name in committed if name.startswith(run_id)} == {"shard-00001"}
    return account, folder / "trace", run_id


def test_only_the_failed_shard_is_computed_again(finished: tuple[OfflineModal, Path, str]) -> None:
    trace = Trace.open(finished[1])
    assert trace.faults(verify=True) == []
    assert trace.problems.column("problem_id").to_pylist() == list(range(8))
    assert trace.problems.column("dataset").to_pylist() == ["demo-math"] * 4 + ["demo-code"] * 4
    assert trace.metadata.capture["run_id"] == finished[2]


def test_a_run_that_is_finished_computes_nothing(finished: tuple[OfflineModal, Path, str], tmp_path: Path) -> None:
    account, trace, _ = finished
    done = account.run(*JOB, "--out", str(tmp_path / "trace"))
    assert done.returncode == 0, done.stderr
    assert [event for event in account.events("container_start") if event.function != "orchestrate"] == []
    assert Trace.open(tmp_path / "trace").to_arrow().equals(Trace.open(trace).to_arrow())


def test_a_run_is_downloaded_later(finished: tuple[OfflineModal, Path, str], tmp_path: Path) -> None:
    account, trace, run_id = finished
    done = account.run("run", "modal_jobs/collect.py::download", "--run-id", run_id, "--out", str(tmp_path / "trace"))
    assert done.returncode == 0, done.stderr
    other = account.run("run", "modal_jobs/collect.py::download", "--run-id", "none")
    assert other.returncode == 1
    assert "collect: no run none on the Volume" in last_line(other)
    fetched = Trace.open(tmp_path / "trace")
    assert fetched.faults(verify=True) == []
    assert fetched.to_arrow().equals(Trace.open(trace).to_arrow())


def test_a_corrupted_block_is_caught(finished: tuple[OfflineModal, Path, str], tmp_path: Path) -> None:
    account, _, run_id = finished
    damaged = OfflineModal(tmp_path / "account")
    shutil.copytree(account.state, damaged.state)
    routing = next((damaged.volume("specmoe-traces") / run_id / "shard-00001").glob("*/routing/part-00000.parquet"))
    content = bytearray(routing.read_bytes())
    content[len(content) // 2] ^= 1
    routing.write_bytes(content)
    done = damaged.run("run", "modal_jobs/collect.py::download", "--run-id", run_id, "--out", str(tmp_path / "trace"))
    assert done.returncode == 1
    assert "routing/part-00000.parquet: its SHA-256 does not match the manifest, twice" in last_line(done)
    assert "modal volume rm" in last_line(done)
    assert not (tmp_path / "trace").exists()


def test_preempted_shards_are_collected_elsewhere(finished: tuple[OfflineModal, Path, str], tmp_path: Path) -> None:
    account = OfflineModal(tmp_path / "account")
    job = [*JOB, "--containers", "3", "--out", str(tmp_path / "trace")]
    done = account.run(*job, preempt={1, 2}, preempt_after=0.1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {event.input for event in account.events("preempt")} == {1, 2}
    trace, other = Trace.open(tmp_path / "trace"), Trace.open(finished[1])
    assert trace.faults(verify=True) == []
    assert trace.to_arrow().equals(other.to_arrow())
    assert trace.tokens.equals(other.tokens)
    assert trace.problems.equals(other.problems)


def test_a_detached_run_outlives_its_client(tmp_path: Path) -> None:
    account = OfflineModal(tmp_path / "account")
    run_id = planned_run()
    on_volume = account.volume("specmoe-traces") / run_id
    # The client is killed as soon as the first container works; from then on, progress shows only on the Volume.
    script = tmp_path / "detach.sh"
    script.write_text(
        f"modal run --detach {' '.join(JOB[1:])} --out {tmp_path / 'never'} > {tmp_path / 'log'} 2>&1 &\n"
        "client=$!\n"
        f"until grep -q 'starting transformers' {tmp_path / 'log'}; do sleep 0.2; done\n"
        "kill -9 $client\n"
        f"until [ $(find {on_volume} -name manifest.json | wc -l) = 3 ]; do sleep 0.2; done\n"
        f"[ $(modal volume ls specmoe-traces {run_id} --json | grep -c shard-) = 3 ] || exit 1\n"
        f"modal run modal_jobs/collect.py::download --run-id {run_id} --out {tmp_path / 'trace'}\n"
    )
    done = account.command("bash", str(script))
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "never").exists()
    assert Trace.open(tmp_path / "trace").problems.num_rows == 8


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ([*COLLECT, "--dataset", "gsm9k"], "collect: unknown dataset 'gsm9k': expected one of humaneval"),
        ([*COLLECT, "--dataset", "demo-math", "--gpu", "A101"], "collect: unknown GPU 'A101': expected one of L4"),
        (
            ["run", "modal_jobs/collect.py", "--dataset", "demo-math", "--model", "mixtral-8x7b", "--gpu", "L4"],
            "collect: mixtral-8x7b does not fit on L4 with 24 GB: its weights take 93 GB in bf16, 25 GB in awq; choose one of",
        ),
        (
            [*("run", "modal_jobs/collect.py", "--dataset", "demo-math", "--gpu", "H200"), "--precision", "bf16"],
            "collect: no Modal secret 'huggingface-secret' with HF_TOKEN, which mistralai/Mixtral-8x7B-v0.1 needs",
        ),
        ([*COLLECT, "--dataset", "demo-math", "--num-problems", "0"], "collect: num_problems 0: expected 1 or more"),
        ([*COLLECT, "--dataset", "demo-math", "--containers", "1000"], "collect: containers 1000: expected 1 to 100"),
        (
            ["run", "modal_jobs/collect.py::download", "--run-id", "none", "--volume", "absent"],
            "collect: Volume 'absent' not found",
        ),
    ],
)
def test_wrong_arguments_are_one_clear_line(command: list[str], text: str, tmp_path: Path) -> None:
    done = OfflineModal(tmp_path / "account").run(*command)
    assert done.returncode == 1
    assert text in last_line(done)
    assert "Traceback" not in done.stdout + done.stderr
