"""Which kernels the installed vLLM chooses on devices that are not here, and which ones capture makes it choose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import warm

from benchmarks.kernels import CHECKPOINTS, DEVICES, table
from profiler.engines.vllm import is_installed

pytestmark = [pytest.mark.engine, pytest.mark.skipif(not is_installed(), reason="vLLM is not installed")]

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def of_vllm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The choices of the installed vLLM; `benchmarks.kernels` says what it replaces."""
    out = tmp_path_factory.mktemp("kernels") / "choices.json"
    done = warm.run("benchmarks.kernels", "--json", out, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(out.read_text()))


@pytest.mark.parametrize(
    ("checkpoint", "capability", "own", "chosen"),
    [
        # The default Modal job: Mixtral in AWQ on an A100, or on an H100.
        ("AWQ", "8.0", "MarlinExperts", "MarlinExperts"),
        ("AWQ", "9.0", "MarlinExperts", "MarlinExperts"),
        ("MXFP4 (gpt-oss)", "9.0", "OAITritonMxfp4ExpertsMonolithic", "OAITritonExperts"),
        ("bf16", "10.0", "TrtLlmBf16ExpertsMonolithic", "FlashInferExperts"),
        ("NVFP4", "10.0", "TrtLlmNvFp4ExpertsMonolithic", "TrtLlmNvFp4ExpertsModular"),
    ],
)
def test_usual_machines(checkpoint: str, capability: str, own: str, chosen: str, of_vllm: dict[str, Any]) -> None:
    assert of_vllm["checkpoints"][checkpoint][capability] == [own, chosen]


def test_on_every_device_there_is_a_kernel_that_can_be_recorded(of_vllm: dict[str, Any]) -> None:
    chosen = [pair[1] for row in of_vllm["checkpoints"].values() for pair in row.values()]
    assert len(chosen) == len(CHECKPOINTS) * len(DEVICES)
    # The name of a class, not a failure; vLLM's names of monolithic kernels say what they are.
    assert [kernel for kernel in chosen if "Monolithic" in kernel or not kernel.isidentifier()] == []


def test_requests_for_a_backend_whose_first_kernel_cannot_be_recorded(of_vllm: dict[str, Any]) -> None:
    kernel, replaced, _ = of_vllm["requests"]["MXFP4 (gpt-oss), triton"]
    assert (kernel, replaced) == ("OAITritonExperts", "OAITritonMxfp4ExpertsMonolithic")
    kernel, replaced, advice = of_vllm["requests"]["bf16, flashinfer_trtllm"]
    assert (kernel, replaced) == ("TrtLlmBf16ExpertsMonolithic", None)
    assert advice.startswith("use --moe-backend auto (FlashInferExperts) or --moe-backend triton (TritonExperts) or ")


def test_the_documentation_shows_what_this_vllm_chooses(of_vllm: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "results" / "kernels.md").read_text()
    release = of_vllm["release"].split("+")[0]
    (section,) = (part for part in page.split("\nvLLM ") if release in part.splitlines()[0].rstrip(":").split(", "))
    assert table([release], of_vllm["checkpoints"]).split("\n\n")[1] in section
