"""Measure the cost of capture: the ratio of tokens/s with and without it, in engines that take turns.

    python -m vllm_patch.check.overhead ARM PLAN     (one arm; started by `measure_overhead`)

Arms: `off` is vLLM without any plugin. `on` has the plugin, with its copies inside the graph, but records nothing. `writing`
records every token, and its clock stops when all rows are on disk. Each arm is an engine with its own processes, which are
stopped with SIGSTOP while another arm runs. The first round warms up and is discarded; the order of the arms alternates between
rounds. The model has dummy weights and Mixtral's shape, so this measures the cost of capture and says nothing about routing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from profiler.capture.protocol import Workers
from profiler.errors import EngineError
from vllm_patch.check.results import OverheadResult, Ratio

ARMS = ("off", "on", "writing")
WARM_REQUESTS = 8
ROUNDS = 6
# A layer of Mixtral 8x7B in bfloat16, and the GPU memory of an engine besides weights and cache.
LAYER_BYTES, OTHER_BYTES = 2.91e9, 6e9
MOST_LAYERS = 8
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
}
# Small enough for two cores to run a workload in a second or two.
SMALL = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
SMALL |= {"head_dim": 64, "num_hidden_layers": 8, "max_position_embeddings": 2048}


@dataclass(frozen=True, kw_only=True)
class OverheadWorkload:
    """Requests of equal shape, all submitted at once."""

    name: str
    requests: int
    prompt_tokens: int
    new_tokens: int

    @property
    def tokens(self) -> int:
        """Prompt and generated tokens of all requests."""
        return self.requests * (self.prompt_tokens + self.new_tokens)


@dataclass(frozen=True, kw_only=True)
class OverheadPlan:
    """What every arm runs.

    model: a description, for the results. config: the dummy model's config. settings: arguments of `vllm.LLM`, except the
    model. folder: a real checkpoint to run instead of the dummy model. scratch: where arms put their files; arms are killed,
    so the process that started them removes it.
    """

    model: str
    config: dict[str, Any]
    settings: dict[str, Any]
    workloads: tuple[OverheadWorkload, ...]
    rounds: int = ROUNDS
    folder: str = ""
    scratch: str = ""


def plan_for(memory: int) -> OverheadPlan:
    """A plan that fits the device: on a GPU three engines that share it, with CUDA graphs; on a CPU a small model, eager.

    memory: bytes of the GPU; 0 for a CPU. Raises `EngineError` if the GPU is too small.
    """
    if not memory:
        return OverheadPlan(
            model="Mixtral's shape, 8 layers, hidden size 512, dummy weights",
            config=MIXTRAL | SMALL,
            settings={"max_model_len": 512, "enforce_eager": True},
            workloads=(
                OverheadWorkload(name="decode: 16 requests of 64 + 32 tokens", requests=16, prompt_tokens=64, new_tokens=32),
                OverheadWorkload(name="prefill: 8 requests of 256 + 4 tokens", requests=8, prompt_tokens=256, new_tokens=4),
            ),
        )
    cache = 5 << 30
    layers = int((0.92 * memory / len(ARMS) - cache - OTHER_BYTES) // LAYER_BYTES)
    if layers < 1:
        raise EngineError(f"{memory / 1e9:.0f} GB of GPU memory cannot hold three engines with one layer of Mixtral each")
    layers = min(MOST_LAYERS, layers)
    return OverheadPlan(
        model=f"Mixtral 8x7B's shape, {layers} layers, dummy weights",
        config=MIXTRAL | {"num_hidden_layers": layers},
        settings={"max_model_len": 4096, "gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": cache},
        workloads=(
            OverheadWorkload(name="decode: 128 requests of 64 + 512 tokens", requests=128, prompt_tokens=64, new_tokens=512),
            OverheadWorkload(name="prefill: 64 requests of 2048 + 8 tokens", requests=64, prompt_tokens=2048, new_tokens=8),
        ),
    )


def measure_overhead(folder: Path, deadline: float | None = None) -> Iterator[OverheadResult]:
    """Yield a result for each workload.

    deadline: on the clock of `time.monotonic`. When it passes, the rounds end early, after at least two.
    Raises `EngineError` if an arm does not start, or exits.
    """
    memory = gpu_bytes()
    plan = plan_for(memory)
    with contextlib.ExitStack() as stack:
        arms = [Arm(name, [sys.executable, "-m", "vllm_patch.check.overhead", name], plan, folder) for name in ARMS]
        for arm in arms:
            stack.enter_context(arm)
            if not memory:
                # Engines that start at the same time would compete for the cores.
                arm.wait_until_ready()
        for arm in arms:
            arm.wait_until_ready()
        for number, workload in enumerate(plan.workloads):
            share = None
            if deadline is not None:
                share = time.monotonic() + (deadline - time.monotonic()) / (len(plan.workloads) - number)
            yield measure_workload(plan, workload, arms, share)


def measure_workload(plan: OverheadPlan, workload: OverheadWorkload, arms: list[Arm], deadline: float | None) -> OverheadResult:
    """Run the rounds of one workload on arms that are ready. The first arm is the baseline."""
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    last: dict[str, Any] = {}
    for number in range(plan.rounds + 1):
        if deadline is not None and number > 2 and time.monotonic() > deadline:
            break
        for arm in arms if number % 2 else arms[::-1]:
            answer = arm.run(workload)
            if "rows" in answer:
                last = answer
            if number:
                seconds[arm.name].append(answer["seconds"])
    base = seconds[arms[0].name]
    speeds = {name: workload.tokens / statistics.median(times) for name, times in seconds.items()}
    ratios = {name: [off / own for off, own in zip(base, times, strict=True)] for name, times in seconds.items()}
    middle = statistics.median(base)
    return OverheadResult(
        workload=workload.name,
        model=plan.model,
        rounds=len(base),
        tokens=workload.tokens,
        tokens_per_second={name: round(speed, 1) for name, speed in speeds.items()},
        ratios={
            name: Ratio(median=statistics.median(found), least=min(found), most=max(found))
            for name, found in ratios.items()
            if name != arms[0].name
        },
        off_spread=(middle / max(base), middle / min(base)),
        seconds=seconds,
        rows_per_round=last.get("rows", 0),
        writer_waits=last.get("waits", 0),
    )


class Arm:
    """A child process that runs one arm, and is stopped while other arms run.

    Args:
        name, command: The arm, and what runs it.
        plan: What it runs.
        folder: For its log and its compiled code.
        switches: Variables that switch the plugin on. Default: capture for `on` and `writing`; an empty dictionary is vLLM
            without a plugin.
    """

    def __init__(
        self, name: str, command: list[str], plan: OverheadPlan, folder: Path, switches: dict[str, str] | None = None
    ) -> None:
        self.name = name
        captures = {"SPECMOE_CAPTURE": "1"} if name in {"on", "writing"} else {}
        self._switches = captures if switches is None else switches
        self._command, self._plan, self._folder = command, plan, folder
        self._is_ready = False
        self._log = folder / f"overhead-{name}.log"

    def __enter__(self) -> Self:
        from vllm_patch.check.run import common_environment

        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*self._command, json.dumps(asdict(replace(self._plan, scratch=str(self._folder))))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={
                    **os.environ,
                    **common_environment(),
                    **({**self._switches, "VLLM_PLUGINS": "specmoe"} if self._switches else {"VLLM_PLUGINS": ""}),
                    # vLLM's key for compiled code is the same for captured and plain runs.
                    "VLLM_CACHE_ROOT": str(self._folder / f"cache-{self.name}"),
                },
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._signal(signal.SIGKILL)
        self._process.wait()

    def wait_until_ready(self) -> None:
        """Wait until the engine has started, then stop it. Raises `EngineError` if it does not start."""
        if not self._is_ready:
            if self._read() != "ready":
                raise EngineError(f"the engine of arm {self.name!r} did not start")
            self._is_ready = True
            self._signal(signal.SIGSTOP)

    def run(self, workload: OverheadWorkload) -> dict[str, Any]:
        """Run the workload once. Returns `seconds`, and the recorder's status if the arm records."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(asdict(workload)) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._read())
        self._signal(signal.SIGSTOP)
        return answer

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            causes = [line for line in lines if "Error" in line] or lines
            raise EngineError(f"the engine of arm {self.name!r} exited: {causes[-1][:300] if causes else 'its log is empty'}")
        return line

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)


