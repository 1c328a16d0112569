"""Offloading changes no output: every family, any cache, policy and predictor, any batch."""

from __future__ import annotations

import json
import shutil
from functools import cache
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


# Of each kind of experts: matrices `[out, in]`; `[in, out]` with biases; without a gate; next to shared experts, which stay as
# they are.
@pytest.mark.parametrize(
    ("family", "bits"), [("mixtral", 8), ("gpt_oss", 4), ("gpt_oss", 8), ("nemotron_h", 4), ("deepseek_v3", 4)]
)
def test_with_rounded_experts_logits_are_those_of_rounded_resident_experts(family: str, bits: int, tmp_path: Path) -> None:
    folder = make(family, tmp_path)
    size = CacheSize(fraction=0.5)
    with OffloadedModel.load(str(folder), size, expert_bits=bits, dtype="float32", device="cpu") as offloaded:
        tokens_BT = torch.tensor([PROMPT])
        found_BTV = logits(offloaded.model, tokens_BT)
        assert torch.equal(found_BTV, logits(resident_model(folder, expert_bits=bits), tokens_BT))
        assert not torch.equal(found_BTV, logits(resident_model(folder), tokens_BT))


@pytest.mark.parametrize("family", ["dbrx", "llama4", "longcat_flash"])
def test_experts_of_another_form_are_refused_by_name(family: str, tmp_path: Path) -> None:
    folder = make(family, tmp_path)
    with pytest.raises(EngineError, match="Experts, which does not use the experts interface of transformers"):
        OffloadedModel.load(str(folder), CacheSize(fraction=0.5), device="cpu")


@pytest.mark.parametrize(
    ("dtype", "bits"), [("float32", None), ("bfloat16", None), ("float16", None), ("bfloat16", 8), ("float16", 4)]
)
@pytest.mark.parametrize("store", ["ram", "disk"])
def test_every_type_and_store_gives_what_resident_experts_give(dtype: str, bits: int | None, store: str) -> None:
    """The embedded model is stored in bfloat16: other types are converted when they are read."""
    folder, size = demo_model_folder(), CacheSize(fraction=0.25)
    with OffloadedModel.load("demo", size, store=store, dtype=dtype, expert_bits=bits, device="cpu") as offloaded:
        tokens_BT = torch.tensor([PROMPT])
        resident = resident_model(folder, getattr(torch, dtype), bits)
        assert torch.equal(logits(offloaded.model, tokens_BT), logits(resident, tokens_BT))
        (generation,) = offloaded.generate([PROMPT], max_new_tokens=12, ignore_eos=True)
        assert generation.token_ids == greedy(resident, PROMPT, 12)


