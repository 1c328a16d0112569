"""`specmoe generate`: what it prints and writes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import specmoe
from analysis.documents.generation import GenerationRun
from profiler.errors import SpecmoeError
from profiler.trace.reader import Trace

PROMPT = "def add(a, b):\n"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(specmoe.app, ["generate", "demo", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_run_prints_its_text_and_writes_what_its_cache_did(tmp_path: Path) -> None:
    file, trace = tmp_path / "run.json", tmp_path / "trace"
    output = run(
        *("--prompt", PROMPT, "--prompt", "Once upon", "--store", "disk", "--cache-fraction", ".5", "--policy", "ewma"),
        *("--max-new-tokens", "12", "--trace", str(trace), "--json", str(file)),
    )
    document = GenerationRun.model_validate_json(file.read_text())
    assert GenerationRun.model_validate_json(document.to_json()) == document
    assert [each.prompt for each in document.outputs] == [PROMPT, "Once upon"]
    assert PROMPT + document.outputs[0].text in output
    assert document.capacity == 4
    assert document.decode.tokens == sum(len(each.token_ids) - 1 for each in document.outputs)
    assert document.decode.hits + document.decode.misses == document.decode.requested == document.decode.tokens * 8 * 2
    assert document.simulated is not None
    # Without prefetching, the simulation sees the same hits.
    assert document.simulated.hit_rate == pytest.approx(document.decode.hit_rate)
    assert document.prefetched == document.dropped == 0
    assert document.decode.gigabytes == pytest.approx(document.decode.misses * 3 * 128 * 160 * 2 / 1e9, rel=0.01)
    opened = Trace.open(trace)
    assert opened.problems.num_rows == 2
    assert opened.metadata.engine == "transformers"
    assert "Simulation of the same tokens" in output


def test_prompts_of_a_dataset_with_prefetching(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    output = run(
        *("--dataset", "demo-reviews", "--num-problems", "2", "--predictor", "next-gate", "--cache-gb", "0.006"),
        *("--max-new-tokens", "6", "--batch", "2", "--json", str(file)),
    )
    document = GenerationRun.model_validate_json(file.read_text())
    assert document.predictor == "next-gate"
    assert document.cache_gigabytes <= 0.006
    assert document.prefetched == document.useful + document.wasted > 0
    assert "were used before they were evicted" in output
    assert "demo-reviews" in output


def test_experts_in_four_bits(tmp_path: Path) -> None:
    """The bytes that are counted are those of packed experts; the routing is recorded as that of a quantized model."""
    file, trace = tmp_path / "run.json", tmp_path / "trace"
    output = run(
        *("--prompt", PROMPT, "--expert-bits", "4", "--cache-gb", "0.002", "--max-new-tokens", "8"),
        *("--json", str(file), "--trace", str(trace)),
    )
    document = GenerationRun.model_validate_json(file.read_text())
    assert document.expert_bits == 4
    assert document.reads == "from memory, in 4 bits"
    # Of 123 KB each in bfloat16, a cache of this size would hold one per layer.
    packed = 3 * 128 * 160 * 4.5 / 8
    assert document.expert_gigabytes == pytest.approx(64 * packed / 1e9)
    assert document.capacity == 6
    # One unpacked expert, and one half of the numbers of gate and up in between, of a byte each.
    assert document.cache_gigabytes == pytest.approx((50 * packed + 3 * 128 * 160 * 2 + 128 * 160) / 1e9)
    assert document.decode.gigabytes == pytest.approx(document.decode.misses * packed / 1e9)
    assert "in 4 bits" in output
    assert Trace.open(trace).metadata.model.quantization == "experts in 4 bits"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "choose either --prompt or --dataset"),
        (("--prompt", "a", "--dataset", "gsm8k"), "choose either --prompt or --dataset"),
        (("--prompt", "a", "--cache-gb", "1", "--cache-fraction", ".5"), "choose either --cache-fraction or --cache-gb"),
        (("--prompt", "a", "--cache-gb", ".001"), "cannot hold the 2 of one token"),
        (("--prompt", "a", "--policy", "belady"), "can be simulated, but not run"),
        (("--prompt", "a", "--predictor", "nothing-here"), "unknown predictor 'nothing-here'"),
        (("--prompt", "a", "--max-new-tokens", "5000"), "more than the 1024 that the model allows"),
    ],
)
def test_what_it_refuses(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(SpecmoeError, match=message):
        CliRunner().invoke(specmoe.app, ["generate", "demo", *arguments], catch_exceptions=False)


def test_a_trace_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(SpecmoeError, match="is not an empty folder: choose another"):
        CliRunner().invoke(specmoe.app, ["generate", "demo", "--prompt", "a", "--trace", str(tmp_path)], catch_exceptions=False)
    assert (tmp_path / "note.txt").read_text() == "mine"
