"""What capture costs: tokens/s with it over tokens/s without, in engines side by side, one running at a time.

    python -m vllm_patch.check.overhead ARM PLAN     (started by `measure_overhead`: an arm)

Arms: `off` is vLLM without any plugin; `on` has the plugin, with its copies inside the graph, and records nothing; `writing`
records every token, and its clock stops when all rows are on disk. Each is an engine with processes of its own, stopped by
SIGSTOP while another runs. The first round warms up and is discarded; the order of the arms changes from round to round.
The model has dummy weights and Mixtral's shape: this says what capture costs, nothing about routing.
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
# A layer of Mixtral 8x7B in bfloat16; the rest of an engine on a GPU besides weights and cache.
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
# What two cores run in a second or two.
SMALL = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
SMALL |= {"head_dim": 64, "num_hidden_layers": 8, "max_position_embeddings": 2048}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests of equal shape, all at once."""

    name: str
    requests: int
    prompt_tokens: int
    new_tokens: int

    @property
    def tokens(self) -> int:
        """Prompt and generated tokens of all requests."""
        return self.requests * (self.prompt_tokens + self.new_tokens)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all arms run. settings: of `vllm.LLM`, without the model. config: of the dummy model; folder: a real one instead.

    scratch: where arms put their files. They are killed, so whoever started them removes it.
    """

    model: str
    config: dict[str, Any]
    settings: dict[str, Any]
    workloads: tuple[Workload, ...]
    rounds: int = ROUNDS
    folder: str = ""
    scratch: str = ""


def plan_for(memory: int) -> Plan:
    """Sized to the device: on a GPU three engines side by side, with CUDA graphs; on a CPU a small model, eager."""
    if not memory:
        return Plan(
            model="Mixtral's shape, 8 layers, hidden size 512, dummy weights",
            config=MIXTRAL | SMALL,
            settings={"max_model_len": 512, "enforce_eager": True},
            workloads=(
                Workload(name="decode: 16 requests of 64 + 32 tokens", requests=16, prompt_tokens=64, new_tokens=32),
                Workload(name="prefill: 8 requests of 256 + 4 tokens", requests=8, prompt_tokens=256, new_tokens=4),
            ),
        )
    cache = 5 << 30
    layers = int((0.92 * memory / len(ARMS) - cache - OTHER_BYTES) // LAYER_BYTES)
    if layers < 1:
        raise EngineError(f"{memory / 1e9:.0f} GB of GPU memory do not hold three engines with a layer of Mixtral each")
    layers = min(MOST_LAYERS, layers)
    return Plan(
        model=f"Mixtral 8x7B's shape, {layers} layers, dummy weights",
        config=MIXTRAL | {"num_hidden_layers": layers},
        settings={"max_model_len": 4096, "gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": cache},
        workloads=(
            Workload(name="decode: 128 requests of 64 + 512 tokens", requests=128, prompt_tokens=64, new_tokens=512),
            Workload(name="prefill: 64 requests of 2048 + 8 tokens", requests=64, prompt_tokens=2048, new_tokens=8),
        ),
    )


def measure_overhead(folder: Path, deadline: float | None = None) -> Iterator[OverheadResult]:
    """A result for each workload. Rounds end early, with at least two, where the deadline (`time.monotonic`) comes.

    Raises `EngineError` if an arm does not start or ends.
    """
    memory = gpu_bytes()
    plan = plan_for(memory)
    with contextlib.ExitStack() as stack:
        arms = [Arm(name, [sys.executable, "-m", "vllm_patch.check.overhead", name], plan, folder) for name in ARMS]
        for arm in arms:
            stack.enter_context(arm)
            if not memory:
                # Side by side, starts would share the cores.
                arm.wait_until_ready()
        for arm in arms:
            arm.wait_until_ready()
        for number, workload in enumerate(plan.workloads):
            share = None
            if deadline is not None:
                share = time.monotonic() + (deadline - time.monotonic()) / (len(plan.workloads) - number)
            yield measure_workload(plan, workload, arms, share)


def measure_workload(plan: Plan, workload: Workload, arms: list[Arm], deadline: float | None) -> OverheadResult:
    """The rounds of one workload over arms that are ready; the first arm is the one that others are compared with."""
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
    """A child process that runs one arm, stopped whenever it is not its turn."""

    def __init__(self, name: str, command: list[str], plan: Plan, folder: Path) -> None:
        self.name = name
        self._command, self._plan, self._folder = command, plan, folder
        self._is_ready = False
        self._log = folder / f"overhead-{name}.log"

    def __enter__(self) -> Self:
        from vllm_patch.check.run import common_environment

        captures = {"SPECMOE_CAPTURE": "1", "VLLM_PLUGINS": "specmoe"}
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
                    **(captures if self.name in {"on", "writing"} else {"VLLM_PLUGINS": ""}),
                    # Captured and plain runs share vLLM's key for compiled code.
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
        """Until the engine has started; then stop it. Raises `EngineError` if it does not."""
        if not self._is_ready:
            if self._read() != "ready":
                raise EngineError(f"the engine of arm {self.name!r} did not start")
            self._is_ready = True
            self._signal(signal.SIGSTOP)

    def run(self, workload: Workload) -> dict[str, Any]:
        """Run the workload once: `seconds`, and the recorder's status where it records."""
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
            raise EngineError(f"the engine of arm {self.name!r} ended: {causes[-1][:300] if causes else 'it said nothing'}")
        return line

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)


def parse_plan(text: str) -> Plan:
    """A plan as `Arm` hands it to its process."""
    values = json.loads(text)
    return Plan(**{**values, "workloads": tuple(Workload(**each) for each in values["workloads"])})


def serve(arm: str, plan: Plan, prepare: Callable[[Any], object] | None = None, **settings: Any) -> None:
    """An arm: start the engine, then run a workload for every line on standard input and answer with seconds and rows.

    prepare: called with the `LLM` once it has started. settings: of `vllm.LLM`, besides the plan's.
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
        workers = Workers(llm, "install speculative-moe there")
        if prepare is not None:
            prepare(llm)
        print("ready", file=answers, flush=True)
        for number, line in enumerate(sys.stdin):
            workload = Workload(**json.loads(line))
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
    """Memory of the GPU, 0 without one; in a process of its own, so that this one does not hold it."""
    code = "import torch; print(torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    serve(sys.argv[1], parse_plan(sys.argv[2]))
