"""Jobs for rented GPUs: run ids, shards, estimates, and what is refused before anything is paid for."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.collect.options import RentedOptions
from profiler.errors import DatasetError, EngineError, ModelError, TraceError
from profiler.models.gpus import find_gpu, named_gpu
from profiler.models.registry import MODELS, Preset, preset
from profiler.plan.estimate import estimate_tokens
from profiler.plan.job import JobPlan, cut_into_shards, make_plan, read_job, read_shard, write_job

OPTIONS: dict[str, Any] = {"model": "demo", "dataset": "demo-math,demo-code", "num_problems": 9, "max_new_tokens": 4}


def plan(*, may_guess: bool = False, **changes: Any) -> JobPlan:
    return make_plan(RentedOptions(**(OPTIONS | changes)), may_guess=may_guess)


def test_a_run_is_named_by_what_decides_its_rows() -> None:
    first = plan().job
    assert first.run_id.startswith("demo-demo-math-demo-code-9-")
    same = [plan(), plan(gpu="H100"), plan(containers=3), plan(shard_size=2)]
    assert {other.job.run_id for other in same} == {first.run_id}
    others = [
        plan(dtype="float32"),
        plan(moe_backend="marlin"),
        plan(engine="transformers"),
        plan(capture_logits=True),
        plan(revision="abc"),
        plan(num_problems=8),
        plan(max_new_tokens=5),
        plan(temperature=0.5),
        plan(dataset="demo-code,demo-math"),
    ]
    assert len({first.run_id, *(other.job.run_id for other in others)}) == 1 + len(others)


def test_a_changed_problem_is_another_run(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    ids = set()
    for text in ("one", "two"):
        path.write_text(json.dumps({"question": text}) + "\n")
        ids.add(plan(dataset="gsm8k", data_files=path).job.run_id)
    assert len(ids) == 2


@given(problems=st.integers(1, 100_000), containers=st.integers(1, 100), size=st.none() | st.integers(1, 10_000))
def test_shards_cover_the_problems_evenly(problems: int, containers: int, size: int | None) -> None:
    if size is not None and -(-problems // size) > 99_999:
        with pytest.raises(EngineError, match="expected at most 99,999"):
            cut_into_shards(problems, containers, size)
        return
    shards = cut_into_shards(problems, containers, size)
    sizes = [end - start for start, end in pairwise(shards)]
    assert shards[0] == 0
    assert shards[-1] == problems
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= (size or 8192)


def test_more_containers_than_shards_are_not_planned() -> None:
    alone = plan(model="qwen1.5-moe", num_problems=2, containers=50)
    assert alone.containers == 2
    with pytest.raises(EngineError, match="makes 100,000 shards, expected at most 99,999"):
        cut_into_shards(100_000, 1, 1)


def test_every_container_has_a_shard_and_a_few_more_if_they_are_many() -> None:
    assert cut_into_shards(60, 3) == [0, 20, 40, 60]
    assert len(cut_into_shards(100_000, 4)) - 1 == 16
    assert len(cut_into_shards(1_000_000, 4)) - 1 == 123


def test_a_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    planned = plan(shard_size=4)
    write_job(tmp_path, planned.job, planned.problems)
    job = read_job((tmp_path / "job.json").read_bytes(), "job.json")
    assert job == planned.job
    assert job.shards == [0, 3, 6, 9]
    problems = {number: p for shard in range(3) for number, p in read_shard(tmp_path, job, shard).items()}
    assert problems == dict(enumerate(planned.problems))
    with pytest.raises(TraceError, match=r"job.json: run_id: String should match pattern"):
        read_job(json.dumps({**json.loads(job.model_dump_json()), "run_id": "../elsewhere"}), "job.json")


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"gpu": "RTX 3090"}, ModelError, "unknown GPU 'RTX 3090': expected one of L4, A10"),
        ({"model": "mixtral-8x7b", "gpu": "A10"}, ModelError, "does not fit on A10 with 24 GB"),
        ({"model": "mixtral-8x7b", "precision": "bf16"}, ModelError, "does not fit on A100-80GB"),
        ({"model": "mixtral-8x7b", "precision": "gptq"}, ModelError, "no gptq checkpoint: expected one of bf16, awq"),
        ({"precision": "awq"}, ModelError, "precision chooses a checkpoint of a short name"),
        ({"model": "mixtrall"}, ModelError, "unknown model 'mixtrall'"),
        ({"model": "."}, ModelError, "is a folder on this machine"),
        ({"engine": "sglang"}, EngineError, "unknown engine 'sglang'"),
        ({"dtype": "int3"}, EngineError, "unknown dtype 'int3'"),
        ({"containers": 0}, EngineError, "containers 0: expected 1 to 100"),
        ({"shard_size": 0}, EngineError, "shard_size 0: expected 1 or more"),
        ({"max_length": 4096}, EngineError, "max_length 4096: expected 2 to 1024 of demo"),
        ({"max_length": 4}, EngineError, "max_new_tokens 4 leaves no room for a prompt in 4 tokens"),
        ({"capture_hidden": "9", "hidden_tokens": 5}, EngineError, r"hidden layer 9: not an MoE layer of demo \(0..7\)"),
        ({"capture_hidden": "1", "hidden_tokens": 0}, EngineError, "hidden_tokens 0: expected 1 or more"),
        ({"engine": "transformers", "capture_logits": True}, EngineError, "needs the engine vllm"),
        ({"engine": "transformers", "moe_backend": "marlin"}, EngineError, "moe_backend 'marlin' is an option of vLLM"),
        ({"model": "deepseek-moe-16b", "capture_hidden": "0", "hidden_tokens": 5}, EngineError, "not an MoE layer of deepseek"),
        ({"dataset": "x"}, DatasetError, "unknown dataset 'x'"),
    ],
)
def test_what_cannot_run_is_refused(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        plan(**changes)


def test_the_published_checkpoint_is_taken_if_it_fits_and_a_smaller_one_if_not() -> None:
    assert plan(model="qwen1.5-moe").job.checkpoint == "Qwen/Qwen1.5-MoE-A2.7B"
    mixtral = plan(model="mixtral-8x7b")
    assert (mixtral.job.precision, mixtral.job.checkpoint) == ("awq", "TheBloke/Mixtral-8x7B-v0.1-AWQ")
    assert not mixtral.job.is_gated
    large = plan(model="mixtral-8x7b", gpu="H200")
    assert (large.job.precision, large.job.is_gated) == ("bf16", True)
    planned = plan(model="deepseek-moe-16b", precision="awq")
    assert any("created by modal_jobs/quantize.py" in line for line in planned.lines())


def test_the_estimate_is_near_what_qwen_published() -> None:
    # qwenlm.github.io/blog/qwen-moe: 2.01 requests/s of 1000 + 1000 tokens with vLLM on one A100-80G.
    entry, gpu = MODELS["qwen1.5-moe"], find_gpu("A100-80GB")
    found = estimate_tokens(entry, gpu, preset(entry, gpu), prompt_tokens=10**6, new_tokens=10**6, num_problems=1000, batch=205)
    assert found.tokens_per_second / 2000 == pytest.approx(2.01, rel=0.2)


def test_estimates_grow_with_tokens_and_shrink_with_containers() -> None:
    entry, gpu = MODELS["mixtral-8x7b"], find_gpu("A100-80GB")
    chosen = Preset(precision="awq", weights_gb=24.7, batch=256, kv_tokens=300_000)

    def takes(tokens: int, containers: int = 1) -> Any:
        return estimate_tokens(
            entry,
            gpu,
            chosen,
            prompt_tokens=tokens,
            new_tokens=tokens,
            num_problems=tokens // 100,
            batch=256,
            containers=containers,
        )

    one, ten, four = takes(10**6), takes(10**7), takes(10**6, 4)
    assert ten.wall_seconds - ten.start_seconds == pytest.approx(10 * (one.wall_seconds - one.start_seconds))
    assert four.wall_seconds < one.wall_seconds
    # Each container starts.
    assert four.dollars > one.dollars
    # 32 layers, two experts: 4.24 bytes a row.
    assert one.trace_bytes == pytest.approx(2 * 10**6 * 32 * 4.24)


def test_gpus_by_the_names_that_cuda_gives_them() -> None:
    names = {
        "NVIDIA A100-SXM4-80GB": "A100-80GB",
        "NVIDIA A100-SXM4-40GB": "A100-40GB",
        "NVIDIA GeForce RTX 4090": "RTX 4090",
        "NVIDIA RTX A6000": "A6000",
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA A10": "A10",
    }
    assert {name: gpu.name for name in names if (gpu := named_gpu(name))} == names
    assert named_gpu("AMD Instinct MI300X") is None


def test_the_command_line_says_what_would_run(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from profiler.cli import app

    runner = CliRunner()
    arguments = ["plan", "--dataset", "demo-math", "--num-problems", "40", "--containers", "2"]
    shown = runner.invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "mixtral-8x7b, awq: TheBloke/Mixtral-8x7B-v0.1-AWQ" in shown.output
    assert "up to 2 x A100-80GB (else H100), 2.50 $/h; vllm==0.32.0" in shown.output
    assert "estimates by a roofline, not measured" in shown.output
    document = json.loads(runner.invoke(app, [*arguments, "--json", "--model", "qwen1.5-moe", "--gpu", "H100"]).stdout)
    assert (document["model"], document["gpu"], document["shards"]) == ("qwen1.5-moe", "H100", [0, 20, 40])
    assert document["estimate"]["dollars"] > 0
    wrong = runner.invoke(app, ["collect", "--dataset", "demo-math", "--model", "demo", "--out", "x", "--gpu", "H100"])
    assert wrong.exit_code == 2


def test_a_dataset_out_of_reach_is_planned_with_typical_prompts() -> None:
    far: dict[str, Any] = {"model": "mixtral-8x7b", "dataset": "gsm8k,squad", "num_problems": 2000, "max_new_tokens": None}
    with pytest.raises(DatasetError, match="cannot load openai/gsm8k"):
        plan(**far)
    guessed = plan(**far, may_guess=True)
    assert guessed.lines()[0].startswith(
        "planned with prompts of typical length: cannot load openai/gsm8k from the Hugging Face hub"
    )
    # 258 and 874 characters.
    assert guessed.estimate is not None
    assert guessed.estimate.prompt_tokens == pytest.approx(1000 * 258 / 4 + 1000 * 874 / 4, rel=0.02)
    assert guessed.document()["run_id"] is None
    with_embedded = far | {"dataset": "gsm8k,demo-math", "num_problems": 20}
    assert len(plan(**with_embedded, may_guess=True).problems) == 20
    short = far | {"max_tokens_per_problem": 300}
    assert all(problem.max_prompt_tokens for problem in plan(**short, may_guess=True).problems)
    by_tokens = far | {"target_tokens": 20_000, "max_tokens_per_problem": 150}
    with pytest.raises(DatasetError, match="leaves no room for a prompt of gsm8k"):
        plan(**by_tokens, may_guess=True)
