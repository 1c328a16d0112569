"""Results token by token, as they are stored and read."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from analysis.documents.token_results import CachedProblem, PredictedProblem


def test_predictions_are_read_as_they_were_written() -> None:
    random = np.random.default_rng(0)
    ids_TLK = random.random((5, 3, 130)).argsort(-1)[..., :4]
    is_known_TL = random.random((5, 3)) < 0.7
    problem = PredictedProblem.of(2**64 - 1, np.arange(5) + 7, ids_TLK, is_known_TL)
    read = PredictedProblem.model_validate_json(problem.model_dump_json())
    assert (read.digest, read.token_ids) == (2**64 - 1, [7, 8, 9, 10, 11])
    expected = np.where(is_known_TL[..., None], ids_TLK, 130)
    np.testing.assert_array_equal(read.predicted(layers=3, top_k=4, num_experts=130), expected)
    # Of a model of other sizes.
    for sizes in ((2, 4, 130), (3, 3, 130), (3, 4, 129 if (expected == 129).any() else 5)):
        assert read.predicted(layers=sizes[0], top_k=sizes[1], num_experts=sizes[2]) is None


def test_outcomes_are_read_as_they_were_written() -> None:
    outcomes_TLK = np.random.default_rng(0).integers(0, 4, (5, 3, 2))
    problem = CachedProblem.of(1, np.arange(5), outcomes_TLK)
    read = CachedProblem.model_validate_json(problem.model_dump_json())
    np.testing.assert_array_equal(read.outcomes(layers=3, top_k=2), outcomes_TLK)
    assert read.outcomes(layers=2, top_k=3) is None
    assert read.outcomes(layers=3, top_k=3) is None


@pytest.mark.parametrize("experts", [["1,2"], ["1,2", "x"], ["1,2", ""], ["1,2", "1,,2"], ["1,2", "999999"], ["1,2", "1 -1"]])
def test_predictions_that_are_none_are_refused(experts: list[str]) -> None:
    with pytest.raises(ValidationError):
        PredictedProblem(digest=0, token_ids=[0, 1], experts=experts)


@pytest.mark.parametrize("experts", [["hh"], ["hh", "hx"], ["hh", ""], ["hh", "h  h"]])
def test_outcomes_that_are_none_are_refused(experts: list[str]) -> None:
    with pytest.raises(ValidationError):
        CachedProblem(digest=0, token_ids=[0, 1], experts=experts)
