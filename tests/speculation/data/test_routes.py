"""Splits by prompt, what routes know of each token, and the targets of each task."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from support.traces import MakeProblems, MakeTrace

from profiler.errors import EmptyPartError, SpecmoeError, TraceError
from profiler.trace.schema import RoutingChunk
from profiler.trace.splits import part_of
from speculation.data.routes import Routes, load_routes, make_routes, route_digests
from speculation.data.tasks import Shape, Task, targets


def test_the_split_depends_on_the_prompt_alone_and_has_the_stated_shares() -> None:
    parts = [part_of(f"prompt {number}") for number in range(5000)]
    assert parts == [part_of(f"prompt {number}") for number in range(5000)]
    for part, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        assert parts.count(part) / 5000 == pytest.approx(share, abs=0.02)


def test_duplicates_of_a_prompt_fall_on_one_side(make_trace: MakeTrace, random_problems: MakeProblems) -> None:
    problems = random_problems(count=40, tokens=3, layers=2, num_experts=4, top_k=1)
    trace = make_trace(problems, 4, prompts=[f"prompt {number // 2}" for number in range(40)])
    sides = {part: set(load_routes(trace, part).problem_ids_T.tolist()) for part in ("train", "validation", "test")}
    assert set.union(*sides.values()) == set(range(40))
    assert sum(map(len, sides.values())) == 40
    for problem_ids in sides.values():
        assert {problem_id ^ 1 for problem_id in problem_ids} == problem_ids


def test_routes_know_vocabulary_phase_and_predecessor(make_trace: MakeTrace, random_problems: MakeProblems) -> None:
    problems = random_problems(count=2, tokens=3, layers=2, num_experts=4, top_k=1)
    vocab = [np.array([5, 6, 7, 8]), np.array([1, 2, 3, 4])]
    routes = load_routes(make_trace(problems, 4, vocab_ids=vocab, prompt_tokens=2), "all")
    assert routes.token_keys_T.tolist() == [5, 6, 7, 1, 2, 3]
    assert routes.is_decode_T.tolist() == [False, False, True] * 2
    assert routes.previous_T.tolist() == [-1, 0, 1, -1, 3, 4]


def test_first_tokens_have_no_predecessor_even_if_problems_touch() -> None:
    ids = np.zeros((4, 1, 1), np.uint8)
    chunk = RoutingChunk(np.array([0, 0, 1, 1], np.int32), np.array([0, 1, 2, 3], np.int32), ids, ids.astype(np.float16))
    routes: Routes = make_routes(chunk)
    assert routes.previous_T.tolist() == [-1, 0, -1, 2]


def test_a_part_without_problems_is_an_error(make_trace: MakeTrace, random_problems: MakeProblems) -> None:
    trace = make_trace(random_problems(count=1, tokens=3, layers=2, num_experts=4, top_k=1), 4)
    empty = next(part for part in ("train", "test") if part != part_of("prompt 0"))
    with pytest.raises(TraceError, match=f"no problem falls into the {empty} part"):
        load_routes(trace, empty)


def test_a_part_whose_problems_are_all_left_out_is_an_error_of_its_own(
    make_trace: MakeTrace, random_problems: MakeProblems
) -> None:
    trace = make_trace(random_problems(count=20, tokens=3, layers=2, num_experts=4, top_k=1), 4)
    test = load_routes(trace, "test")
    without = route_digests(trace, test)
    assert set(load_routes(trace, "all", without=without).problem_ids_T).isdisjoint(test.problem_ids_T)
    with pytest.raises(EmptyPartError, match="all its problems of the test part are also among those that it must not share"):
        load_routes(trace, "test", without=without)


def test_targets_by_hand() -> None:
    """Two problems of three tokens, the second with a gap before its last."""
    ids = np.arange(6 * 3).reshape(6, 3, 1).astype(np.uint8)
    places = np.array([0, 0, 0, 1, 1, 1], np.int32), np.array([0, 1, 2, 0, 1, 5], np.int32)
    routes = make_routes(RoutingChunk(*places, ids, ids.astype(np.float16)))
    assert routes.previous_T.tolist() == [-1, 0, 1, -1, 3, -1]
    assert routes.followers_T.tolist() == [2, 1, 0, 1, 0, 0]

    def about(task: Task, hop: int) -> list[list[int]]:
        shape = Shape(layers=3, experts=18, top_k=1, horizon=1 if task in {Task.WHOLE_PATH, Task.REUSE} else 2, task=task)
        true = targets(routes, shape, np.arange(6), hop)
        found: list[list[int]] = np.where(true.is_valid_TL, true.ids_TLK[:, :, 0].astype(int), -1).tolist()
        return found

    assert about(Task.NEXT_LAYER, 1) == [[3 * t + 1, 3 * t + 2, -1] for t in range(6)]
    assert about(Task.NEXT_LAYER, 2) == [[3 * t + 2, -1, -1] for t in range(6)]
    assert about(Task.WHOLE_PATH, 1) == ids[:, :, 0].tolist()
    nothing = [-1, -1, -1]
    assert about(Task.NEXT_TOKEN, 1) == [[3, 4, 5], [6, 7, 8], nothing, [12, 13, 14], nothing, nothing]
    assert about(Task.NEXT_TOKEN, 2) == [[6, 7, 8], *[nothing] * 5]


def test_tasks_have_their_own_horizons() -> None:
    shape_of = partial(Shape, layers=3, experts=8, top_k=2)
    assert shape_of(horizon=7, task=Task.NEXT_TOKEN).target_layers(7).tolist() == [0, 1, 2]
    with pytest.raises(SpecmoeError, match="whole-path has no horizon to choose, expected 1"):
        shape_of(horizon=2, task=Task.WHOLE_PATH)
    with pytest.raises(SpecmoeError, match="expected 1 to 2 for 3 MoE layers"):
        shape_of(horizon=3)
