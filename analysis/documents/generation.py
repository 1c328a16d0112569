"""The document of `specmoe generate`: what a model with offloaded experts generated, how fast, and what its cache did."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class GenerationPhase(_Record):
    """The computation of prompts (prefill), or of generated tokens (decode).

    tokens: tokens that were computed. seconds: how long that took. requested: experts that layers needed, each once per layer
    and step. hits: those that were in the cache. late: those whose prefetch was in transfer. misses: those that were neither:
    demand-loaded, or computed on the host. host: the latter. streamed: misses for which the cache had no room. gigabytes:
    bytes copied to the device, in 1e9. stall, foresight: share of the time in which computation waited for an expert, and in
    which it waited for a prediction.
    """

    tokens: int = Field(ge=0)
    seconds: float = Field(ge=0)
    requested: int = Field(ge=0)
    hits: int = Field(ge=0)
    late: int = Field(ge=0)
    misses: int = Field(ge=0)
    host: int = Field(ge=0)
    streamed: int = Field(ge=0)
    gigabytes: float = Field(ge=0)
    stall: float = Field(ge=0)
    foresight: float = Field(ge=0)

    @property
    def tokens_per_second(self) -> float:
        """Throughput; 0 if nothing was computed."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the requested experts that were in the cache; 0 if none was requested."""
        return self.hits / self.requested if self.requested else 0.0


class SimulatedPhase(_Record):
    """What the simulation says of the generated tokens of the same run, with the costs that were measured in it.

    hit_rate, tokens_per_second: as in `GenerationPhase`. assumptions: the costs, a line each.
    """

    hit_rate: float
    tokens_per_second: float
    assumptions: list[str]


class GeneratedText(_Record):
    """One prompt and its continuation. finish_reason: `stop` if the model ended it, else `length`."""

    prompt: str | None
    prompt_tokens: int
    token_ids: list[int]
    text: str
    finish_reason: str


class GenerationRun(_Record):
    """A run. capacity: slots for experts in each layer, of `num_experts`. cache_gigabytes, expert_gigabytes: the size of the
    cache's memory and of all experts, in 1e9 bytes. expert_bits: bits that experts were rounded to; None if they were not.

    prefetched, useful, wasted, dropped: prefetches that were begun, those used before they were evicted, those not used, and
    predictions that were not acted on. memory_gigabytes: the most memory that the process had in use. device_gigabytes: the
    same of the GPU; None without one. simulated: None unless a trace was written.
    """

    version: int = 1
    model: str
    device: str
    dtype: str
    expert_bits: int | None = None
    store: str
    reads: str
    policy: str
    predictor: str | None
    capacity: int
    num_experts: int
    cache_gigabytes: float
    expert_gigabytes: float
    load_seconds: float
    prefill: GenerationPhase
    decode: GenerationPhase
    prefetched: int
    useful: int
    wasted: int
    dropped: int
    memory_gigabytes: float
    device_gigabytes: float | None
    notes: list[str]
    simulated: SimulatedPhase | None
    outputs: list[GeneratedText]

    def to_json(self) -> str:
        """The file's content."""
        return self.model_dump_json(indent=1) + "\n"
