"""The cache of a running model does what the simulation says of the trace of the same run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from profiler.errors import SpecmoeError
from profiler.trace.reader import Trace
from speculation.data.routes import load_routes
from speculation.data.tasks import Task
from speculation.offload.simulation.records import Count
from speculation.offload.state import Rule
from speculation.predictors.options import TrainingOptions
from speculation.runtime import CacheSize, OffloadedModel
from speculation.runtime.agreement import measured_costs, simulate_run
from speculation.runtime.experts import strongest_first
from speculation.training.fit import train

PROMPTS = ["def add(a, b):\n", "The movie was", "Once upon a time there was a", "x = [1, 2"]


@pytest.mark.parametrize("rule", [rule for rule in Rule if rule not in (Rule.BELADY, Rule.LEARNED)])
def test_hits_are_those_of_the_simulation_step_by_step(rule: Rule, tmp_path: Path) -> None:
    """With 3 of 8 slots, prompts need more experts than there are slots, and generated tokens fewer."""
    out = tmp_path / "trace"
    size = CacheSize(fraction=0.375)
    with OffloadedModel.load("demo", size, policy=rule.label, time_constant=4.0, device="cpu") as offloaded:
        hits_R: list[int] = []
        offloaded.experts.hits_R = hits_R
        generations = offloaded.generate(PROMPTS, max_new_tokens=24, trace=out)
        trace = Trace.open(out)
        result = simulate_run(offloaded, trace, None, time_constant=4.0)
        steps = np.array(hits_R).reshape(-1, 8).sum(axis=1)
        assert steps.tolist() == result.hits_S.tolist()
        decode = offloaded.experts.decode
        assert (decode.requested, decode.hits) == (result.total(Count.REQUESTED), result.total(Count.HIT))
        assert offloaded.experts.prefill.streamed == result.prefill_counts_LC[:, Count.STREAMED].sum() > 0
    assert [problem["output"] for problem in trace.problems.to_pylist()] == [each.text for each in generations]
    assert trace.metadata.capture["policy"] == rule.label
    assert not trace.metadata.gaps


def test_a_learned_policy_evicts_what_the_simulation_evicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of a running history are those of the whole trace, so hits agree; so do they from the popular experts on."""
    # Always score before a step, however small the model is: the simulation without costs does so.
    monkeypatch.setattr("speculation.runtime.experts.MAX_FORESIGHT", float("inf"))
    first = tmp_path / "first"
    with OffloadedModel.load("demo", CacheSize(fraction=0.5), device="cpu") as offloaded:
        offloaded.generate(PROMPTS * 8, max_new_tokens=24, trace=first)
    run = train(Trace.open(first), "reuse-small", tmp_path / "run", options=TrainingOptions(epochs=1), task=Task.REUSE)
    out = tmp_path / "second"
    with OffloadedModel.load("demo", CacheSize(fraction=0.5), policy=tmp_path / "run", device="cpu") as offloaded:
        hits_R: list[int] = []
        offloaded.experts.hits_R = hits_R
        offloaded.generate(PROMPTS, max_new_tokens=24, trace=out)
        result = simulate_run(offloaded, Trace.open(out), None, time_constant=24.0, reuse=run.predictor)
        steps = np.array(hits_R).reshape(-1, 8).sum(axis=1)
        # Where two experts' scores differ by rounding only, either may be evicted.
        assert np.abs(steps - result.hits_S).sum() <= 0.01 * steps.sum()


def test_with_everything_cached_a_trained_policy_and_predictor_have_nothing_to_do(tmp_path: Path) -> None:
    """They are left out, so that the simulation of the run needs no scores either."""
    first = tmp_path / "first"
    with OffloadedModel.load("demo", CacheSize(fraction=0.5), device="cpu") as offloaded:
        offloaded.generate(PROMPTS * 4, max_new_tokens=8, trace=first)
    run = tmp_path / "run"
    train(Trace.open(first), "ewma-repeats", run, options=TrainingOptions(), task=Task.REUSE)
    out = tmp_path / "second"
    with OffloadedModel.load("demo", CacheSize(fraction=1), policy=run, predictor="next-gate", device="cpu") as offloaded:
        offloaded.generate(PROMPTS, max_new_tokens=8, trace=out)
        result = simulate_run(offloaded, Trace.open(out), None, time_constant=24.0, reuse=offloaded.reuse_run)
        assert result.hit_rate == 1
        assert offloaded.experts.transfers.counts.transfers == 0


