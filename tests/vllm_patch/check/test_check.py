"""`python -m vllm_patch check` with real engines: what it prints and writes, and that it finds a wrong recorder."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import warm

from profiler.engines.vllm import is_installed
from profiler.errors import EngineError
from vllm_patch.check import run
from vllm_patch.check.device import DeviceFacts
from vllm_patch.check.jobs import EAGER, FAMILY_NAMES, Job, jobs_for
from vllm_patch.check.results import CheckDocument, JobResult, Verdict, read_check
from vllm_patch.check.run import run_jobs

FAMILIES = Path(__file__).parents[3] / "docs" / "results" / "families.csv"

needs_vllm = pytest.mark.skipif(not is_installed(), reason="vLLM is not installed")


@pytest.mark.engine
@needs_vllm
def test_a_wrong_recorder_is_found(tmp_path: Path) -> None:
    """Also where vLLM's routers get other inputs than in transformers (LFM2-MoE), and where whole rows are misplaced."""
    expected = {
        "mixtral:shifted": "wrong",
        "mixtral:swapped": "wrong",
        "mixtral:unnormalized": "wrong",
        "ernie4_5_moe:none": "exact",
        "lfm2_moe:none": "exact or ties",
        "lfm2_moe:moved": "wrong",
    }
    done = warm.run("support.faulty_recorder", tmp_path, *expected, timeout=500)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    answers = {answer["case"]: answer for answer in found}
    assert answers.keys() == expected.keys(), done.stderr[-3000:]
    for case, verdict in expected.items():
        assert answers[case]["verdict"] in verdict.split(" or "), answers[case]
    assert answers["ernie4_5_moe:none"]["oracle"].endswith("without the correction bias, which vLLM's CPU router ignores")
    assert "ignores this model's correction bias" in answers["ernie4_5_moe:none"]["hook"]
    assert "weights differ" in answers["mixtral:unnormalized"]["detail"]
    for case in ("lfm2_moe:none", "lfm2_moe:moved", "mixtral:shifted", "mixtral:swapped"):
        assert answers[case]["oracle"] == "router on recorded inputs"
    assert answers["lfm2_moe:none"]["input_difference"] > 0.05
    assert "sets differ" in answers["mixtral:shifted"]["detail"]
    assert "sets differ" in answers["mixtral:swapped"]["detail"]
    assert "fit another token" in answers["lfm2_moe:moved"]["detail"]


