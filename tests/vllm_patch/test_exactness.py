"""Every way in which vLLM runs requests, against `transformers` in float32 over the same tokens.

Each scenario of `drive_vllm.py` starts its engines once; the tests look at the traces that it left.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support import warm
from support.agreement import assert_agrees, assert_complete
from support.drafts import make_drafts

from profiler.capture.sealing import captured_positions, run_folder
from profiler.engines.vllm import is_installed
from profiler.models.resolve import demo_model_folder
from profiler.trace.reader import Trace
from profiler.trace.stream import ROUTING_STREAM
from vllm_patch.check.agreement import load_oracle, vocabulary
from vllm_patch.check.jobs import DEFAULT_FAMILIES

pytestmark = [pytest.mark.engine, pytest.mark.skipif(not is_installed(), reason="vLLM is not installed")]

# The first of layers 0 to 2 is dense in some families.
FROM_LAYER_1 = ("deepseek_v1", "deepseek_v2", "deepseek_v3", "glm4_moe")
# The chosen experts are those of the largest logits: no correction bias, no groups.
BY_LOGITS = tuple(name for name in DEFAULT_FAMILIES if name not in {"deepseek_v3", "glm4_moe"})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    assert warm.run("vllm_patch.check.families", folder, *DEFAULT_FAMILIES).returncode == 0
    return folder


def drive(*scenarios: list[object], **environment: str) -> None:
    words = [str(word) for scenario in scenarios for word in ("--", *scenario)]
    done = warm.run("support.drive_vllm", *words[1:], environment=environment, timeout=500, warm_children=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def in_one_process(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # One engine after the other in one process: else each would import vLLM three times. What `collect` runs has workers.
    out = tmp_path_factory.mktemp("engines")
    for name in ("families", "half", "pressure", "speculative", "modes", "skipping", "calls"):
        (out / name).mkdir()
    drive(
        ["families", out / "families", *(checkpoints / name for name in DEFAULT_FAMILIES)],
        ["half", out / "half", demo_model_folder()],
        ["pressure", out / "pressure", checkpoints / "mixtral"],
        ["modes", out / "modes", demo_model_folder()],
        ["skipping", out / "skipping", demo_model_folder()],
        ["calls", out / "calls", demo_model_folder()],
        ["speculative", out / "speculative", checkpoints / "mixtral", *make_drafts(checkpoints)],
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    return out


@pytest.fixture(scope="module")
def families(in_one_process: Path) -> Path:
    return in_one_process / "families"


@pytest.fixture(scope="module")
def pressure(in_one_process: Path) -> Path:
    return in_one_process / "pressure"


@pytest.fixture(scope="module")
def speculative(in_one_process: Path) -> Path:
    return in_one_process / "speculative"


@pytest.fixture(scope="module")
def modes(in_one_process: Path) -> Path:
    return in_one_process / "modes"


@pytest.fixture(scope="module")
def half(in_one_process: Path) -> Path:
    return in_one_process / "half"


@pytest.fixture(scope="module")
def calls(in_one_process: Path) -> Path:
    return in_one_process / "calls"


@pytest.mark.parametrize("name", DEFAULT_FAMILIES)
def test_every_family_agrees_with_transformers(name: str, families: Path, checkpoints: Path) -> None:
    trace = Trace.open(families / name)
    assert_complete(trace)
    layers = [0, 2] if name == "qwen3_moe" else [1, 2] if name in FROM_LAYER_1 else [0, 1, 2]
    assert trace.metadata.model.moe_layers == layers
    assert trace.problems.num_rows == 12
    assert assert_agrees(trace, load_oracle(checkpoints / name)) > 700 * len(layers)


@pytest.mark.parametrize("name", BY_LOGITS)
def test_logits_choose_the_recorded_experts(name: str, families: Path) -> None:
    trace = Trace.open(families / name)
    top_k = trace.metadata.model.top_k
    for problem in (0, 5):
        positions, layers, logits_TLE = trace.values("logits", problem)
        chunk = trace.arrays(problem)
        assert (positions == chunk.token_ids_T).all()
        assert layers == trace.metadata.model.moe_layers
        # float16 makes ties: an expert may only be missing from the top K if its logit equals the K-th.
        kth = np.sort(logits_TLE, -1)[..., [-top_k]]
        assert (np.take_along_axis(logits_TLE, chunk.expert_ids_TLK.astype(np.int64), -1) >= kth).all()


@pytest.mark.parametrize("name", DEFAULT_FAMILIES)
def test_router_inputs_times_gates_are_the_logits(name: str, families: Path) -> None:
    from safetensors.numpy import load_file

    trace = Trace.open(families / name)
    gates = load_file(trace.path / "gates.safetensors")
    weights = [name for name in gates if name.endswith(".weight")]
    assert sorted(weights) == [f"layers.{layer}.weight" for layer in trace.metadata.model.moe_layers]
    positions, layers, hidden_TLD = trace.values("hidden", 0)
    assert layers == [2]
    _, all_layers, logits_TLE = trace.values("logits", 0)
    assert len(positions) == len(trace.arrays(0))
    found = hidden_TLD[:, 0].astype(np.float32) @ gates["layers.2.weight"].astype(np.float32).T + gates.get("layers.2.bias", 0)
    np.testing.assert_allclose(found, logits_TLE[:, all_layers.index(2)].astype(np.float32), atol=0.02)


def test_router_inputs_stop_at_their_budget(families: Path) -> None:
    import pyarrow.parquet as pq

    trace = Trace.open(families / "mixtral")
    problems = pq.read_table(trace.path / "hidden").column("problem_id").to_numpy()
    counts = {problem: int((problems == problem).sum()) for problem in np.unique(problems)}
    assert all(count == len(trace.arrays(problem)) for problem, count in counts.items())
    assert 0 < len(counts) <= 12
    assert sum(counts.values()) >= 300


def test_preempted_chunked_compiled_requests_agree_without_duplicates(pressure: Path, checkpoints: Path) -> None:
    assert json.loads((pressure / "metrics.json").read_text())["preemptions"] > 0
    trace = Trace.open(pressure / "trace")
    assert_complete(trace)
    assert assert_agrees(trace, load_oracle(checkpoints / "mixtral")) == 4 * 299 * 3


def test_with_tensor_parallelism_the_first_worker_records_everything(checkpoints: Path, tmp_path: Path) -> None:
    drive(["workers", tmp_path, checkpoints / "mixtral"], VLLM_ENABLE_V1_MULTIPROCESSING="0")
    trace = Trace.open(tmp_path / "trace")
    assert_complete(trace)
    assert assert_agrees(trace, load_oracle(checkpoints / "mixtral")) > 700


@pytest.mark.parametrize("method", ["ngram", "draft_model", "eagle", "mtp"])
def test_of_drafts_only_the_verified_tokens_of_the_target_are_recorded(
    method: str, speculative: Path, checkpoints: Path
) -> None:
    counters = json.loads((speculative / "counters.json").read_text())[method]
    accepted, drafted = (counters[f"vllm:spec_decode_num_{name}_tokens"] for name in ("accepted", "draft"))
    assert 20 < accepted < drafted - 20
    trace = Trace.open(speculative / method)
    assert trace.metadata.capture["speculative_decoding"] == {"method": method, "draft_tokens": 3}
    # Neither the layers of the draft model, which has experts too, nor the MTP layer (3).
    assert trace.metadata.model.moe_layers == ([1, 2] if method == "mtp" else [0, 1, 2])
    assert_complete(trace)
    assert assert_agrees(trace, load_oracle(checkpoints / ("glm4_moe" if method == "mtp" else "mixtral"))) > 1000
    if method != "mtp":
        plain = Trace.open(speculative / "none")
        assert "speculative_decoding" not in plain.metadata.capture
        assert vocabulary(trace) == vocabulary(plain)
        for problem in vocabulary(plain):
            assert (trace.arrays(problem).expert_ids_TLK == plain.arrays(problem).expert_ids_TLK).all()


# Name -> problems of the trace, the one that every recording begins with included.
RUNS = {"one_token": 7, "long_prompts": 6, "structured": 2, "logprobs": 7, "one_id": 4}


@pytest.mark.parametrize("name", RUNS)
def test_further_ways_to_run_requests_agree(name: str, modes: Path) -> None:
    trace = Trace.open(modes / name)
    assert_complete(trace)
    assert trace.problems.num_rows == RUNS[name]
    assert assert_agrees(trace, load_oracle(demo_model_folder())) > 0


def test_requests_under_one_id_keep_their_own_routes(modes: Path) -> None:
    # In the order in which they were added, which is not the one in which they ran.
    assert [list(tokens[:2]) for tokens in vocabulary(Trace.open(modes / "one_id")).values()][1:] == [
        [200, 201],
        [10, 11],
        [10, 11],
    ]
    assert [len(tokens) for tokens in vocabulary(Trace.open(modes / "one_id")).values()][1:] == [34, 36, 33]


@pytest.mark.parametrize(
    ("name", "text", "problems"),
    [
        ("beam_search", "BeamSearchOutput cannot be added to a recording: beam search runs each step", 14),
        ("twice", "RequestOutput cannot be added to a recording: it was added before", 2),
        ("copy", "was added more often than the recording has requests with its tokens", 2),
        ("from_before", "was not generated during the recording", 2),
    ],
)
def test_what_cannot_be_added_has_a_reason_and_the_rest_is_a_trace(name: str, text: str, problems: int, modes: Path) -> None:
    assert text in json.loads((modes / "errors.json").read_text())[name]
    trace = Trace.open(modes / name)
    assert trace.faults(verify=True) == []
    assert trace.problems.num_rows == problems
    assert assert_agrees(trace, load_oracle(demo_model_folder())) > 0


def test_prompts_that_vllm_rejects_are_skipped(in_one_process: Path) -> None:
    trace = Trace.open(in_one_process / "skipping" / "trace")
    assert json.loads((in_one_process / "skipping" / "summary.json").read_text())["skipped_problems"] == 2
    assert trace.problems.column("problem_id").to_pylist() == [0, 3]
    empty, rejected = trace.metadata.gaps
    assert empty == "skipped problem 1 (synthetic 1): its prompt has no tokens"
    assert rejected.startswith("skipped problem 2 (synthetic 2): vLLM rejects it: Token id 1000000 is out of vocabulary")
    assert assert_agrees(trace, load_oracle(demo_model_folder())) > 0


def test_changed_weights_end_the_capture(modes: Path) -> None:
    errors = json.loads((modes / "errors.json").read_text())
    assert "reload_weights changed the loaded weights: start the engine again" in errors["reload"]
    assert errors["after_reload"] == "capture failed: " + errors["reload"].partition("Error: ")[2]
    assert not (modes / "reload" / "manifest.json").exists()
    # The rows before the change are there: 20 tokens of the prompt, and all of the output but the last.
    (positions_T,) = captured_positions(run_folder(modes / "reload", 0))[ROUTING_STREAM].values()
    assert positions_T.tolist() == list(range(24))


def test_calls_samples_and_stop_strings_agree(calls: Path) -> None:
    trace = Trace.open(calls / "trace")
    outputs = json.loads((calls / "outputs.json").read_text())
    assert trace.problems.num_rows == 6 + 6 + 4 + 3 * 3 + 2
    assert assert_agrees(trace, load_oracle(demo_model_folder())) > 0
    assert trace.problems.column("finish_reason").to_pylist() == [r for request in outputs["finish_reasons"] for r in request]
    assert "stop" in outputs["finish_reasons"][-1]


def test_samples_of_a_request_are_problems_of_their_own(calls: Path) -> None:
    trace = Trace.open(calls / "trace")
    tokens = vocabulary(trace)
    problems = trace.problems.to_pylist()
    samples = problems[16:25]
    assert len({problem["prompt"] for problem in samples}) == 3
    assert len({tuple(tokens[problem["problem_id"]]) for problem in samples}) > 3


def test_prefix_cache_gaps_are_what_vllm_says_was_cached(calls: Path) -> None:
    trace = Trace.open(calls / "trace")
    reported = [n for request in json.loads((calls / "outputs.json").read_text())["cached"] for n in request]
    problems = trace.problems.to_pylist()
    # vLLM reports one number per request; its samples after the first may find more of the prompt in the cache.
    single = [*range(16), 25, 26]
    assert [problems[i]["cached_tokens"] for i in single] == [reported[i] for i in single]
    assert sum(reported[12:16]) >= 4 * 256
    total = 0
    for problem in problems:
        length = problem["prompt_tokens"] + problem["output_tokens"]
        assert trace.arrays(problem["problem_id"]).token_ids_T.tolist() == list(range(problem["cached_tokens"], length - 1))
        total += problem["cached_tokens"]
    (gap,) = trace.metadata.gaps
    assert gap.startswith(
        f"{total:,} positions of {sum(p['cached_tokens'] > 0 for p in problems)} problems came from the prefix"
    )
    shown = warm.run("specmoe", "inspect", trace.path)
    assert " ".join(gap.split()) in " ".join(shown.stdout.split())


def test_an_aborted_request_is_marked_incomplete(calls: Path) -> None:
    trace = Trace.open(calls / "aborted")
    kept, dropped = trace.problems.to_pylist()
    assert (kept["finish_reason"], kept["output_tokens"]) == ("length", 40)
    assert (dropped["finish_reason"], dropped["prompt_tokens"], dropped["output_tokens"]) == ("abort", 30, 0)
    assert "1 problem aborted and incomplete: problem 1" in trace.metadata.gaps
    assert len(trace.arrays(0)) == 69
    assert trace.arrays(1).token_ids_T.tolist() == list(range(29))


def test_another_kernel_is_chosen_and_named_where_vllms_own_selects_experts(half: Path) -> None:
    ((kernel, replaced),) = Trace.open(half / "trace").metadata.capture["moe_kernels"].items()
    assert kernel.endswith("UnquantizedExperts")
    assert replaced == "Fused"


# Gap between the K-th and the next router logit below which two bfloat16 implementations may choose differently. Logits of
# the demo model have a standard deviation of 1 and 8 bits; the widest that was seen is 0.024.
BFLOAT16_GAP = 0.05


def test_in_bfloat16_differences_arise_only_at_near_ties(half: Path) -> None:
    """Once one set differs, everything behind it gets other inputs: later layers of that token and of the tokens after."""
    from profiler.engines.transformers import route

    trace = Trace.open(half / "trace")
    oracle = load_oracle(demo_model_folder(), "bfloat16")
    top_k = trace.metadata.model.top_k
    different, compared, widest = 0, 0, 0.0
    for problem, tokens in vocabulary(trace).items():
        chunk = trace.arrays(problem)
        ids_TLK, _ = route(oracle, tokens[:-1])
        differs_TL = (np.sort(ids_TLK, -1) != np.sort(chunk.expert_ids_TLK, -1)).any(-1)
        _, _, logits_TLE = trace.values("logits", problem)
        ordered = np.sort(logits_TLE.astype(np.float64), -1)
        gap_TL = ordered[..., -top_k] - ordered[..., -top_k - 1]
        differed_above_TL = np.cumsum(np.maximum.accumulate(differs_TL, 0), 1) - np.maximum.accumulate(differs_TL, 0) > 0
        different, compared = different + int(differs_TL.sum()), compared + differs_TL.size
        widest = max(widest, float(gap_TL[differs_TL & ~differed_above_TL].max(initial=0)))
    assert different < 0.05 * compared
    assert widest < BFLOAT16_GAP
