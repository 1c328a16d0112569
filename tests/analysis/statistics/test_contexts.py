"""Statistics of contexts by hand, at chance, and on routing of known predictability; and the tokens that experts prefer."""

from __future__ import annotations

import numpy as np
import pytest
from support.frames import counted, make_axes, make_frame, uniform

from analysis.counts.contexts import (
    LAYER_AND_TOKEN,
    NO_CONTEXT,
    PREVIOUS_LAYER,
    PREVIOUS_TOKEN,
    TOKEN,
    TWO_LAYERS,
    ContextCounts,
)
from analysis.statistics.contexts import TASKS, context_statistics, preferred_tokens


def test_contexts_by_hand() -> None:
    # Two tokens, three layers, top-1.
    problem = np.array([[[0], [1], [2]], [[1], [1], [0]]])
    axes = make_axes(3, 3, 1, vocabulary=(7, 9))
    counts = counted(ContextCounts(axes), [make_frame([problem], 3, vocab=[np.array([1, 2])])])

    def seen(name: str) -> list[list[int]]:
        """[layer, context, expert] of everything that was counted."""
        found: list[list[int]] = np.argwhere(counts.strongest[name][0, :, :, :3] == 1).tolist()
        return found

    assert seen(PREVIOUS_LAYER) == [[1, 0, 1], [1, 1, 1], [2, 1, 0], [2, 1, 2]]
    assert seen(PREVIOUS_TOKEN) == [[0, 0, 1], [1, 1, 1], [2, 2, 0]]
    # The layer before, then the one before that.
    assert seen(TWO_LAYERS) == [[2, 3, 2], [2, 4, 0]]
    assert seen(LAYER_AND_TOKEN) == [[1, 4, 1], [2, 5, 0]]
    # The second token is not in the vocabulary: the last row.
    assert seen(TOKEN) == [[0, 1, 0], [0, 2, 1], [1, 1, 1], [1, 2, 1], [2, 1, 2], [2, 2, 0]]
    assert counts.strongest[NO_CONTEXT][0, 1, 0].tolist() == [0, 2, 0, 0]


def test_independent_uniform_routing_tells_nothing() -> None:
    experts, top_k = 8, 2
    problems = np.split(uniform(np.random.default_rng(0), 40_000, 3, experts, top_k), 40)
    found = context_statistics(counted(ContextCounts(make_axes(3, experts, top_k)), [make_frame(problems, experts)]), top_k)
    one = -0.25 * np.log2(0.25) - 0.75 * np.log2(0.75)
    for given in found:
        assert given.recall_held_out == pytest.approx(top_k / experts, abs=0.01), given.context
        assert given.top1_held_out == pytest.approx(1 / experts, abs=0.01), given.context
        for bits in (given.first_bits_plug_in, given.first_bits_held_out):
            assert bits == pytest.approx(3.0, abs=0.03), given.context
        for bits in (given.set_bits_plug_in, given.set_bits_held_out):
            assert bits == pytest.approx(8 * one, abs=0.03), given.context
        assert given.recall_plug_in >= given.recall_held_out
        assert given.first_bits_plug_in <= given.first_bits_held_out


def test_a_known_markov_router_is_bracketed() -> None:
    """Of a router whose next layer's expert is drawn from a known row, both estimates enclose the true entropy and top-1."""
    random = np.random.default_rng(1)
    matrix = random.dirichlet(np.full(6, 0.4), size=6)
    layers = [random.integers(0, 6, 20_000)]
    for _ in range(2):
        layers.append((random.random(20_000)[:, None] > matrix[layers[-1]].cumsum(1)).sum(1))
    frame = make_frame(np.split(np.stack(layers, 1)[:, :, None], 40), 6)
    found = {given.context: given for given in context_statistics(counted(ContextCounts(make_axes(3, 6, 1)), [frame]), 1)}
    weight = np.bincount(layers[1], minlength=6) / 20_000
    entropy = -(weight[:, None] * matrix * np.log2(np.maximum(matrix, 1e-12))).sum()
    best = (weight * matrix.max(1)).sum()
    given = found[PREVIOUS_LAYER]
    assert given.first_bits_plug_in - 0.03 < entropy < given.first_bits_held_out + 0.03
    assert given.first_bits_held_out - given.first_bits_plug_in < 0.02
    assert given.top1_held_out - 0.01 < best < given.top1_plug_in + 0.01
    # The layer before that adds nothing, but its table is sparser: worse held out, better plug-in.
    assert found[TWO_LAYERS].first_bits_held_out >= given.first_bits_held_out - 0.005
    assert found[NO_CONTEXT].first_bits_held_out > given.first_bits_held_out + 0.1


def test_what_only_training_problems_have_is_not_knowledge() -> None:
    """Tokens that each occur in one problem only: plug-in thinks it knows everything, held out it knows nothing."""
    random = np.random.default_rng(2)
    problems = [uniform(random, 1, 1, 8, 1) for _ in range(2000)]
    vocab = [np.array([number]) for number in range(2000)]
    axes = make_axes(1, 8, 1, vocabulary=tuple(range(2000)))
    found = context_statistics(counted(ContextCounts(axes), [make_frame(problems, 8, vocab=vocab)]), 1)
    token = next(given for given in found if given.context == TOKEN)
    assert token.recall_plug_in == 1.0
    assert token.recall_held_out == pytest.approx(1 / 8, abs=0.05)


def test_every_task_knows_some_context() -> None:
    assert all(NO_CONTEXT in known for known in TASKS.values())
    assert PREVIOUS_LAYER not in TASKS["whole-path"]
    assert TOKEN not in TASKS["next-token"]


def test_an_expert_s_own_token_is_found() -> None:
    """Token 3 always goes to expert 5, others anywhere."""
    random = np.random.default_rng(3)
    ids = uniform(random, 5000, 2, 8, 2)
    vocab = random.integers(0, 20, 5000)
    own = vocab == 3
    ids[own, 1] = [5, 0]
    axes = make_axes(2, 8, 2, vocabulary=tuple(range(20)))
    counts = counted(ContextCounts(axes), [make_frame([ids], 8, vocab=[vocab])])
    preferred = preferred_tokens(counts)
    assert preferred is not None
    assert preferred.place[1, 5, 0] == 3
    everywhere = (ids[:, 1] == 5).any(1).mean()
    assert preferred.lift[1, 5, 0] == pytest.approx(1 / everywhere)
    assert preferred.count[1, 5, 0] == own.sum()
    # At layer 0 no token is preferred by much.
    assert preferred.lift[0].max() < 1.6


def test_without_tokens_nothing_is_preferred() -> None:
    assert preferred_tokens(ContextCounts(make_axes(2, 4, 1))) is None
