"""`python -m vllm_patch check` with real engines: what it prints and writes, and that it finds a wrong recorder."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import warm

from profiler.engines.vllm import is_installed
from vllm_patch.check.jobs import EAGER, FAMILY_NAMES, Job, jobs_for
from vllm_patch.check.results import CheckDocument, JobResult, Verdict
from vllm_patch.check.run import run_jobs

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
    verdicts_line, covered, missing = done.stdout.strip().splitlines()[-3:]
    assert verdicts_line.startswith(f"{len(document.jobs)} runs on CPU: ")
    assert covered == "Covered: eager: llama4"
    assert missing.startswith("Not covered: do not run here: broken; ")
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


def test_the_families_that_are_named_can_be_made() -> None:
    from vllm_patch.check.families import FAMILIES

    assert set(FAMILY_NAMES) == {*FAMILIES, "deepseek_v1"}
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
