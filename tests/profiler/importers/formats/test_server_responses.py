"""Responses of inference servers: every encoding, place of the field and way of storing them, and what they do not say."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.samples import in_base64

from profiler.errors import TraceError
from profiler.importers import find_format, import_trace
from profiler.importers.rows import ImportOptions
from profiler.trace.reader import Trace

TOKENS, PROMPT = 12, 9
LAYERS, EXPERTS, TOP_K = 4, 16, 4
ROUTES = np.random.default_rng(0).random((TOKENS - 1, LAYERS, EXPERTS)).argsort(-1)[..., :TOP_K].astype(np.int32)
# The first layer is dense.
ROUTES[:, 0] = 0
WEIGHTS = -np.sort(-np.random.default_rng(1).random(ROUTES.shape), axis=-1).astype(np.float32)
OUTPUT = [91, 92, 93]


def raw(routes: np.ndarray = ROUTES) -> str:
    return base64.b64encode(routes.astype("<i4").tobytes()).decode()


def generate(**changes: object) -> dict[str, Any]:
    """A response of SGLang's `/generate`."""
    meta = {"prompt_tokens": PROMPT, "completion_tokens": 3, "finish_reason": {"type": "stop"}, "routed_experts": raw()}
    return {"text": "So.", "output_ids": OUTPUT, "meta_info": meta | changes}


def chat(**choice: object) -> dict[str, Any]:
    """A response of `/v1/chat/completions`."""
    usage = {"prompt_tokens": PROMPT, "completion_tokens": 3}
    message = {"role": "assistant", "content": "So."}
    return {"model": "own/model", "choices": [{"message": message, "finish_reason": "stop", **choice}], "usage": usage}


FORMS: dict[str, dict[str, Any]] = {
    "sglang /generate": generate(),
    "sglang chat": chat(sgl_ext={"routed_experts": raw()}),
    "sglang chat, miles": chat(meta_info={"routed_experts": raw()}),
    "sglang, next to the choices": {**chat(), "sgl_ext": {"routed_experts": raw()}},
    "vllm chat, uint8": chat(routed_experts=in_base64(ROUTES.astype(np.uint8))),
    "vllm chat, int32, weights": chat(routed_experts=in_base64(ROUTES), routed_expert_weights=in_base64(WEIGHTS)),
    "vllm completions": {**chat(), "choices": [{"text": "So.", "finish_reason": "stop", "routed_experts": in_base64(ROUTES)}]},
}
STORED: dict[str, Callable[[Any], str]] = {
    "one": json.dumps,
    "indented": lambda response: json.dumps(response, indent=2),
    "list": lambda response: json.dumps([response]),
    "lines": lambda response: f"\n{json.dumps(response)}\n\n",
}


def save(folder: Path, text: str, name: str = "responses.jsonl") -> Path:
    (folder / name).write_text(text)
    return folder / name


def convert(folder: Path, *responses: Any, model: str = "unknown") -> Trace:
    source = save(folder, "".join(json.dumps(response) + "\n" for response in responses))
    return import_trace(source, folder / "t", format_name="server-responses", options=ImportOptions(model=model))


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_detected_and_has_the_same_routes(tmp_path: Path, form: str, stored: str) -> None:
    source = save(tmp_path, STORED[stored](FORMS[form]))
    assert find_format(source).name == "server-responses"
    trace = import_trace(source, tmp_path / "t")
    assert trace.metadata.model.moe_layers == [1, 2, 3]
    assert (np.sort(trace.load().expert_ids_TLK) == np.sort(ROUTES[:, 1:])).all()
    (problem,) = trace.problems.to_pylist()
    assert (problem["output"], problem["finish_reason"]) == ("So.", "stop")
    assert trace.metadata.record.weights == ("weights" in form)
    weights_TLK = trace.arrays(0).weights_TLK
    if weights_TLK is not None:
        assert np.allclose(weights_TLK, WEIGHTS[:, 1:], atol=1e-3)
        assert (trace.arrays(0).expert_ids_TLK == ROUTES[:, 1:]).all()


def test_tokens_have_ids_and_phases(tmp_path: Path) -> None:
    prompt = list(range(PROMPT))
    trace = convert(tmp_path, chat(routed_experts=in_base64(ROUTES), token_ids=OUTPUT, prompt_token_ids=prompt))
    assert trace.tokens.column("vocab_id").to_pylist() == prompt + OUTPUT
    assert trace.tokens.column("phase").to_pylist() == ["prefill"] * PROMPT + ["decode"] * 3
    assert trace.metadata.model.id == "own/model"


def test_ids_of_logprobs_are_those_of_the_output(tmp_path: Path) -> None:
    response = generate(output_token_logprobs=[[-0.5, token, None] for token in OUTPUT])
    del response["output_ids"]
    trace = convert(tmp_path, response)
    assert trace.tokens.column("token_id").to_pylist() == [9, 10, 11]
    assert trace.tokens.column("vocab_id").to_pylist() == OUTPUT


