"""What `check` runs: a model, and the way in which vLLM runs it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# Prompts of many lengths in one batch; then, where prefix caching is on, prompts that share a prefix, twice.
MIXED_PROMPTS, LONGEST_PROMPT, NEW_TOKENS = 12, 90, 24
SHARED_PROMPTS, SHARED_PREFIX = 4, 300
# Below the longest prompt: prompts are prefilled in pieces, mixed with decoding requests.
CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class Mode:
    """How vLLM runs. chunked: prompts are prefilled in pieces. workers: vLLM's usual processes instead of this one.

    runner: 1 or 2 for one of the two model runners that some releases have, None for the release's own choice.
    """

    name: str
    compiled: bool = False
    chunked: bool = False
    prefix_caching: bool = False
    workers: bool = False
    runner: int | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What must be set before vLLM is imported; jobs with equal environments share a process."""
        variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(self.workers))}
        if self.runner is not None:
            variables["VLLM_USE_V2_MODEL_RUNNER"] = str(int(self.runner == 2))
        return variables


@dataclass(frozen=True, kw_only=True)
class Job:
    """One engine start: the model (a family's name, `demo`, or a folder), the mode, and the type of its numbers."""

    model: str
    mode: Mode
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.model} {self.mode.name}"

    def to_json(self) -> dict[str, Any]:
        """For the worker."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Job:
        """As `to_json` wrote it."""
        return cls(**{**values, "mode": Mode(**values["mode"])})


EAGER = Mode(name="eager")
EAGER_CACHED = Mode(name="eager, prefix caching", prefix_caching=True)
COMPILED_CHUNKED = Mode(name="compiled, chunked prefill", compiled=True, chunked=True)
COMPILED_CACHED = Mode(name="compiled, chunked prefill, prefix caching", compiled=True, chunked=True, prefix_caching=True)
WORKERS = Mode(name="eager, worker process", workers=True, prefix_caching=True)
COMPILED_WORKERS = Mode(name="compiled, worker process", compiled=True, workers=True)

# Those that `families` makes: named here, since that module takes seconds to import.
FAMILY_NAMES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v1",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "phimoe",
    "llama4",
)
# Attention kernels for multi-head latent attention on GPUs take half precision only.
HALF_PRECISION_ON_GPU = ("deepseek_v2", "deepseek_v3")


def jobs_for(models: list[str], *, on_gpu: bool, runners: tuple[int, ...] = (), quick: bool = False) -> list[Job]:
    """Jobs in the order of their worth: every model in the mode that users' runs have first. quick: these only."""

    def dtype(model: str) -> str:
        return "bfloat16" if on_gpu and model in HALF_PRECISION_ON_GPU else "float32"

    if not on_gpu:
        first = [Job(model=model, mode=EAGER, dtype=dtype(model)) for model in models]
        others = [COMPILED_CACHED, WORKERS]
        return first if quick else first + [Job(model=models[0], mode=mode, dtype=dtype(models[0])) for mode in others]
    jobs = [Job(model=model, mode=COMPILED_CHUNKED, dtype=dtype(model)) for model in models]
    if quick:
        return jobs
    jobs.append(Job(model=models[0], mode=COMPILED_WORKERS, dtype="bfloat16"))
    for runner in runners:
        mode = Mode(name=f"compiled, runner V{runner}", compiled=True, prefix_caching=True, runner=runner)
        jobs.append(Job(model=models[0], mode=mode, dtype=dtype(models[0])))
    return jobs + [Job(model=model, mode=EAGER_CACHED, dtype=dtype(model)) for model in models]
