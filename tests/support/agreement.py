"""Assertions over traces that were recorded from vLLM."""

from __future__ import annotations

from typing import Any

from profiler.trace.reader import Trace
from vllm_patch.check.agreement import compare, vocabulary


def assert_agrees(trace: Trace, oracle: Any) -> int:
    """Every captured (token, layer) has the oracle's experts and weights; returns their number."""
    found = compare(trace, oracle)
    assert found.verdict("float32")[0] == "exact", found
    return found.compared


def assert_complete(trace: Trace) -> None:
    """No gap, and N - 1 positions of every sequence."""
    assert trace.metadata.gaps == []
    for problem, tokens in vocabulary(trace).items():
        if len(tokens) > 1:
            assert trace.arrays(problem).token_ids_T.tolist() == list(range(len(tokens) - 1))
