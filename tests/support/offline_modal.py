"""Run `modal` commands against an offline stand-in for Modal's servers: the real command line, the real container code, and
functions in processes of their own, with this environment's packages. Without that stand-in these tests are skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVER = Path(os.environ.get("FAKEMODAL", ROOT.parent / "shared" / "tools" / "fakemodal.py"))

needs_modal = pytest.mark.skipif(
    not SERVER.is_file() or importlib.util.find_spec("modal") is None,
    reason=f"no offline stand-in for Modal at {SERVER} ($FAKEMODAL), or modal is not installed",
)


@dataclass
class OfflineModal:
    """An account with its Volumes in the folder `state`."""

    state: Path
    settings: dict[str, str] = field(default_factory=dict)

    def run(self, *arguments: str, timeout: float = 400, **settings: str) -> subprocess.CompletedProcess[str]:
        """`modal ARGUMENTS` to its end. settings: of the stand-in, such as FAKEMODAL_PREEMPT."""
        return self.command("modal", *arguments, timeout=timeout, **settings)

    def command(self, *command: str, timeout: float = 400, **settings: str) -> subprocess.CompletedProcess[str]:
        """Any command that finds the account in its environment. Containers live until it ends."""
        self.state.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "FAKEMODAL_PYTHON": sys.executable,
            "FAKEMODAL_REPORT": str(self.state / "report.json"),
            "PYTHONPATH": "",
            "COLUMNS": "200",
            **self.settings,
            **settings,
        }
        whole = [sys.executable, str(SERVER), "--state", str(self.state / "server"), "--", *command]
        return subprocess.run(whole, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=timeout)

    def events(self, kind: str) -> list[list[object]]:
        """What happened in the last command: container_start, input, preempt, volume_commit, ..."""
        report = json.loads((self.state / "report.json").read_text())
        return [event for event in report["events"] if event[0] == kind]

    def volume(self, name: str) -> Path:
        """The committed files of a Volume."""
        volumes = json.loads((self.state / "server" / "volumes.json").read_text())
        return self.state / "server" / "volumes" / next(key for key, value in volumes.items() if value["name"] == name)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a user sees last of a command that failed."""
    lines = [
        line for line in done.stderr.splitlines() if line.startswith(("analyze:", "collect:", "train:", "quantize:", "Error:"))
    ]
    return lines[-1] if lines else done.stderr
