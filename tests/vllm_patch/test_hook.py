"""Finding and wrapping routers, labels from both runner generations, and refusals; on stand-ins with vLLM's attributes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_patch import plugin
from vllm_patch.hook import UnsupportedModelError, refuse_unsupported, wrap_routers
from vllm_patch.steps import label_rows


class Router:
    """A router as vLLM's: `_compute_routing` returns (weights, ids)."""

    def __init__(self, top_k: int, shift: int) -> None:
        self.top_k = top_k
        self.shift = shift

    def _compute_routing(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids = (torch.arange(len(hidden))[:, None] + torch.arange(self.top_k) + self.shift) % 4
        return ids.float() / 10, ids


class Layer(torch.nn.Module):
    """An MoE layer as vLLM's."""

    def __init__(self, layer_id: int, top_k: int = 2, monolithic: bool = False) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.router = Router(top_k, layer_id)
        self.is_monolithic = monolithic
        self.moe_config = SimpleNamespace(num_logical_experts=4)


def test_each_layer_writes_its_own_column_and_results_are_unchanged() -> None:
    model = torch.nn.Sequential(Layer(5), torch.nn.Linear(2, 2), Layer(3))
    recorder = wrap_routers(model, max_tokens=6, device=torch.device("cpu"))
    assert (recorder.moe_layers, recorder.num_experts, recorder.top_k) == ([3, 5], 4, 2)
    for layer in (model[0], model[2]):
        weights, ids = layer.router._compute_routing(torch.zeros(3, 2))
        column = recorder.moe_layers.index(layer.layer_id)
        assert (recorder.expert_ids_TLK[:3, column] == ids).all()
        assert (recorder.weights_TLK[:3, column] == weights).all()
    assert (recorder.expert_ids_TLK[3:] == -1).all()


def test_models_that_cannot_be_recorded_are_refused() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(UnsupportedModelError, match="no MoE layer"):
        wrap_routers(torch.nn.Linear(2, 2), max_tokens=1, device=cpu)
    with pytest.raises(UnsupportedModelError, match="layer 1 uses a kernel that routes internally"):
        wrap_routers(torch.nn.Sequential(Layer(0), Layer(1, monolithic=True)), max_tokens=1, device=cpu)
    with pytest.raises(UnsupportedModelError, match="differ"):
        wrap_routers(torch.nn.Sequential(Layer(0), Layer(1, top_k=3)), max_tokens=1, device=cpu)


@pytest.mark.parametrize(
    ("parallel", "speculative", "text"),
    [
        ({"pipeline_parallel_size": 2}, None, "pipeline_parallel_size=1"),
        ({"data_parallel_size": 2}, None, "data_parallel_size=1"),
        ({"enable_dbo": True}, None, "enable-dbo"),
        ({}, object(), "speculative"),
    ],
)
def test_settings_that_would_mislabel_rows_are_refused(parallel: dict, speculative: object, text: str) -> None:
    defaults = {"pipeline_parallel_size": 1, "data_parallel_size": 1, "enable_dbo": False}
    config = SimpleNamespace(parallel_config=SimpleNamespace(**(defaults | parallel)), speculative_config=speculative)
    with pytest.raises(UnsupportedModelError, match=text):
        refuse_unsupported(config)


def scheduled(tokens: dict[str, int], new: dict[str, dict | None] | None = None, finished: tuple[str, ...] = ()) -> object:
    return SimpleNamespace(
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
        scheduled_new_reqs=[
            SimpleNamespace(req_id=r, sampling_params=SimpleNamespace(extra_args=e)) for r, e in (new or {}).items()
        ],
        finished_req_ids=set(finished),
    )


def test_labels_follow_the_runners_row_order_not_the_schedulers() -> None:
    output = scheduled({"a": 1, "b": 3}, new={"b": {"problem_id": 7}, "c": None, "d": {"problem_id": "x"}}, finished=("z",))
    first = SimpleNamespace(
        input_batch=SimpleNamespace(req_ids=["b", "a", None], num_reqs=2, num_computed_tokens_cpu=np.array([0, 9, 99]))
    )
    batch = SimpleNamespace(req_ids=["b", "a"], num_computed_tokens_np=np.array([0, 9]))
    second = SimpleNamespace(execute_model_state=SimpleNamespace(input_batch=batch))
    for runner in (first, second):
        step = label_rows(runner, output)
        assert step.spans == [("b", 0, 3), ("a", 9, 1)]
        assert step.problem_ids == {"b": 7, "c": None, "d": None}
        assert step.finished == {"z"}


def test_a_step_without_tokens_has_no_rows() -> None:
    assert label_rows(SimpleNamespace(), scheduled({}, finished=("a",))).spans == []


def test_the_plugin_touches_nothing_unless_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess
    import sys

    monkeypatch.delenv(plugin.ENVIRONMENT_VARIABLE, raising=False)
    code = "import sys; from vllm_patch.plugin import register; register(); assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_plugin_is_found_by_its_entry_point() -> None:
    from importlib.metadata import entry_points

    (found,) = (e for e in entry_points(group="vllm.general_plugins") if e.name == "specmoe")
    assert found.load() is plugin.register
