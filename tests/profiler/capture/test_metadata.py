"""What a summary says about the kernels that computed experts."""

from __future__ import annotations

from profiler.capture.metadata import describe_kernels


def test_kernels_are_named_with_the_reason_for_them() -> None:
    own, other = describe_kernels({"MarlinExperts": None, "OAITritonExperts": "OAITritonMxfp4ExpertsMonolithic"})
    assert own == "experts computed by MarlinExperts, vLLM's own choice"
    assert other.startswith("experts computed by OAITritonExperts: vLLM's own choice, OAITritonMxfp4ExpertsMonolithic, selects")
    assert describe_kernels({"MarlinExperts": None, "OAITritonExperts": "Fused"}, replaced_only=True) == [
        other.replace("OAITritonMxfp4ExpertsMonolithic", "Fused")
    ]
