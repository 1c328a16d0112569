"""Offloading changes no output: every family, any cache, policy and predictor, any batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.offloaded import greedy, logits, plain_model, resident_model

from profiler.errors import EngineError, SpecmoeError
from profiler.models.resolve import demo_model_folder
from speculation.offload.state import Rule
from speculation.runtime import CacheSize, OffloadedModel
from vllm_patch.check.families import make

# Of each kind of experts: stacked or one by one in the checkpoint, transposed, with biases, without a gate, and of each kind of
# block around them: shared experts, experts next to a dense layer, hybrid attention.
FAMILIES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "granitemoeshared",
    "phimoe",
    "ernie4_5_moe",
    "gemma4",
    "jamba",
    "nemotron_h",
    "qwen3_next",
    "mixtral_one_expert",
)
PROMPT = [17, 301, 44, 45, 46, 301, 44, 9, 120]
RULES = [rule.label for rule in Rule if rule not in (Rule.BELADY, Rule.LEARNED)]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_equal_and_so_are_the_tokens_of_plain_transformers(family: str, tmp_path: Path) -> None:
    folder = make(family, tmp_path)
    with OffloadedModel.load(str(folder), CacheSize(fraction=0.5), store="disk", dtype="float32", device="cpu") as offloaded:
        tokens_BT = torch.tensor([PROMPT])
        assert torch.equal(logits(offloaded.model, tokens_BT), logits(resident_model(folder), tokens_BT))
        (generation,) = offloaded.generate([PROMPT], max_new_tokens=8, ignore_eos=True)
        assert generation.token_ids == greedy(plain_model(folder), PROMPT, 8)
        assert offloaded.experts.decode.tokens == 7
        # The cache is smaller than the layer, so something was loaded.
        assert offloaded.experts.transfers.counts.transfers > 0


@pytest.mark.parametrize("family", ["dbrx", "llama4", "longcat_flash"])
def test_experts_of_another_form_are_refused_by_name(family: str, tmp_path: Path) -> None:
    folder = make(family, tmp_path)
    with pytest.raises(EngineError, match="Experts, which does not use the experts interface of transformers"):
        OffloadedModel.load(str(folder), CacheSize(fraction=0.5), device="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("store", ["ram", "disk"])
def test_every_type_and_store_gives_what_resident_experts_give(dtype: str, store: str) -> None:
    """The embedded model is stored in bfloat16: other types are converted when they are read."""
    folder = demo_model_folder()
    with OffloadedModel.load("demo", CacheSize(fraction=0.25), store=store, dtype=dtype, device="cpu") as offloaded:
        tokens_BT = torch.tensor([PROMPT])
        resident = resident_model(folder, getattr(torch, dtype))
        assert torch.equal(logits(offloaded.model, tokens_BT), logits(resident, tokens_BT))
        (generation,) = offloaded.generate([PROMPT], max_new_tokens=12, ignore_eos=True)
        assert generation.token_ids == greedy(resident, PROMPT, 12)


@settings(max_examples=12)
@given(
    slots=st.integers(2, 8),
    rule=st.sampled_from(RULES),
    predictor=st.sampled_from([None, "next-gate"]),
    store=st.sampled_from(["ram", "disk"]),
    prompts=st.lists(st.lists(st.integers(2, 3000), min_size=1, max_size=20), min_size=1, max_size=3),
)
def test_no_cache_policy_or_predictor_changes_a_token(
    slots: int, rule: str, predictor: str | None, store: str, prompts: list[list[int]]
) -> None:
    resident = _resident_demo()
    size = CacheSize(fraction=slots / 8)
    with OffloadedModel.load(
        "demo", size, store=store, policy=rule, predictor=predictor, device="cpu", dtype="float32"
    ) as offloaded:
        for prompt, generation in zip(prompts, offloaded.generate(prompts, max_new_tokens=6, ignore_eos=True), strict=True):
            assert generation.token_ids == greedy(resident, prompt, 6)


def test_without_a_cache_every_expert_is_loaded(mixtral: Path) -> None:
    with OffloadedModel.load(str(mixtral), CacheSize(fraction=0), store="disk", dtype="float32", device="cpu") as offloaded:
        (generation,) = offloaded.generate([PROMPT], max_new_tokens=6, ignore_eos=True)
        assert generation.token_ids == greedy(resident_model(mixtral), PROMPT, 6)
        decode = offloaded.experts.decode
        assert decode.hits == 0
        assert decode.misses == decode.streamed == decode.requested == 5 * 3 * 2


def test_misses_computed_on_the_host_change_no_token(mixtral: Path) -> None:
    with OffloadedModel.load(
        str(mixtral), CacheSize(fraction=0.5), miss="host", store="ram", dtype="float32", device="cpu"
    ) as offloaded:
        (generation,) = offloaded.generate([PROMPT], max_new_tokens=12, ignore_eos=True)
        assert generation.token_ids == greedy(resident_model(mixtral), PROMPT, 12)
        decode = offloaded.experts.decode
        assert decode.host == decode.misses > 0
        # They were copied into the cache in the background, and found there later.
        offloaded.experts.transfers.settle()
        assert offloaded.experts.transfers.counts.prefetched > 0
    with pytest.raises(SpecmoeError, match="host with experts in ram"):
        OffloadedModel.load(str(mixtral), CacheSize(fraction=0.5), miss="host", store="disk", device="cpu")


def test_prompts_of_different_lengths_are_computed_together(mixtral: Path) -> None:
    """Left-padded, as transformers does it: a padded position, and a sequence that has ended, need no experts."""
    prompts = [PROMPT, PROMPT[:2], [5] * 14]
    with OffloadedModel.load(str(mixtral), CacheSize(fraction=0.75), store="ram", dtype="float32", device="cpu") as offloaded:
        together = offloaded.generate(prompts, max_new_tokens=6, batch=3, ignore_eos=True)
        assert offloaded.experts.prefill.tokens == sum(map(len, prompts))
        assert offloaded.experts.decode.tokens == 3 * 5
        alone = offloaded.generate(prompts, max_new_tokens=6, batch=1, ignore_eos=True)
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]


def test_sampling_under_a_seed_draws_the_same_tokens(mixtral: Path) -> None:
    found = []
    for fraction, policy in ((0.5, "lru"), (1.0, "lru"), (0.75, "ewma")):
        size = CacheSize(fraction=fraction)
        with OffloadedModel.load(str(mixtral), size, policy=policy, dtype="float32", device="cpu") as offloaded:
            drawn = offloaded.generate([PROMPT], max_new_tokens=16, temperature=1.0, seed=3, ignore_eos=True)[0].token_ids
            other = offloaded.generate([PROMPT], max_new_tokens=16, temperature=1.0, seed=4, ignore_eos=True)[0].token_ids
        assert drawn != other
        found.append(drawn)
    torch.manual_seed(3)
    resident = resident_model(mixtral)
    prompt_BT = torch.tensor([PROMPT])
    drawn_BT = resident.generate(prompt_BT, max_new_tokens=16, do_sample=True, temperature=1.0, eos_token_id=None)
    expected = [int(token) for token in drawn_BT[0, len(PROMPT) :]]
    assert found == [expected, expected, expected]


def test_a_sequence_ends_with_its_end_token(mixtral: Path) -> None:
    """The end token of the checkpoint is set to a token that the model generates."""
    with OffloadedModel.load(str(mixtral), CacheSize(fraction=0.5), dtype="float32", device="cpu") as offloaded:
        (free,) = offloaded.generate([PROMPT], max_new_tokens=8, ignore_eos=True)
        offloaded.model.generation_config.eos_token_id = free.token_ids[3]
        first = free.token_ids.index(free.token_ids[3])
        ended, other = offloaded.generate([PROMPT, [5] * 9], max_new_tokens=8, batch=2)
    assert ended.token_ids == free.token_ids[: first + 1]
    assert ended.finish_reason == "stop"
    assert len(other.token_ids) <= 8


def test_a_long_prompt_is_computed_in_parts(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [3 + place % 500 for place in range(50)]
    expected = greedy(plain_model(mixtral), prompt, 4)
    monkeypatch.setattr("speculation.runtime.model.PREFILL_TOKENS", 16)
    with OffloadedModel.load(str(mixtral), CacheSize(fraction=0.5), dtype="float32", device="cpu") as offloaded:
        hits_R: list[int] = []
        offloaded.experts.hits_R = hits_R
        (generation,) = offloaded.generate([prompt], max_new_tokens=4, ignore_eos=True)
        # Four parts of three layers, then three tokens.
        assert len(hits_R) == (4 + 3) * 3
        assert offloaded.experts.decode.tokens == 3
    assert generation.token_ids == expected


def test_prompts_that_a_model_cannot_continue(mixtral: Path) -> None:
    with OffloadedModel.load(str(mixtral), CacheSize(fraction=0.5), dtype="float32", device="cpu") as offloaded:
        for prompt, message in (
            ([], "prompt 1 is empty"),
            ([512], "has token 512: the model knows tokens from 0 to 511"),
            ([-1], "the model knows tokens from 0 to 511"),
            ([1] * 1020, "more than the 1024 that the model allows"),
            ("text", "this checkpoint has no tokenizer"),
        ):
            with pytest.raises(SpecmoeError, match=message):
                offloaded.generate([PROMPT, prompt], max_new_tokens=8)
        assert offloaded.experts.prefill.tokens == 0


_RESIDENT: dict[str, object] = {}


def _resident_demo() -> object:
    if not _RESIDENT:
        _RESIDENT["demo"] = resident_model(demo_model_folder())
    return _RESIDENT["demo"]
