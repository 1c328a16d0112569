"""Networks are stored in half precision, without losing weights that it has no room for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from speculation.data.tasks import Shape
from speculation.predictors.base import stored_weights
from speculation.predictors.neural.base import PREFIX, NeuralPredictor
from speculation.predictors.registry import predictor_classes

NEURAL = {name: cls for name, cls in predictor_classes().items() if issubclass(cls, NeuralPredictor)}


@pytest.mark.parametrize("name", NEURAL)
def test_weights_of_any_size_survive_storage(name: str) -> None:
    cls = NEURAL[name]
    predictor = cls(Shape(layers=3, experts=4, top_k=2, horizon=1, task=min(cls.tasks)))
    names = [name for name, tensor in predictor.network.state_dict().items() if tensor.numel()]
    for number, value in ((0, 65504.0), (len(names) // 2, -65536.0), (-1, 3e38)):
        predictor.network.state_dict()[names[number]].view(-1)[-1] = value
    again = cls.restore(predictor.shape, predictor.settings(), predictor.arrays())
    before, after = predictor.network.state_dict(), again.network.state_dict()
    for each in names:
        assert after[each].isfinite().all()
        # Those that fit are rounded; if one of a tensor does not, none is.
        is_rounded = before[each].abs().max() <= 65504
        assert torch.equal(after[each], before[each].half().float() if is_rounded else before[each])
    assert {array.dtype for key, array in predictor.arrays().items() if key.startswith(PREFIX)} == {
        np.dtype(np.float16), np.dtype(np.float32)
    }  # fmt: skip


@pytest.mark.parametrize("value", [0.0, 65504.0, -65504.0, 65505.0, -1e30])
def test_weights_are_stored_in_half_precision_where_they_fit(value: float) -> None:
    found = stored_weights(np.array([0.5, value], dtype=np.float32))
    assert found.dtype == (np.float16 if abs(value) <= 65504 else np.float32)
    assert found.tolist() == pytest.approx([0.5, value], rel=1e-6)
    assert stored_weights(np.zeros(0, dtype=np.float32)).dtype == np.float16