def parse_plan(text: str) -> OverheadPlan:
    """The plan that `Arm` passed to its process."""
    values = json.loads(text)
    return OverheadPlan(**{**values, "workloads": tuple(OverheadWorkload(**each) for each in values["workloads"])})


def serve(arm: str, plan: OverheadPlan, prepare: Callable[[Any], object] | None = None, **settings: Any) -> None:
    """Run an arm: start the engine, then run a workload for each line on standard input and print its seconds and rows.

    prepare: called with the `LLM` after it has started. settings: arguments of `vllm.LLM` in addition to the plan's.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams

    folder = Path(tempfile.mkdtemp(prefix="specmoe-overhead-", dir=plan.scratch or None))
    try:
        (folder / "config.json").write_text(json.dumps(plan.config), encoding="utf-8")
        model = {"model": plan.folder} if plan.folder else {"model": str(folder), "load_format": "dummy"}
        llm = LLM(
            **model,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            disable_log_stats=True,
            **(plan.settings | settings),
        )
        workers = Workers(llm, "install speculative-moe in vLLM's environment")
        if prepare is not None:
            prepare(llm)
        print("ready", file=answers, flush=True)
        for number, line in enumerate(sys.stdin):
            workload = OverheadWorkload(**json.loads(line))
            random = np.random.default_rng(0)
            sampling = SamplingParams(max_tokens=workload.new_tokens, temperature=0, ignore_eos=True, detokenize=False)
            shape = workload.requests, workload.prompt_tokens
            prompts = [{"prompt_token_ids": tokens} for tokens in random.integers(3, 500, shape).tolist()]
            # Pages and caches are cold after the stop.
            llm.generate(prompts[:WARM_REQUESTS], sampling, use_tqdm=False)
            began = time.perf_counter()
            if arm == "writing":
                workers.start(folder / str(number))
            llm.generate(prompts, sampling, use_tqdm=False)
            status: dict[str, Any] = {**workers.stop()} if arm == "writing" else {}
            seconds = time.perf_counter() - began
            shutil.rmtree(folder / str(number), ignore_errors=True)
            print(json.dumps({"seconds": seconds, **status}), file=answers, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def gpu_bytes() -> int:
    """Free memory of the GPU, or 0 without a GPU. A separate process reads it, so that this one does not occupy the GPU."""
    code = "import torch; print(torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    serve(sys.argv[1], parse_plan(sys.argv[2]))
