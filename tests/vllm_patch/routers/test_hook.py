"""Finding and wrapping routers, labels from both runner generations, and refusals; on stand-ins with vLLM's attributes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_patch import plugin
from vllm_patch.capture.steps import label_rows
from vllm_patch.releases import resolve_hook
from vllm_patch.routers.hook import UnsupportedModelError, _copying, find_moe_layers, refuse_unsupported
from vllm_patch.routers.kernels import KernelChoices


class Router:
    """A router as vLLM's from 0.15 on: `_compute_routing` returns (weights, ids)."""

    def __init__(self, top_k: int, shift: int) -> None:
        self.top_k = top_k
        self.shift = shift

    def _compute_routing(self, hidden: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids = (torch.arange(len(hidden))[:, None] + torch.arange(self.top_k) + self.shift) % 4
        return ids.float() / 10, ids


class Layer(torch.nn.Module):
    """An MoE layer as vLLM's."""

    def __init__(self, layer_id: int, top_k: int = 2, monolithic: bool = False) -> None:
        super().__init__()
        self.layer_name = f"model.layers.{layer_id}.mlp.experts"
        self.router = Router(top_k, layer_id)
        self.is_monolithic = monolithic
        self.moe_config = SimpleNamespace(num_logical_experts=4)


class OldLayer(torch.nn.Module):
    """An MoE layer as vLLM's in 0.12: it chooses experts itself and returns a third value."""

    def __init__(self, layer_id: int, enable_eplb: bool = False) -> None:
        super().__init__()
        self.layer_name = f"model.layers.{layer_id}.block_sparse_moe.experts"
        self.top_k, self.logical_num_experts, self.enable_eplb = 2, 4, enable_eplb

    def select_experts(
        self, hidden_states: torch.Tensor, router_logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        return router_logits[:, :2], torch.tensor([[1, 3]] * len(hidden_states)), None


ROUTER_HOOK = resolve_hook("0.32.0", cpu=False)
OLD_HOOK = resolve_hook("0.12.0", cpu=False)


def test_each_layer_copies_what_it_chose_and_returns_it_unchanged() -> None:
    first = Layer(5)
    model = torch.nn.Sequential(first, torch.nn.Linear(2, 2), Layer(3))
    layers = find_moe_layers(model, ROUTER_HOOK)
    assert [(layer.index, layer.num_experts, layer.top_k) for layer in layers] == [(3, 4, 2), (5, 4, 2)]
    assert [layer.name for layer in layers] == ["2", "0"]
    copied = []
    for layer in layers:
        layer.module.router._compute_routing = _copying(
            layer.module.router._compute_routing, lambda *tensors, index=layer.index: copied.append((index, tensors))
        )
    hidden, logits = torch.zeros(3, 2), torch.ones(3, 4)
    weights, ids = first.router._compute_routing(hidden, logits)
    (index, tensors), *rest = copied
    assert index == 5
    assert not rest
    assert all(a is b for a, b in zip(tensors, (hidden, logits, weights, ids), strict=True))


def test_releases_that_choose_in_the_layer_itself_are_wrapped_there() -> None:
    model = torch.nn.Sequential(OldLayer(1), OldLayer(2))
    layers = find_moe_layers(model, OLD_HOOK)
    assert [(layer.index, layer.num_experts, layer.top_k) for layer in layers] == [(1, 4, 2), (2, 4, 2)]
    with pytest.raises(UnsupportedModelError, match="disable EPLB"):
        find_moe_layers(torch.nn.Sequential(OldLayer(1, enable_eplb=True)), OLD_HOOK)


def test_the_form_of_0_14_has_its_own_name_for_the_choice() -> None:
    class Layer14(OldLayer):
        select_experts = property()

        def __init__(self, layer_id: int) -> None:
            super().__init__(layer_id)
            self.router = SimpleNamespace(select_experts=lambda: None)

        def _select_experts(self, hidden_states: torch.Tensor, router_logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return router_logits[:, :2], torch.tensor([[1, 3]] * len(hidden_states))

    (layer,) = find_moe_layers(torch.nn.Sequential(Layer14(3)), resolve_hook("0.14.1", cpu=False))
    assert (layer.index, layer.num_experts, layer.top_k) == (3, 4, 2)


def test_zero_experts_are_refused() -> None:
    class ZeroExpertRouter(Router):
        pass

    layer = Layer(0)
    layer.router = ZeroExpertRouter(2, 0)
    with pytest.raises(UnsupportedModelError, match="zero experts"):
        find_moe_layers(torch.nn.Sequential(layer), ROUTER_HOOK)


@pytest.mark.parametrize(
    ("place", "name", "text"),
    [
        ("cache_config", "kv_sharing_fast_prefill", "fast prefill"),
        ("model_config", "enable_prompt_embeds", "prompt embeddings"),
        ("model_config", "is_diffusion", "diffusion"),
    ],
)
def test_engines_that_skip_or_repeat_positions_are_refused(place: str, name: str, text: str) -> None:
    config = make_config(pipeline_parallel_size=1, data_parallel_size=1, tensor_parallel_size=1)
    setattr(getattr(config, place), name, True)
    with pytest.raises(UnsupportedModelError, match=text):
        refuse_unsupported(config)


def test_a_runner_inside_its_layer_counts_once() -> None:
    layer = Layer(0)
    layer.runner = Layer(0)
    layer.runner.router = layer.router
    assert [found.name for found in find_moe_layers(torch.nn.Sequential(layer), ROUTER_HOOK)] == ["0"]


def test_models_that_cannot_be_recorded_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no MoE layer"):
        find_moe_layers(torch.nn.Linear(2, 2), ROUTER_HOOK)
    with pytest.raises(UnsupportedModelError, match="layer 1 uses a kernel that routes internally"):
        find_moe_layers(torch.nn.Sequential(Layer(0), Layer(1, monolithic=True)), ROUTER_HOOK)
    with pytest.raises(UnsupportedModelError, match="differ"):
        find_moe_layers(torch.nn.Sequential(Layer(0), Layer(1, top_k=3)), ROUTER_HOOK)
    with pytest.raises(UnsupportedModelError, match="several MoE layers in one"):
        find_moe_layers(torch.nn.Sequential(Layer(0), Layer(0)), ROUTER_HOOK)


def test_a_kernel_that_routes_internally_is_named_with_what_to_do() -> None:
    class Fused:
        pass

    class RoutedExperts(torch.nn.Module):
        quant_method = SimpleNamespace(experts_cls=Fused)

    layer = Layer(3, monolithic=True)
    layer.routed_experts = RoutedExperts()
    with pytest.raises(UnsupportedModelError, match=r"layer 3 uses .* internally \(Fused\): use vLLM 0\.20 or newer"):
        find_moe_layers(torch.nn.Sequential(layer), ROUTER_HOOK)

    class Chosen(KernelChoices):
        def advice(self, kernel: str) -> str:
            return f"use another one than {kernel}"

    with pytest.raises(UnsupportedModelError, match=r"\(Fused\): use another one than Fused"):
        find_moe_layers(torch.nn.Sequential(layer), ROUTER_HOOK, Chosen())


def make_config(**parallel: object) -> SimpleNamespace:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        speculative_config=None,
        cache_config=SimpleNamespace(),
        model_config=SimpleNamespace(),
    )


@pytest.mark.parametrize(
    ("parallel", "text"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=1"),
        ({"data_parallel_size": 2}, "data_parallel_size=1"),
        ({"decode_context_parallel_size": 2}, "decode_context_parallel_size=1"),
        ({"prefill_context_parallel_size": 2}, "prefill_context_parallel_size=1"),
        ({"distributed_executor_backend": "ray"}, "distributed_executor_backend='mp'"),
        ({"enable_dbo": True}, "enable_dbo"),
        ({"ubatch_size": 2}, "ubatch_size"),
        ({"enable_expert_parallel": True, "tensor_parallel_size": 2}, "enable_expert_parallel"),
    ],
)
def test_settings_that_would_mislabel_rows_are_refused(parallel: dict[str, object], text: str) -> None:
    defaults = {"pipeline_parallel_size": 1, "data_parallel_size": 1, "tensor_parallel_size": 1, "enable_dbo": False}
    config = make_config(**(defaults | parallel))
    with pytest.raises(UnsupportedModelError, match=text):
        refuse_unsupported(config)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("lora_config", object(), "without enable_lora"),
        ("model_config", SimpleNamespace(runner_type="pooling"), "runner='generate'"),
        ("model_config", SimpleNamespace(enable_prompt_embeds=True), "enable_prompt_embeds=False"),
        ("model_config", SimpleNamespace(enable_sleep_mode=True), "enable_sleep_mode=False"),
        ("model_config", SimpleNamespace(is_diffusion=True), "autoregressive"),
        ("cache_config", SimpleNamespace(kv_sharing_fast_prefill=True), "kv_sharing_fast_prefill=False"),
    ],
)
def test_requests_that_traces_cannot_hold_are_refused(name: str, value: object, text: str) -> None:
    config = make_config(pipeline_parallel_size=1, data_parallel_size=1, tensor_parallel_size=1)
    refuse_unsupported(config)
    setattr(config, name, value)
    with pytest.raises(UnsupportedModelError, match=text):
        refuse_unsupported(config)


