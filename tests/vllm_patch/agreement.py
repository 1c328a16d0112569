"""Comparing traces with `transformers` over the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from profiler.reader import Trace

# float16 weights below 1, and the engines' own rounding.
WEIGHT_TOLERANCE = 2**-12 + 1e-5


def load_oracle(folder: Path, dtype: str = "float32") -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    if folder.name == "deepseek_v1":
        from tiny_models import deepseek_v1_oracle

        return deepseek_v1_oracle(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def vocabulary(trace: Trace) -> dict[int, list[int]]:
    table = trace.tokens.to_pydict()
    tokens: dict[int, list[int]] = {}
    for problem, vocab in zip(table["problem_id"], table["vocab_id"], strict=True):
        tokens.setdefault(problem, []).append(vocab)
    return tokens


def by_expert(ids_TLK: np.ndarray, weights_TLK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(ids_TLK, -1)
    return np.take_along_axis(ids_TLK, order, -1), np.take_along_axis(weights_TLK.astype(np.float64), order, -1)


def assert_agrees(trace: Trace, oracle: Any) -> int:
    """Every captured (token, layer) has the oracle's experts and weights; returns their number."""
    from profiler.engines.transformers import route

    compared = 0
    for problem, tokens in vocabulary(trace).items():
        if len(tokens) < 2:
            continue
        chunk = trace.arrays(problem)
        ids_TLK, weights_TLK = route(oracle, tokens[:-1])
        expected_ids, expected_weights = by_expert(ids_TLK[chunk.token_ids_T], weights_TLK[chunk.token_ids_T])
        ids, weights = by_expert(chunk.expert_ids_TLK, chunk.weights_TLK)
        assert (ids == expected_ids).all(), f"problem {problem}: {(ids != expected_ids).any(-1).mean():.1%} differ"
        assert np.abs(weights - expected_weights).max() <= WEIGHT_TOLERANCE
        compared += ids.shape[0] * ids.shape[1]
    return compared


def assert_complete(trace: Trace) -> None:
    assert trace.metadata.gaps == []
    for problem, tokens in vocabulary(trace).items():
        if len(tokens) > 1:
            assert trace.arrays(problem).token_ids_T.tolist() == list(range(len(tokens) - 1))
