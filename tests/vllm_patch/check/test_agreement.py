"""Traces that were recorded wrongly are found, and the correct one is accepted; a real router's routing, without vLLM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.traces import write_synthetic_trace

from profiler.engines.transformers import route
from profiler.models.moe_modules import MoEBlock
from profiler.trace.reader import Trace
from vllm_patch.check.agreement import compare, load_oracle
from vllm_patch.check.families import make

Arrays = tuple[np.ndarray, np.ndarray]
TOKENS = [np.random.default_rng(seed).integers(3, 500, 40).tolist() for seed in range(3)]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_oracle(make("mixtral", tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_oracle(make("glm4_moe", tmp_path_factory.mktemp("models")))


def record(
    oracle: Any, folder: Path, change: Callable[[np.ndarray, np.ndarray], Arrays] | None = None, *, unrecorded: int = 0
) -> Trace:
    """A trace of the oracle's own routing, after `change` of each problem's ids and weights `[T, L, K]`."""
    problems = []
    for tokens in TOKENS:
        ids_TLK, weights_TLK = route(oracle, tokens[:-1])
        problems.append(change(ids_TLK, weights_TLK) if change is not None else (ids_TLK, weights_TLK))
    return write_synthetic_trace(folder, problems, oracle.config.num_local_experts, vocab_ids=TOKENS, unrecorded=unrecorded)


def swap_layers(ids_TLK: np.ndarray, weights_TLK: np.ndarray) -> Arrays:
    order = [1, 0, *range(2, ids_TLK.shape[1])]
    return ids_TLK[:, order], weights_TLK[:, order]


FAULTS: dict[str, Callable[[np.ndarray, np.ndarray], Arrays]] = {
    "ids shifted by one token": lambda ids, weights: (np.roll(ids, 1, axis=0), np.roll(weights, 1, axis=0)),
    "two layers swapped": swap_layers,
    "weights before renormalization": lambda ids, weights: (ids, weights * 0.6),
    "weights of the other expert": lambda ids, weights: (ids, weights[..., ::-1]),
}


def test_the_same_routing_is_exact(mixtral: Any, tmp_path: Path) -> None:
    found = compare(record(mixtral, tmp_path / "trace"), mixtral)
    assert found.verdict("float32") == ("exact", "all 351 sets are equal")
    assert found.compared == 3 * 39 * 3


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fault_is_wrong_in_any_precision(fault: str, dtype: str, mixtral: Any, tmp_path: Path) -> None:
    verdict, detail = compare(record(mixtral, tmp_path / "trace", FAULTS[fault]), mixtral).verdict(dtype)
    assert verdict == "wrong"
    assert "differ" in detail


def test_a_missing_position_is_wrong(mixtral: Any, tmp_path: Path) -> None:
    shortened = record(mixtral, tmp_path / "trace", lambda ids, weights: (ids[:-1], weights[:-1]), unrecorded=1)
    assert compare(shortened, mixtral).verdict("float32") == ("wrong", "3 positions were not recorded")


def test_a_missing_factor_of_the_weights_is_wrong(glm: Any, tmp_path: Path) -> None:
    """GLM-4-MoE's weights sum to 1.5: a recorder that takes them before the factor is wrong."""
    assert compare(record(glm, tmp_path / "right"), glm).verdict("float32")[0] == "exact"
    verdict, detail = compare(record(glm, tmp_path / "wrong", lambda ids, weights: (ids, weights / 1.5)), glm).verdict(
        "float32"
    )
    assert verdict == "wrong"
    assert "median ratio 0.667" in detail


def test_another_choice_is_a_tie_only_where_scores_are_close(mixtral: Any, tmp_path: Path) -> None:
    """One set gets the third expert instead of its second: a tie where their scores are closest, an error where farthest."""
    logits: list[np.ndarray] = []

    def keep(block: MoEBlock, inputs: Any) -> None:
        logits.append((inputs @ block.gate.get_parameter("weight").T).numpy())

    route(mixtral, TOKENS[0][:-1], keep)
    ordered_TE = np.sort(logits[-1], axis=-1)
    gap_T = ordered_TE[:, -2] - ordered_TE[:, -3]

    def changed_at(token: int) -> Trace:
        first = [True]

        def change(ids_TLK: np.ndarray, weights_TLK: np.ndarray) -> Arrays:
            ids_TLK = ids_TLK.copy()
            if first.pop() if first else False:
                ids_TLK[token, -1, 1] = np.argsort(logits[-1][token])[-3]
            return ids_TLK, weights_TLK

        return record(mixtral, tmp_path / f"changed-{token}", change)

    close, far = int(gap_T.argmin()), int(gap_T.argmax())
    assert gap_T[close] / logits[-1].std() < 0.05
    tie = compare(changed_at(close), mixtral)
    assert tie.verdict("bfloat16")[0] == "ties"
    assert tie.widest_gap == pytest.approx(gap_T[close] / logits[-1].std(), rel=1e-3)
    assert (tie.differing, tie.origins) == (1, 1)
    error = compare(changed_at(far), mixtral)
    assert error.verdict("bfloat16")[0] == "wrong"
    assert f"problem 0, token {far}, layer 2" in error.first
