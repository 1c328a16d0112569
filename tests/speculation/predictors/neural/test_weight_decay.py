"""Weight decay shrinks matrices, and no bias or scale, however many dimensions it has."""

from __future__ import annotations

import pytest

from speculation.data.tasks import Shape
from speculation.predictors.neural.base import NeuralPredictor
from speculation.predictors.neural.training_loop import _decay_groups
from speculation.predictors.registry import predictor_classes

NEURAL = {name: cls for name, cls in predictor_classes().items() if issubclass(cls, NeuralPredictor)}


@pytest.mark.parametrize("name", NEURAL)
def test_biases_and_scales_do_not_decay(name: str) -> None:
    cls = NEURAL[name]
    network = cls(Shape(layers=3, experts=4, top_k=2, horizon=1, task=min(cls.tasks))).network
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decaying, others = ({names[id(each)] for each in group["params"]} for group in _decay_groups(network, 0.1))
    assert decaying | others == set(names.values())
    assert not decaying & others
    assert "bias_LHE" in others
    # Of what has several dimensions, nothing but biases and scales is left out.
    parameters = dict(network.named_parameters())
    assert {name.rpartition(".")[2] for name in others if parameters[name].ndim >= 2} <= {"bias_LHE", "norm_scale", "scale"}
    assert not any("bias" in name.rpartition(".")[2] or parameters[name].ndim < 2 for name in decaying)