@pytest.mark.engine
@needs_vllm
def test_the_command_says_what_it_found(tmp_path: Path) -> None:
    """One family, and a model that vLLM cannot load: the first is compared, the second costs nothing but its line."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "mixtral"}')
    found = tmp_path / "check.json"
    command = [sys.executable, "-m", "vllm_patch", "check", "--family", "llama4", "--model", str(broken), "--json", str(found)]
    done = subprocess.run([*command, "--quick", "--budget", "240"], capture_output=True, text=True, timeout=300)
    document = CheckDocument.model_validate_json(found.read_text())
    verdicts = {(Path(job.model).name, job.mode): job.verdict for job in document.jobs}
    assert verdicts["llama4", "eager"] == Verdict.exact
    assert verdicts["broken", "eager"] == Verdict.failed
    # A named model that could not be compared.
    assert done.returncode == 1
    assert "llama4" in done.stdout
    verdicts_line, last_line = done.stdout.strip().splitlines()[-2:]
    assert verdicts_line.startswith(f"{len(document.jobs)} runs on CPU: ")
    covered, missing = last_line.split(". Not covered: ")
    assert covered == "Covered: eager: llama4"
    assert missing.startswith("do not run here: broken; ")
    for never_run in ("speculative decoding", "tensor parallelism", "GPUs"):
        assert never_run in missing
    assert CheckDocument.model_validate_json(document.model_dump_json()) == document


def test_an_unknown_family_is_wrong_usage_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vllm_patch", "check", "--family", "nothing"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "unknown family 'nothing'" in done.stderr


def test_jobs_that_no_time_is_left_for_are_reported(tmp_path: Path) -> None:
    results: list[JobResult] = []
    jobs = [Job(model=name, mode=EAGER) for name in ("mixtral", "olmoe")]
    run_jobs(jobs, tmp_path, 1, time.monotonic() - 1, results.append)
    assert [(result.model, result.verdict) for result in results] == [("mixtral", "skipped"), ("olmoe", "skipped")]


def test_experts_in_4_bits_are_those_of_the_model(tmp_path: Path) -> None:
    """The packed form by a hand-computed case, and the reference near the model before it was quantized."""
    import torch

    from vllm_patch.check.agreement import load_oracle
    from vllm_patch.check.families import awq, make

    # AutoAWQ's order: columns 0, 2, 4, 6, 1, 3, 5, 7 from the lowest four bits to the highest.
    packed = awq._pack(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]))
    assert packed.tolist() == [[int("86427531", 16) - 2**32]]
    assert awq._unpack(packed).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    original = load_oracle(make("mixtral", tmp_path)).state_dict()
    folder = make("mixtral_awq", tmp_path)
    for name, weight in load_oracle(folder).state_dict().items():
        # Half of a step of 15 in a group of 64 numbers whose standard deviation is 0.02, and bfloat16.
        assert (weight - original[name]).abs().max() < (0.01 if ".experts." in name else 0.004)
        assert ".experts." not in name or not (weight == original[name]).all()


def test_a_cut_run_keeps_what_it_has_and_the_most_valuable_steps_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is complete after each step, and measurements begin while nearly half of the budget is left."""
    began = time.monotonic()
    order: list[str] = []
    ends: list[float] = []

    def jobs(jobs: list[Job], folder: Path, workers: int, deadline: float, on_result: Any, *_: object) -> None:
        ends.append(deadline)
        for one in jobs[:2]:
            order.append(one.name)
            on_result(JobResult(model=one.model, mode=one.mode.name, dtype=one.dtype, verdict=Verdict.exact, detail=""))

    def measure(name: str) -> Any:
        def steps(progress: Any, folder: Path, *arguments: object) -> Iterator[str]:
            ends.append(float(str(arguments[-1])))
            for number in (1, 2):
                order.append(f"{name} {number}")
                progress.document.replay.append({"case": f"{name} {number}"})
                yield name
            raise EngineError("stopped")

        return steps

    monkeypatch.setattr(run, "find_device", lambda: DeviceFacts(name="CPU", on_gpu=False, memory=1))
    monkeypatch.setattr(run, "run_jobs", jobs)
    monkeypatch.setattr(run, "_replay", measure("replay"))
    monkeypatch.setattr(run, "_overhead", measure("overhead"))
    file = tmp_path / "check.json"
    check = run.Check(models=("mixtral", "olmoe"), overhead=True, replay=True, budget=100, json_file=file)
    seen = []

    def show(document: CheckDocument, text: str) -> None:
        stored = read_check(file)
        assert stored == document
        seen.append((len(stored.jobs), len(stored.replay)))

    document = run.run_check(check, show)
    assert order == ["mixtral eager", "olmoe eager", "replay 1", "replay 2", "overhead 1", "overhead 2"]
    assert seen == [(0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (2, 2), (2, 3), (2, 4), (2, 4), (2, 4)]
    assert [note.partition(": ")[2] for note in document.notes] == ["stopped", "stopped"]
    assert [end - began for end in ends] == pytest.approx([55, 100, 100], abs=1)


def test_the_families_that_are_named_can_be_made() -> None:
    from vllm_patch.check.families import FAMILIES

    assert set(FAMILY_NAMES) == {*FAMILIES, "deepseek_v1", "mixtral_awq"}
    assert len(set(FAMILY_NAMES)) == len(FAMILY_NAMES)


def test_experts_are_written_as_published_checkpoints_have_them(tmp_path: Path) -> None:
    """vLLM reads Qwen3-VL-MoE's experts only in the published form. transformers must then load the same model."""
    from safetensors.torch import load_file

    from vllm_patch.check.agreement import load_oracle
    from vllm_patch.check.families import make

    folder = make("qwen3_vl_moe", tmp_path)
    stored = load_file(folder / "model.safetensors")
    loaded = load_oracle(folder).state_dict()
    names = [name for name in stored if ".experts." in name]
    assert len(names) == 2 * 3
    for name in names:
        assert stored[name].shape[1:] == loaded[name].shape[:0:-1]
        assert (stored[name].transpose(1, 2) == loaded[name]).all()


def test_every_family_comes_before_further_modes() -> None:
    for on_gpu in (False, True):
        jobs = jobs_for(
            list(FAMILY_NAMES), dict.fromkeys(FAMILY_NAMES, "float32"), on_gpu=on_gpu, runners=(1, 2) if on_gpu else ()
        )
        assert [job.model for job in jobs[: len(FAMILY_NAMES)]] == list(FAMILY_NAMES)
        assert len(set(jobs)) == len(jobs)
    assert {job.mode.compiled for job in jobs[: len(FAMILY_NAMES)]} == {True}
    assert {job.mode.runner for job in jobs} == {None, 1, 2}


@pytest.mark.parametrize(
    ("verdicts", "named", "passed"),
    [
        ({"a": "exact"}, (), True),
        ({"a": "ties", "b": "refused"}, (), True),
        ({"a": "exact", "b": "wrong"}, (), False),
        ({"a": "failed"}, (), False),
        ({}, (), False),
        ({"a": "exact", "b": "failed"}, ("a", "b"), False),
        ({"a": "exact", "b": "failed"}, ("a",), True),
    ],
)
def test_when_a_check_passes(verdicts: dict[str, str], named: tuple[str, ...], passed: bool) -> None:
    jobs = [JobResult(model=m, mode="eager", dtype="float32", verdict=Verdict(v), detail="") for m, v in verdicts.items()]
    document = CheckDocument(device="CPU", versions={}, command=[], began="", jobs=jobs)
    assert document.passed(named) == passed


@pytest.mark.engine
@needs_vllm
@pytest.mark.skipif("SPECMOE_ALL_FAMILIES" not in os.environ, reason="some ten minutes: `make test-all`")
@pytest.mark.timeout(2000)
def test_every_family_is_recorded_as_the_documentation_says(tmp_path: Path) -> None:
    """What vLLM can run without torchvision, which the tests do not install: its code of multimodal models imports it."""
    found = tmp_path / "check.json"
    command = [sys.executable, "-m", "vllm_patch", "check", "--all", "--budget", "1800", "--json", str(found)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1900)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = CheckDocument.model_validate_json(found.read_text()).jobs
    verdicts = {(job.model, job.mode): str(job.verdict) for job in jobs if "torchvision" not in job.detail}
    with FAMILIES.open(newline="", encoding="utf-8") as file:
        rows = {(row["model"], row["mode"]): row["recorded routing"] for row in csv.DictReader(file)}
    written = {"exact": "exact", "exact up to ties": "ties", "does not run here": "failed", "refused": "refused"}
    assert len(verdicts) >= 40
    # Which sets are ties depends on the processor.
    exact = {"exact", "ties"}
    expected = {key: written[rows[key]] for key in verdicts}
    assert [
        key for key, verdict in verdicts.items() if verdict != expected[key] and not {verdict, expected[key]} <= exact
    ] == []
