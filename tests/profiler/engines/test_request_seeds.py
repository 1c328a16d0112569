"""Every request samples with a seed of its own: with one seed for all, similar prompts get nearly the same outputs."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from profiler.engines import Prompt, Sampling
from profiler.engines.vllm import VllmEngine, request_seed


def test_seeds_differ_between_problems_and_between_seeds() -> None:
    seeds = [request_seed(seed, problem_id) for seed in range(30) for problem_id in range(30)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # A resumed collection samples what it would have sampled.
    assert seeds == [request_seed(seed, problem_id) for seed in range(30) for problem_id in range(30)]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_requests_get_them_if_they_are_sampled(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # In place of vLLM, whose import takes longer than all other tests of this folder.
    vllm, parameters = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    vars(vllm).update(SamplingParams=SimpleNamespace, sampling_params=parameters)
    vars(parameters).update(RequestOutputKind=SimpleNamespace(FINAL_ONLY=2))
    for name, module in (("vllm", vllm), ("vllm.sampling_params", parameters), ("vllm.exceptions", ModuleType("exceptions"))):
        monkeypatch.setitem(sys.modules, name, module)
    added: list[Any] = []
    engine = object.__new__(VllmEngine)
    add = SimpleNamespace(add_request=lambda request, tokens, params: added.append(params))
    vars(engine)["_llm"] = SimpleNamespace(llm_engine=add)
    prompts = [Prompt(number, [1, 2, 3], 4) for number in (5, 6)]
    assert engine._add_requests(prompts, Sampling(temperature=temperature, seed=9), lambda *_: None) == {
        "problem-5": 5,
        "problem-6": 6,
    }
    assert [params.seed for params in added] == [request_seed(9, number) if temperature else None for number in (5, 6)]
