"""`specmoe plan` takes what `modal run modal_jobs/collect.py` takes, and both take all that is defined."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

from support.offline_modal import ROOT, needs_modal

from profiler.collect.options import LocalOptions, RentedJobOptions, RentedOptions, RunOptions
from profiler.terminal_options import plain_signature


def names(options: type) -> set[str]:
    return {field.name for field in dataclasses.fields(options)}


def test_one_schema_for_all_three_command_lines() -> None:
    assert names(RunOptions) < names(LocalOptions) & names(RentedOptions)
    assert names(RentedJobOptions) - names(RentedOptions) == {"out"}
    signature, annotations = plain_signature(RentedJobOptions)
    assert set(signature.parameters) == set(annotations) == names(RentedJobOptions)
    assert (annotations["engine"], annotations["data_files"], annotations["num_problems"]) == (str, str | None, int)
    assert all(field.metadata["help"] for field in dataclasses.fields(RentedJobOptions))


@needs_modal
def test_modal_shows_every_option() -> None:
    command = [sys.executable, "-m", "modal", "run", "modal_jobs/collect.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    shown = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 0, shown
    for name in names(RentedJobOptions):
        assert "--" + name.replace("_", "-") in shown