def test_measured_costs_explain_the_time_of_the_run(tmp_path: Path) -> None:
    """Without stalls and transfers, the simulation with a run's costs takes the time that the run took."""
    with OffloadedModel.load("demo", CacheSize(fraction=0.5), device="cpu") as offloaded:
        offloaded.generate(PROMPTS, max_new_tokens=16, trace=tmp_path / "trace")
        costs = measured_costs(offloaded)
        decode = offloaded.experts.decode
        assert costs.expert_bytes == 3 * 128 * 160 * 2
        # Transfers for prompts are not among the costs of a generated token; without prefetching, each miss is one.
        assert decode.transfers == decode.misses
        prefill, counts = offloaded.experts.prefill, offloaded.experts.transfers.counts
        assert prefill.transfers + decode.transfers == counts.transfers
        assert prefill.transfer_seconds + decode.transfer_seconds == pytest.approx(counts.seconds)
        assert costs.copy_seconds == pytest.approx(decode.transfer_seconds / decode.misses)
        free = replace(costs, copy_seconds=0.0)
        result = simulate_run(offloaded, Trace.open(tmp_path / "trace"), free, time_constant=24.0)
        assert result.decode_seconds == pytest.approx(decode.seconds - decode.stall, rel=1e-6)


def test_the_strongest_expert_of_every_token_comes_first() -> None:
    ids = np.array([[3, 1], [2, 3]])
    weights = np.array([[0.4, 0.6], [0.9, 0.1]], dtype=np.float32)
    assert strongest_first(ids, weights) == [1, 2, 3]


def test_a_cache_begins_with_what_was_popular_where_its_predictor_was_trained(tmp_path: Path) -> None:
    first = tmp_path / "first"
    with OffloadedModel.load("demo", CacheSize(fraction=0.5), device="cpu") as offloaded:
        offloaded.generate(PROMPTS * 4, max_new_tokens=16, trace=first)
    trace = Trace.open(first)
    train(trace, "popularity", tmp_path / "run", options=TrainingOptions())
    with OffloadedModel.load("demo", CacheSize(fraction=0.5), predictor=tmp_path / "run", device="cpu") as offloaded:
        routes = load_routes(trace, "train")
        counts_LE = np.stack([np.bincount(routes.expert_ids_TLK[:, layer].reshape(-1), minlength=8) for layer in range(8)])
        held = offloaded.experts.cache.slot_of_X.reshape(8, 8) >= 0
        for layer in range(8):
            assert counts_LE[layer][held[layer]].min() >= counts_LE[layer][~held[layer]].max()


def test_runs_that_do_not_suit_the_model_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = tmp_path / "first"
    with OffloadedModel.load("demo", CacheSize(fraction=0.5), device="cpu") as offloaded:
        offloaded.generate(PROMPTS * 4, max_new_tokens=8, trace=first)
    train(Trace.open(first), "popularity", run, options=TrainingOptions())
    with pytest.raises(SpecmoeError, match=r"was trained for next-layer: a policy needs a run of 'specmoe train --task reuse'"):
        OffloadedModel.load("demo", CacheSize(fraction=0.5), policy=run, device="cpu")
    with pytest.raises(SpecmoeError, match="unknown policy 'best': expected one of lru"):
        OffloadedModel.load("demo", CacheSize(fraction=0.5), policy="best", device="cpu")
    with pytest.raises(SpecmoeError, match="belady needs to know the future"):
        OffloadedModel.load("demo", CacheSize(fraction=0.5), policy="belady", device="cpu")
    with pytest.raises(SpecmoeError, match=r"cannot hold the 2 of one token: choose at least a share of 0\.25"):
        OffloadedModel.load("demo", CacheSize(fraction=0.2), device="cpu")