@settings(max_examples=12)
@given(
    slots=st.integers(2, 8),
    rule=st.sampled_from(RULES),
    predictor=st.sampled_from([None, "next-gate"]),
    store=st.sampled_from(["ram", "disk"]),
    bits=st.sampled_from([None, 8, 4]),
    prompts=st.lists(st.lists(st.integers(2, 3000), min_size=1, max_size=20), min_size=1, max_size=3),
)
def test_no_cache_policy_or_predictor_changes_a_token(
    slots: int, rule: str, predictor: str | None, store: str, bits: int | None, prompts: list[list[int]]
) -> None:
    resident = _resident_demo(bits)
    size = CacheSize(fraction=slots / 8)
    with OffloadedModel.load(
        "demo", size, store=store, policy=rule, predictor=predictor, expert_bits=bits, device="cpu", dtype="float32"
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


@pytest.mark.parametrize("bits", [None, 4])
def test_misses_computed_on_the_host_change_no_token(mixtral: Path, bits: int | None) -> None:
    with OffloadedModel.load(
        str(mixtral), CacheSize(fraction=0.5), miss="host", store="ram", dtype="float32", expert_bits=bits, device="cpu"
    ) as offloaded:
        (generation,) = offloaded.generate([PROMPT], max_new_tokens=12, ignore_eos=True)
        assert generation.token_ids == greedy(resident_model(mixtral, expert_bits=bits), PROMPT, 12)
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
    settings_ = {"do_sample": True, "temperature": 1.0, "top_k": 0, "eos_token_id": None}
    drawn_BT = resident.generate(prompt_BT, max_new_tokens=16, **settings_)
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
    assert other.finish_reason == "length" or other.token_ids[-1] == free.token_ids[3]


def test_a_long_prompt_is_computed_in_parts(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The last part is a single token of the prompt.
    prompt = [3 + place % 500 for place in range(49)]
    expected = greedy(plain_model(mixtral), prompt, 4)
    monkeypatch.setattr("speculation.runtime.generation.PREFILL_TOKENS", 16)
    with OffloadedModel.load(str(mixtral), CacheSize(fraction=0.5), dtype="float32", device="cpu") as offloaded:
        hits_R: list[int] = []
        offloaded.experts.hits_R = hits_R
        (generation,) = offloaded.generate([prompt], max_new_tokens=4, ignore_eos=True)
        # Four parts of three layers, then three tokens.
        assert len(hits_R) == (4 + 3) * 3
        assert offloaded.experts.decode.tokens == 3
    assert generation.token_ids == expected


@torch.inference_mode()
def test_a_padded_batch_and_a_continued_cache_give_the_logits_of_resident_experts(mixtral: Path) -> None:
    """What a program may do with `offloaded.model`: masks, caches, and batches that are split."""
    resident = resident_model(mixtral)
    tokens_BT, mask_BT = torch.tensor([[0, 0, 0, 17, 301], [5, 6, 7, 8, 9]]), torch.tensor([[0, 0, 0, 1, 1], [1] * 5])
    with OffloadedModel.load(str(mixtral), CacheSize(fraction=0.5), predictor="next-gate", device="cpu") as offloaded:
        found = []
        for model in (resident, offloaded.model):
            first = model(tokens_BT, attention_mask=mask_BT)
            longer_BT = torch.cat([mask_BT, torch.ones((2, 1), dtype=torch.long)], dim=1)
            second = model(torch.tensor([[3], [4]]), attention_mask=longer_BT, past_key_values=first.past_key_values)
            first.past_key_values.batch_select_indices(torch.tensor([1]))
            third = model(torch.tensor([[8]]), past_key_values=first.past_key_values)
            found.append((first.logits, second.logits, third.logits))
        assert offloaded.experts.prefill.tokens == 7
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_model_is_called_with_gradients_on(mixtral: Path) -> None:
    with OffloadedModel.load(str(mixtral), CacheSize(fraction=0.5), predictor="next-gate", device="cpu") as offloaded:
        assert torch.is_grad_enabled()
        offloaded.model(torch.tensor([PROMPT]))
        offloaded.close()
        # Once is enough.
        offloaded.close()


@torch.inference_mode()
def test_a_mask_that_is_longer_than_what_was_computed(mixtral: Path) -> None:
    """As with a cache of fixed size, whose mask covers places that come later."""
    from transformers import StaticCache

    resident = resident_model(mixtral)
    mask_BT = torch.tensor([[1] * len(PROMPT) + [0] * (16 - len(PROMPT))])
    with OffloadedModel.load(str(mixtral), CacheSize(fraction=0.5), device="cpu") as offloaded:
        found = [
            model(
                torch.tensor([PROMPT]),
                attention_mask=mask_BT,
                past_key_values=StaticCache(config=model.config, max_cache_len=16),
            ).logits
            for model in (resident, offloaded.model)
        ]
        assert offloaded.experts.prefill.tokens == len(PROMPT)
    assert torch.equal(*found)


def test_the_settings_of_a_checkpoint_do_not_change_what_was_requested(mixtral: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(mixtral, tmp_path / "model"))
    settings_ = {"num_beams": 2, "num_return_sequences": 2, "repetition_penalty": 9.0, "use_cache": False, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2} | settings_))
    with OffloadedModel.load(str(folder), CacheSize(fraction=0.5), device="cpu") as offloaded:
        (generation,) = offloaded.generate([PROMPT], max_new_tokens=8, ignore_eos=True)
        assert offloaded.model.generation_config.num_beams == 2
    assert generation.token_ids == greedy(plain_model(mixtral), PROMPT, 8)


def test_the_prompt_of_a_model_with_a_recurrent_state_is_computed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some such models of transformers lose their state between the parts of a prompt."""
    folder, prompt = make("jamba", tmp_path), [3 + place % 500 for place in range(40)]
    expected = greedy(plain_model(folder), prompt, 4)
    monkeypatch.setattr("speculation.runtime.generation.PREFILL_TOKENS", 16)
    with OffloadedModel.load(str(folder), CacheSize(fraction=0.5), device="cpu") as offloaded:
        (generation,) = offloaded.generate([prompt], max_new_tokens=4, ignore_eos=True)
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


@cache
def _resident_demo(bits: int | None) -> object:
    return resident_model(demo_model_folder(), expert_bits=bits)
