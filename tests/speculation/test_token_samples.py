"""What evaluations and simulations list token by token adds up to their own numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.traces import write_synthetic_trace

from analysis.documents.token_results import DEMAND, HIT, LATE
from profiler.trace.reader import Trace
from profiler.trace.splits import all_digests
from speculation.data.tasks import Task
from speculation.evaluation.evaluate import evaluate
from speculation.offload.studies.simulation_options import SimulationStudy
from speculation.offload.studies.simulation_study import run_study
from speculation.training.fit import train

LAYERS, EXPERTS, TOP_K = 3, 8, 2


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Twenty short problems: all of them, and all of their tokens, are in a sample."""
    random = np.random.default_rng(0)
    problems = []
    for _ in range(20):
        ids = random.random((12, LAYERS, EXPERTS)).argsort(-1)[..., :TOP_K]
        # Some structure, so that predictions are neither all right nor all wrong.
        follows = random.random(12) < 0.6
        ids[follows, 1:, 0] = (ids[follows, :1, 0] + 1) % EXPERTS
        ids[follows, 1:, 1] = (ids[follows, :1, 0] + 2) % EXPERTS
        problems.append((ids, np.tile([0.75, 0.25], (12, LAYERS, 1))))
    return write_synthetic_trace(
        tmp_path_factory.mktemp("samples") / "trace", problems, EXPERTS, datasets=["a", "b"] * 10, prompt_tokens=3
    )


def truth(trace: Trace) -> dict[tuple[int, int], np.ndarray]:
    """The experts `[L, K]` of each token, by the digest of its problem and its position."""
    return {
        (digest, int(token)): ids_LK
        for problem, digest in all_digests(trace).items()
        for token, ids_LK in zip(trace.arrays(problem).token_ids_T, trace.arrays(problem).expert_ids_TLK, strict=True)
    }


@pytest.mark.parametrize("task", [Task.NEXT_LAYER, Task.NEXT_TOKEN, Task.WHOLE_PATH])
def test_recall_of_the_sample_is_the_evaluation_s(task: Task, trace: Trace, tmp_path: Path) -> None:
    run = train(trace, "conditional-counts" if task != Task.WHOLE_PATH else "popularity", tmp_path / "run", task=task)
    evaluation = evaluate(run, trace, part="all", with_baselines=False, with_sample=True)
    chosen = truth(trace)
    right = []
    for problem in evaluation.sample:
        predicted_TLK = problem.predicted(layers=LAYERS, top_k=TOP_K, num_experts=EXPERTS)
        assert predicted_TLK is not None
        for token, predicted_LK in zip(problem.token_ids, predicted_TLK, strict=True):
            right += [
                len(set(predicted_K) & set(chosen_K)) / TOP_K
                for predicted_K, chosen_K in zip(predicted_LK, chosen[problem.digest, token], strict=True)
                if predicted_K[0] < EXPERTS
            ]
    assert len(evaluation.sample) == 20
    assert 0 < np.mean(right) < 1
    assert np.mean(right) == pytest.approx(evaluation.results[run.name].metrics["h=1"][f"recall@{TOP_K}"])
    # What nothing predicts: the first layer, or the first token.
    empty = [text.split(" ")[0] == "-" for problem in evaluation.sample for text in problem.experts]
    assert all(empty) == (task == Task.NEXT_LAYER)
    assert sum(empty) == {Task.NEXT_LAYER: len(empty), Task.NEXT_TOKEN: 20, Task.WHOLE_PATH: 0}[task]


def test_without_being_asked_an_evaluation_lists_no_tokens(trace: Trace, tmp_path: Path) -> None:
    run = train(trace, "popularity", tmp_path / "run")
    assert evaluate(run, trace, part="all", with_baselines=False).sample == []


@pytest.mark.parametrize("batch", [1, 4])
def test_outcomes_of_the_sample_are_the_simulation_s(batch: int, trace: Trace) -> None:
    study = SimulationStudy(
        trace=trace,
        part="all",
        predictors=("none", "popularity"),
        policies=("lru", "belady"),
        fractions=(0.25, 0.5),
        batch=batch,
    )
    simulation = run_study(study)
    sample = simulation.sample
    assert sample is not None
    # The best of the smaller cache that knows no future.
    assert (sample.capacity, sample.policy) == (2, "lru")
    row = next(
        each
        for each in simulation.rows
        if (each.policy, each.prefetch, each.capacity) == (sample.policy, sample.prefetch, sample.capacity)
    )
    counts = np.zeros(4, dtype=int)
    for problem in sample.problems:
        outcomes_TLK = problem.outcomes(layers=LAYERS, top_k=TOP_K)
        assert outcomes_TLK is not None
        assert problem.token_ids == list(range(12))
        counts += np.bincount(outcomes_TLK[3:].reshape(-1), minlength=4)
    assert counts[0] == 0
    assert len(sample.problems) == 20
    if batch == 1:
        # Each step decodes one token, so that no two tokens share a request.
        found = {name: sum(values) for name, values in row.counts_by_layer.items()}
        assert (counts[HIT], counts[LATE], counts[DEMAND]) == (found["hit"], found["late"], found["miss"])
    assert counts[HIT] > 0
    assert counts[DEMAND] > 0


def test_nothing_is_listed_of_simulations_that_know_the_future(trace: Trace) -> None:
    study = SimulationStudy(trace=trace, part="all", predictors=("oracle",), policies=("lru",), fractions=(0.5,))
    assert run_study(study).sample is None