def test_tensor_parallelism_and_simulated_routing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(pipeline_parallel_size=1, data_parallel_size=1, tensor_parallel_size=4)
    refuse_unsupported(config)
    monkeypatch.setenv("VLLM_MOE_ROUTING_SIMULATION_STRATEGY", "uniform_random")
    with pytest.raises(UnsupportedModelError, match="simulates"):
        refuse_unsupported(config)


def scheduled(
    tokens: dict[str, int], new: dict[str, dict[str, object] | None] | None = None, finished: tuple[str, ...] = ()
) -> object:
    return SimpleNamespace(
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
        scheduled_new_reqs=[
            SimpleNamespace(
                req_id=r, sampling_params=SimpleNamespace(extra_args=e), prompt_token_ids=[5, 6], num_computed_tokens=1
            )
            for r, e in (new or {}).items()
        ],
        finished_req_ids=set(finished),
    )


def test_labels_follow_the_runners_row_order_not_the_schedulers() -> None:
    output = scheduled(
        {"a": 1, "b": 3},
        new={"b": {"problem_id": 7}, "c": None, "d": {"problem_id": "x"}, "e": {"problem_id": [1]}},
        finished=("z",),
    )
    input_ids = torch.tensor([5, 6, 7, 8])
    first_batch = SimpleNamespace(req_ids=["b", "a", None], num_reqs=2, num_computed_tokens_cpu=np.array([0, 9, 99]))
    first = SimpleNamespace(input_batch=first_batch, input_ids=SimpleNamespace(gpu=input_ids, cpu=None))
    plain_tensor = SimpleNamespace(input_batch=first_batch, input_ids=input_ids)
    batch = SimpleNamespace(req_ids=["b", "a"], num_computed_tokens_np=np.array([0, 9]), input_ids=input_ids)
    second = SimpleNamespace(execute_model_state=SimpleNamespace(input_batch=batch))
    assert label_rows(SimpleNamespace(input_batch=first_batch), output).input_ids is None
    for runner in (first, plain_tensor, second):
        step = label_rows(runner, output)
        assert step.input_ids is input_ids
        assert (step.request_ids, step.starts_B.tolist(), step.rows) == (["b", "a"], [0, 9], 4)
        assert [step.scheduled[request] for request in step.request_ids] == [3, 1]
        assert {new.request_id: new.label for new in step.new} == {"b": 7, "c": None, "d": "x", "e": None}
        assert (step.new[0].prompt_token_ids, step.new[0].cached_tokens) == ([5, 6], 1)
        assert step.finished == {"z"}


def test_a_step_without_tokens_has_no_rows() -> None:
    step = label_rows(SimpleNamespace(), scheduled({}, finished=("a",)))
    assert (step.request_ids, step.rows) == ([], 0)


def test_the_plugin_touches_nothing_unless_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess
    import sys

    for name in ("SPECMOE_CAPTURE", "SPECMOE_LIVE", "SPECMOE_SHADOW"):
        monkeypatch.delenv(name, raising=False)
    heavy = ["vllm", "torch", "numpy", "pyarrow", "pydantic", "typer"]
    code = f"import sys; from vllm_patch.plugin import register; register(); print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_the_plugin_is_found_by_its_entry_point() -> None:
    from importlib.metadata import entry_points

    (found,) = (e for e in entry_points(group="vllm.general_plugins") if e.name == "specmoe")
    assert found.load() is plugin.register
