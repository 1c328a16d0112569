"""The target of the task `reuse`."""

from __future__ import annotations

import math

import numpy as np
import pytest
from support.routes import routes_of

from speculation.data.next_use import FADE, FARTHEST, discounted_use


def test_the_discounted_next_use_is_that_of_a_plain_loop() -> None:
    routes = routes_of([(0, 100), (0, 50)])
    tokens_T = np.array([0, 5, 98, 99, len(routes) - 1])
    found = discounted_use(routes.expert_ids_TLK, routes.followers_T, tokens_T, 8, FADE)
    for row, token in enumerate(tokens_T.tolist()):
        last = min(token + int(routes.followers_T[token]), token + int(FARTHEST * FADE))
        for layer in range(2):
            for expert in range(8):
                later = [at for at in range(token + 1, last + 1) if expert in routes.expert_ids_TLK[at, layer]]
                expected = math.exp(-(later[0] - token - 1) / FADE) if later else 0.0
                assert found[row, layer, expert] == pytest.approx(expected, abs=1e-6)
    # After the last token of a problem, nothing is used.
    assert not found[3].any()
    assert not found[4].any()
