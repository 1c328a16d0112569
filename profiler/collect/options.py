"""The options of a collection, each defined once: name, type, default, help and bounds.

`specmoe collect`, `specmoe plan` and `modal run modal_jobs/collect.py` take their arguments from the classes here. To add an
option, add a field here and use it in the method below where it takes effect.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from profiler.capture.options import CaptureOptions, parse_layers
from profiler.collect.selection import Selection
from profiler.engines import AUTO_BACKEND, EngineOptions, Sampling
from profiler.errors import EngineUsageError

DEFAULT_MODEL = "mixtral-8x7b"
EngineName = Literal["vllm", "transformers"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


def option(help: str, default: Any = dataclasses.MISSING, **more: Any) -> Any:  # noqa: A002 - as argparse and typer call it
    """A dataclass field with what a command line shows. more: `min`, `max`, `flag` (names on the command line), `metavar`."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options that every collection has, wherever it runs: problems, model, sampling, capture."""

    dataset: str = option("One name, or several separated by commas (see 'specmoe datasets').")
    num_problems: int = option("Total, spread evenly over the datasets.", 100, min=1)
    target_tokens: int | None = option("Total tokens, prompt and output, instead of a number of problems.", None, min=1)
    max_tokens_per_problem: int | None = option("Limit on prompt plus output; longer prompts lose their tail.", None, min=2)
    max_new_tokens: int | None = option("Maximum of generated tokens per problem; default: the dataset's own.", None, min=1)
    data_files: Path | None = option("Read problems from this local .parquet or .jsonl file instead of the hub.", None)
    engine: EngineName = option("The engine that runs the model.", "vllm")
    dtype: DtypeName = option("auto: the engine's choice for this checkpoint and device.", "auto")
    revision: str | None = option("Branch, tag or commit of a hub model.", None)
    moe_backend: str = option(
        "vLLM's option of this name, which chooses the kernels of the experts; auto: the fastest that can be recorded.",
        AUTO_BACKEND,
    )
    precision: str = option("Checkpoint of a short name (see 'specmoe models NAME'); auto: the first that fits.", "auto")
    temperature: float = option("Sampling temperature; 0 is greedy.", 0.0, min=0.0)
    top_p: float = option("Sample from the smallest set of tokens with this total probability.", 1.0, min=0.0, max=1.0)
    seed: int = option("Seed of the sampling.", 0, min=0)
    max_length: int | None = option("Maximum tokens per sequence; default: the model's, at most 8192 if rented.", None, min=2)
    capture_logits: bool = option("Also record all router logits (float16).", False)
    capture_hidden: str = option("Also record the router inputs of these layers (float16), such as 1,5.", "", metavar="LAYERS")
    hidden_tokens: int = option("Stop recording router inputs of further problems after this many tokens.", 20_000, min=1)

    @property
    def sampling(self) -> Sampling:
        """How output tokens are sampled."""
        return Sampling(max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p, seed=self.seed)

    @property
    def selection(self) -> Selection:
        """Which problems are collected."""
        return Selection(
            datasets=tuple(name.strip() for name in self.dataset.split(",")),
            num_problems=self.num_problems,
            target_tokens=self.target_tokens,
            max_tokens_per_problem=self.max_tokens_per_problem,
            data_files=self.data_files,
            sampling=self.sampling,
        )

    @property
    def capture(self) -> CaptureOptions:
        """What is recorded besides experts and weights. Raises `EngineError` if `capture_hidden` is not a list of numbers."""
        return CaptureOptions(
            logits=self.capture_logits, hidden_layers=parse_layers(self.capture_hidden), hidden_tokens=self.hidden_tokens
        )


@dataclass(frozen=True, kw_only=True)
class LocalOptions(RunOptions):
    """Options of a collection on this machine: `specmoe collect`."""

    model: str = option("demo, a short name (see 'specmoe models'), a hub id, or a folder.")
    out: Path = option("The trace directory to create.")
    batch: int | None = option("Maximum sequences in a batch; default: the preset for model and GPU.", None, min=1)
    load_in_8bit: bool = option("transformers: quantize the experts to 8 bits while loading.", False)
    load_in_4bit: bool = option("transformers: quantize the experts to 4 bits while loading.", False)
    offload: bool = option("transformers: keep layers that do not fit on the GPU in host memory.", False)
    compiled: bool | None = option("vLLM: use torch.compile or not; default: only on a GPU.", None, flag="--compiled/--eager")
    prefix_caching: bool = option("Let vLLM reuse shared prefixes; the reused tokens are missing from the routing.", False)
    jsonl: bool = option("Also write routing.jsonl.", False)
    resume: bool = option("Continue the interrupted collection in --out; start one if --out does not exist or is empty.", False)
    verbose: bool = option("Show the engine's own log.", False)

    @property
    def engine_options(self) -> EngineOptions:
        """How the model is loaded. Raises `EngineError` if both 8 and 4 bits are requested."""
        if self.load_in_8bit and self.load_in_4bit:
            raise EngineUsageError("choose one of load_in_8bit and load_in_4bit")
        return EngineOptions(
            dtype=self.dtype,
            compiled=self.compiled,
            max_length=self.max_length,
            prefix_caching=self.prefix_caching,
            capture=self.capture,
            seed=self.seed,
            batch=self.batch,
            load_in="8bit" if self.load_in_8bit else "4bit" if self.load_in_4bit else None,
            offload=self.offload,
            moe_backend=self.moe_backend,
            verbose=self.verbose,
        )


@dataclass(frozen=True, kw_only=True)
class RentedOptions(RunOptions):
    """Options of a collection on rented GPUs: `specmoe plan` and the Modal job."""

    model: str = option("demo, a short name (see 'specmoe models'), or a hub id.", DEFAULT_MODEL)
    gpu: str | None = option("The GPU to rent; default: A100-80GB.", None)
    containers: int = option("Maximum number of containers at a time.", 1, min=1)
    shard_size: int | None = option("Problems per shard; default: chosen from the number of problems.", None, min=1)
    hf_secret: str | None = option("The Modal secret with the token for a gated model; 'plan' does not check it.", None)


@dataclass(frozen=True, kw_only=True)
class RentedJobOptions(RentedOptions):
    """Options of the Modal job: those of `specmoe plan`, and where to write the trace."""

    out: str | None = option("The trace directory to create; default: traces/ and the run's name.", None)
