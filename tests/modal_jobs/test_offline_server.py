"""The offline server that the other Modal tests use: what it refuses, keeps apart and cleans up, with apps of a few lines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from support.offline_modal import ROOT, OfflineModal, needs_modal

pytestmark = needs_modal

APP = """
import importlib.util, os, pathlib, time
import modal

app = modal.App("tried")
volume = modal.Volume.from_name("kept", create_if_missing=True)
"""


@pytest.fixture
def account(tmp_path: Path) -> OfflineModal:
    return OfflineModal(tmp_path / "account", modules=())


def app(folder: Path, text: str) -> str:
    (folder / "app.py").write_text(APP + text)
    return str(folder / "app.py")


def test_volumes_keep_what_was_committed_and_refuse_to_reload_with_open_files(account: OfflineModal, tmp_path: Path) -> None:
    text = """
root = pathlib.Path("/kept")

@app.function(volumes={"/kept": volume})
def write():
    (root / "folder").mkdir()
    (root / "folder" / "committed").write_text("1")
    volume.commit()
    (root / "folder" / "dropped").write_text("2")
    with (root / "folder" / "committed").open() as file:
        try:
            volume.reload()
        except RuntimeError as error:
            print("refused:", error)
    os._exit(3)

@app.function(volumes={"/kept": volume})
def read():
    (root / "folder" / "committed").unlink()
    (root / "late").write_text("at the end")
    return sorted(path.name for path in root.rglob("*"))

@app.local_entrypoint()
def main():
    try:
        write.remote()
    except Exception as error:
        print("failed:", error)
    print("found:", read.remote())
"""
    done = account.run("run", app(tmp_path, text))
    assert done.returncode == 0, done.stderr
    assert "refused: there are open files preventing the operation: folder/committed" in done.stdout
    assert "failed: Runner terminated (exit code 3)" in done.stdout
    assert "found: ['folder', 'late']" in done.stdout
    assert [(event.function, event.files) for event in account.events("volume_commit")] == [
        ("write", ("folder/committed",)),
        ("read", ("folder/committed", "late")),
    ]
    assert sorted(path.name for path in account.volume("kept").rglob("*")) == ["folder", "late"]


def test_a_container_sees_what_was_uploaded_and_has_a_tmp_of_its_own(account: OfflineModal, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "mine.py").write_text("WORD = 'uploaded'")
    text = f"""
image = modal.Image.debian_slim(python_version="3.12").add_local_dir({str(tmp_path / "package")!r}, "/opt/mine", copy=True)
image = image.run_commands("python -m pip install '/opt/mine[all]'").env({{"WORD": "from the image"}})

@app.function(image=image)
def look(number):
    import mine
    print(mine.__file__, mine.WORD, os.environ["WORD"], importlib.util.find_spec("profiler"))
    pathlib.Path("/tmp/mine").touch()
    time.sleep(0.2)
    found = [name for name in os.listdir("/root") if name[0] not in "._"]
    return found, sorted(os.listdir("/tmp")), os.path.exists({str(tmp_path)!r}), "HOSTS" in os.environ

@app.local_entrypoint()
def main():
    print(look.remote(0))
"""
    account.environment["HOSTS"] = "1"
    done = account.run("run", app(tmp_path, text))
    assert done.returncode == 0, done.stderr
    assert "/opt/mine/mine.py uploaded from the image None" in done.stdout
    assert "['app.py'" in done.stdout
    # Only the interpreter's own folder may be there too, where it lies below /tmp.
    kept = {part for folder in (sys.prefix, sys.base_prefix) for part in Path(folder).parts[2:3] if folder.startswith("/tmp/")}
    assert f"{sorted({'mine', *kept})}, False, False)" in done.stdout


def test_a_preempted_input_is_done_in_another_container(account: OfflineModal, tmp_path: Path) -> None:
    text = """
@app.function(max_containers=2)
def work(number):
    time.sleep(1.0)
    return number * number

@app.local_entrypoint()
def main():
    print(list(work.map(range(3))))
"""
    done = account.run("run", app(tmp_path, text), preempt={1}, preempt_after=0.2)
    assert done.returncode == 0, done.stderr
    assert "[0, 1, 4]" in done.stdout
    assert [event.input for event in account.events("preempt")] == [1]
    delivered = [event.container for event in account.events("input") if event.input == 1]
    assert len(set(delivered)) == 2


def test_what_is_not_implemented_fails_by_name(account: OfflineModal, tmp_path: Path) -> None:
    done = account.run("queue", "create", "mine")
    assert done.returncode != 0
    assert "QueueGetOrCreate is not a part of the offline server" in done.stdout + done.stderr


def test_the_server_answers_its_own_commands_only(account: OfflineModal) -> None:
    command = [sys.executable, "-m", "modal", "volume", "create", "theirs"]
    done = account.command("env", "MODAL_TOKEN_SECRET=as-wrong", *command)
    assert done.returncode != 0
    assert "Token missing or wrong" in done.stdout + done.stderr
    assert not account.volume("theirs").exists()


def test_nothing_runs_on_or_is_left_when_a_command_ends(
    account: OfflineModal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A short path, since a socket is in it, and its own, since other tests run servers at the same time.
    short = tempfile.mkdtemp()
    monkeypatch.setattr(tempfile, "tempdir", short)
    text = """
@app.function()
def forever():
    import subprocess
    print("pids", os.getpid(), subprocess.Popen(["sleep", "600"]).pid, flush=True)
    time.sleep(600)

@app.local_entrypoint()
def main():
    forever.remote()
"""
    script = (
        f"{sys.executable} -m modal run --detach {app(tmp_path, text)} > {tmp_path}/log 2>&1 & client=$!\n"
        f"until grep -q pids {tmp_path}/log; do sleep 0.1; done\nkill -9 $client\n"
    )
    done = account.command("bash", "-c", script, timeout=120)
    assert done.returncode == 0, done.stderr
    line = next(line for line in (tmp_path / "log").read_text().splitlines() if "pids" in line)
    assert [pid for pid in line.split()[-2:] if Path(f"/proc/{pid}/cmdline").exists() and is_running(int(pid))] == []
    # Fails unless it is empty.
    Path(short).rmdir()


def is_running(pid: int) -> bool:
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def test_containers_die_with_the_process_that_tests(tmp_path: Path) -> None:
    text = """
@app.function()
def forever():
    print("pid", os.getpid(), flush=True)
    time.sleep(600)

@app.local_entrypoint()
def main():
    forever.remote()
"""
    script = (
        "from pathlib import Path; from support.offline_modal import OfflineModal\n"
        f"OfflineModal(Path({str(tmp_path / 'account')!r}), modules=()).command('bash', '-c', "
        f"'exec {sys.executable} -m modal run {app(tmp_path, text)} > {tmp_path}/log 2>&1')\n"
    )
    tests = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}", "TMPDIR": str(tmp_path)},
        start_new_session=True,
    )
    deadline = time.monotonic() + 100
    while not (tmp_path / "log").exists() or "pid " not in (tmp_path / "log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    pid = int((tmp_path / "log").read_text().split("pid ")[1].split()[0])
    assert is_running(pid)
    os.killpg(tests.pid, signal.SIGKILL)
    tests.wait()
    while Path(f"/proc/{pid}").exists() and is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
