"""The second oracle: where an engine computes something before its routers in another way, the routers are still compared.

The engine is a `transformers` model whose attention was changed; its routers are those of the reference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.traces import write_synthetic_trace

from profiler.engines.transformers import route
from profiler.models.moe_modules import MoEBlock
from profiler.trace.reader import Trace
from vllm_patch.check.agreement import ROUTER, compare, load_oracle
from vllm_patch.check.families import make

# Of the values' weights, which have a standard deviation of 0.02.
CHANGE = 0.004
TOKENS = [np.random.default_rng(seed).integers(3, 500, 40).tolist() for seed in range(3)]
# Softmax; sigmoid with a correction bias and a factor; a router that is not renormalized.
FAMILIES = ["mixtral", "glm4_moe", "olmoe"]


@dataclass(frozen=True)
class Recorded:
    """Of one sequence: ids and weights `[T, L, K]`, and the routers' inputs `[T, L, D]`."""

    ids: np.ndarray
    weights: np.ndarray
    hidden: np.ndarray


@dataclass(frozen=True)
class Engines:
    """The reference, and the model that stands for an engine with another attention."""

    reference: Any
    other: Any


@pytest.fixture(scope="module", params=FAMILIES)
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    folder = make(request.param, tmp_path_factory.mktemp("models"))
    return Engines(load_oracle(folder), changed(load_oracle(folder), CHANGE))


def changed(model: Any, change: float) -> Any:
    """The model with other values in its attention. change: the standard deviation of what is added to their weights."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("v_proj.weight"):
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * change)
    return model


def record(engines: Engines, folder: Path, fault: Callable[[Recorded], Recorded] | None = None) -> Trace:
    sequences = []
    for tokens in TOKENS:
        hidden: list[np.ndarray] = []

        def keep(block: MoEBlock, inputs: torch.Tensor, hidden: list[np.ndarray] = hidden) -> None:
            hidden.append(inputs.numpy().copy())

        ids, weights = route(engines.other, tokens[:-1], keep)
        recorded = Recorded(ids, weights, np.stack(hidden, axis=1))
        sequences.append(fault(recorded) if fault is not None else recorded)
    config = engines.reference.config
    return write_synthetic_trace(
        folder,
        [(sequence.ids, sequence.weights) for sequence in sequences],
        getattr(config, "num_local_experts", None) or config.num_experts,
        first_layer=getattr(config, "first_k_dense_replace", 0),
        vocab_ids=TOKENS,
        hidden=[sequence.hidden for sequence in sequences],
    )


def swapped(values: np.ndarray) -> np.ndarray:
    return values[:, [1, 0, *range(2, values.shape[1])]]


def shift_rows(recorded: Recorded) -> Recorded:
    """Everything of a token is recorded for the next one: ids, weights and inputs agree with each other."""
    return Recorded(*(np.roll(values, 1, axis=0) for values in (recorded.ids, recorded.weights, recorded.hidden)))


def swap_layers(recorded: Recorded) -> Recorded:
    return Recorded(swapped(recorded.ids), swapped(recorded.weights), swapped(recorded.hidden))


FAULTS: dict[str, Callable[[Recorded], Recorded]] = {
    "ids shifted by one token": lambda r: replace(r, ids=np.roll(r.ids, 1, axis=0), weights=np.roll(r.weights, 1, axis=0)),
    "all rows shifted by one token": shift_rows,
    "two layers swapped": lambda r: replace(r, ids=swapped(r.ids), weights=swapped(r.weights)),
    "two layers swapped with their inputs": swap_layers,
    "weights before a factor": lambda r: replace(r, weights=r.weights * 0.6),
    "weights of another expert": lambda r: replace(r, weights=r.weights[..., ::-1]),
    "one step of eight rows shifted": lambda r: Recorded(
        *(np.concatenate([v[:8], np.roll(v[8:16], 1, axis=0), v[16:]]) for v in (r.ids, r.weights, r.hidden))
    ),
}


def test_the_routers_choice_is_right_where_transformers_differs(engines: Engines, tmp_path: Path) -> None:
    trace = record(engines, tmp_path / "trace")
    assert compare(trace, engines.reference).verdict("float32")[0] == "wrong"
    found = compare(trace, engines.reference, recorded_inputs=True)
    assert found.oracle == ROUTER
    assert found.verdict("float32")[0] in {"exact", "ties"}
    assert found.differing <= 3
    assert found.compared == found.rows == sum(len(tokens) - 1 for tokens in TOKENS) * len(trace.metadata.model.moe_layers)
    assert found.misplaced == 0
    assert found.input_difference > 0.01


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_recorder_is_not_excused(fault: str, engines: Engines, tmp_path: Path) -> None:
    trace = record(engines, tmp_path / "trace", FAULTS[fault])
    for recorded_inputs in (False, True):
        assert compare(trace, engines.reference, recorded_inputs=recorded_inputs).verdict("float32")[0] == "wrong"


def test_inputs_too_different_to_be_recognized_are_not_excused(engines: Engines, tmp_path: Path) -> None:
    """Were the rows of other tokens recorded, inputs and sets together, nothing would show it."""
    distant = replace(engines, other=changed(copy.deepcopy(engines.reference), 0.05))
    verdict, detail = compare(record(distant, tmp_path / "trace"), engines.reference, recorded_inputs=True).verdict("float32")
    assert verdict == "wrong"
    assert "do not clearly fit their own token" in detail


def test_a_trace_without_inputs_is_not_excused(engines: Engines, tmp_path: Path) -> None:
    trace = record(engines, tmp_path / "trace", lambda recorded: replace(recorded, hidden=recorded.hidden[:, :0]))
    verdict, detail = compare(trace, engines.reference, recorded_inputs=True).verdict("float32")
    assert (verdict, detail) == ("wrong", "nothing was compared")
