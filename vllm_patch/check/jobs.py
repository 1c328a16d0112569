"""The jobs of `check`: a model, and the mode in which vLLM runs it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# A batch of prompts of many lengths. With prefix caching, two batches of prompts that share a prefix follow.
MIXED_PROMPTS, LONGEST_PROMPT, NEW_TOKENS = 12, 90, 24
SHARED_PROMPTS, SHARED_PREFIX = 4, 300
# Less than the longest prompt, so that prompts are prefilled in chunks, mixed with decoding requests.
CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class Mode:
    """How vLLM runs. chunked: prompts are prefilled in chunks. workers: vLLM runs in its own processes, not in that of the job.

    runner: 1 or 2 for one of the two model runners that some releases have; None for the release's default.
    """

    name: str
    compiled: bool = False
    chunked: bool = False
    prefix_caching: bool = False
    workers: bool = False
    runner: int | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Variables to set before vLLM is imported. Jobs with equal environments share a process."""
        return {} if self.runner is None else {"VLLM_USE_V2_MODEL_RUNNER": str(int(self.runner == 2))}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One engine run: the model (a family's name, `demo`, or a folder), the mode, and the dtype."""

    model: str
    mode: Mode
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """The model and the mode, for tables."""
        return f"{self.model} {self.mode.name}"

    def to_json(self) -> dict[str, Any]:
        """The job as a JSON object, for the worker process."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Job:
        """The job that `to_json` wrote."""
        return cls(**{**values, "mode": Mode(**values["mode"])})


EAGER = Mode(name="eager")
EAGER_CACHED = Mode(name="eager, prefix caching", prefix_caching=True)
COMPILED_CHUNKED = Mode(name="compiled, chunked prefill", compiled=True, chunked=True)
COMPILED_CACHED = Mode(name="compiled, chunked prefill, prefix caching", compiled=True, chunked=True, prefix_caching=True)
WORKERS = Mode(name="eager, worker process", workers=True, prefix_caching=True)
COMPILED_WORKERS = Mode(name="compiled, worker process", compiled=True, workers=True)

# The families that `families` can create. They are listed here because importing that module takes seconds. The default ones
# differ in how their routers select and weigh experts; most of the others repeat these routers with another kind of attention.
DEFAULT_FAMILIES = (
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
FURTHER_FAMILIES = (
    "gemma4",
    "ernie4_5_moe",
    "lfm2_moe",
    "cohere2_moe",
    "glm4_moe_lite",
    "exaone_moe",
    "afmoe",
    "axk1",
    "hy_v3",
    "laguna",
    "mimo_v2_flash",
    "minimax_m2",
    "dots1",
    "dbrx",
    "longcat_flash",
    "hunyuan_v1_moe",
    "mellum",
    "flex_olmo",
    "granitemoeshared",
    "granitemoehybrid",
    "qwen3_next",
    "qwen3_5_moe",
    "jamba",
    "nemotron_h",
    "llama4_interleaved",
    "llama4_multimodal",
    "gemma4_multimodal",
    "qwen3_vl_moe",
    "qwen3_5_moe_multimodal",
    "qwen3_moe_many_experts",
    "mixtral_all_experts",
    "mixtral_one_expert",
    "mixtral_awq",
)
FAMILY_NAMES = DEFAULT_FAMILIES + FURTHER_FAMILIES


def jobs_for(
    models: list[str],
    dtypes: dict[str, str],
    *,
    on_gpu: bool,
    runners: tuple[int, ...] = (),
    quick: bool = False,
) -> list[Job]:
    """The jobs, most valuable first: every model in the mode that most users run, then further modes.

    dtypes: of each model. quick: only the first of these. runners: the model runners to choose between; see `Mode.runner`.
    """
    first = [Job(model=model, mode=COMPILED_CHUNKED if on_gpu else EAGER, dtype=dtypes[model]) for model in models]
    if quick:
        return first
    if not on_gpu:
        return first + [Job(model=models[0], mode=mode, dtype=dtypes[models[0]]) for mode in (COMPILED_CACHED, WORKERS)]
    jobs = [*first, Job(model=models[0], mode=COMPILED_WORKERS, dtype="bfloat16")]
    for runner in runners:
        mode = Mode(name=f"compiled, runner V{runner}", compiled=True, prefix_caching=True, runner=runner)
        jobs.append(Job(model=models[0], mode=mode, dtype=dtypes[models[0]]))
    return jobs + [Job(model=model, mode=EAGER_CACHED, dtype=dtypes[model]) for model in models]