@pytest.mark.parametrize("encode", [raw, in_base64], ids=["sglang", "vllm"])
@pytest.mark.parametrize("start", [1, 8, 10])
def test_rows_that_begin_later_keep_their_positions(tmp_path: Path, encode: Callable[[np.ndarray], str], start: int) -> None:
    """The response does not say at which position the routes that were requested begin."""
    rows = encode(ROUTES[start:])
    part = generate(routed_experts=rows) if encode is raw else chat(routed_experts=rows)
    whole = generate() if encode is raw else chat(routed_experts=in_base64(ROUTES))
    # The model is known by its config: 32 decoder layers and two experts.
    if encode is raw:
        ids = np.random.default_rng(2).random((TOKENS - 1, 32, 8)).argsort(-1)[..., :2]
        part, whole = generate(routed_experts=raw(ids[start:])), generate(routed_experts=raw(ids))
    trace = convert(tmp_path, whole, part, model="mixtral-8x7b" if encode is raw else "unknown")
    assert trace.arrays(1).token_ids_T.tolist() == list(range(start, TOKENS - 1))
    assert (trace.arrays(1).expert_ids_TLK == trace.arrays(0).expert_ids_TLK[start:]).all()
    assert any("1 problem without the first positions" in gap for gap in trace.metadata.gaps)


def test_several_samples_and_files_are_different_problems(tmp_path: Path) -> None:
    choices = [{"text": f"{n}", "token_ids": OUTPUT, "routed_experts": in_base64(ROUTES)} for n in range(2)]
    (tmp_path / "many").mkdir()
    for name in ("a.json", "b.json"):
        save(tmp_path / "many", json.dumps({"choices": choices, "prompt_token_ids": [1] * PROMPT}), name)
    trace = import_trace(tmp_path / "many", tmp_path / "t")
    assert trace.problems.column("source_key").to_pylist() == ["a.json/0", "a.json/1", "b.json/0", "b.json/1"]
    assert trace.problems.column("output").to_pylist() == ["0", "1", "0", "1"]


def test_files_that_differ_only_in_their_ending_are_different_problems(tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    for name in ("a.json", "a.jsonl"):
        save(tmp_path / "both", json.dumps(generate()), name)
    trace = import_trace(tmp_path / "both", tmp_path / "t")
    assert sorted(trace.problems.column("source_key").to_pylist()) == ["a.json/0", "a.jsonl/0"]


def test_choices_of_unknown_length_end_with_their_output(tmp_path: Path) -> None:
    """Two choices without the prompt's token ids: the usage counts both, so T is one more than the rows."""
    choices = [{"text": f"{n}", "token_ids": OUTPUT, "routed_experts": in_base64(ROUTES)} for n in range(2)]
    trace = convert(tmp_path, {"choices": choices, "usage": {"prompt_tokens": PROMPT, "completion_tokens": 6}})
    found = trace.tokens.to_pylist()
    for problem in (0, 1):
        decoded = [row for row in found if row["problem_id"] == problem and row["phase"] == "decode"]
        assert [row["token_id"] for row in decoded] == [9, 10, 11]
        assert [row["vocab_id"] for row in decoded] == OUTPUT
        assert trace.arrays(problem).token_ids_T.tolist() == list(range(TOKENS - 1))


def test_responses_without_routes_keep_their_number(tmp_path: Path) -> None:
    trace = convert(tmp_path, generate(routed_experts=None), generate(), chat())
    assert trace.problems.column("source_key").to_pylist() == ["1"]
    assert "2 responses left out: no routed experts" in trace.metadata.gaps


def test_an_inferred_k_is_said_and_a_named_model_decides(tmp_path: Path) -> None:
    inferred = convert(tmp_path, generate())
    assert (inferred.metadata.model.top_k, len(inferred.metadata.model.moe_layers)) == (TOP_K, LAYERS - 1)
    assert any(
        "K = 4 was inferred: the largest K for which no layer of a token's 16 ids has an expert twice" in gap
        for gap in inferred.metadata.gaps
    )
    (tmp_path / "named").mkdir()
    # Eight distinct ids could be one layer's: a model that is known says that they are two of each of four layers.
    ids = np.random.default_rng(3).random((TOKENS - 1, 32, 8)).argsort(-1)[..., :2]
    named = convert(tmp_path / "named", generate(routed_experts=raw(ids)), model="mixtral-8x7b")
    assert (named.load().expert_ids_TLK == ids).all()
    assert not any("inferred" in gap for gap in named.metadata.gaps)


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (generate(routed_experts="x!"), "not base64"),
        (generate(routed_experts=[1, 2]), "expected text in base64"),
        (generate(routed_experts=raw()[:-8]), "name the model"),
        (generate(prompt_tokens=None), "name the model"),
        (chat(routed_experts=in_base64(ROUTES[0])), "expected numbers"),
        (chat(routed_experts=in_base64(WEIGHTS)), "expected numbers"),
        (chat(routed_experts=in_base64(ROUTES)[:-8]), "does not fit its|not base64"),
        (chat(routed_experts=in_base64(np.zeros((20, 2, 2), np.int8))), "every layer is 0 or -1 throughout"),
        (chat(routed_experts=in_base64(np.concatenate([ROUTES] * 2))), "routes of 22 tokens, but there are 12"),
        (chat(routed_experts=in_base64(ROUTES), routed_expert_weights=in_base64(WEIGHTS[1:])), "expected that of the ids"),
        (chat(routed_experts=in_base64(ROUTES), token_ids=["a"], prompt_token_ids=[1] * 11), "expected a list of whole"),
        ([1], "expected an object"),
        ({"choices": [1]}, "expected an object"),
        ("text", "expected an object"),
    ],
)
def test_faulty_responses_are_refused(tmp_path: Path, response: Any, reason: str) -> None:
    with pytest.raises(TraceError, match=reason):
        convert(tmp_path, response)


@pytest.mark.parametrize("text", ['{"meta_info": {"routed_experts": "', '{"a": 1}\n{"routed_experts"', "[" * 5000])
def test_text_that_is_not_json_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(TraceError, match="not JSON"):
        import_trace(save(tmp_path, text), tmp_path / "t", format_name="server-responses")
