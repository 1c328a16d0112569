"""The document of `specmoe fit`: what a model needs of a GPU's memory, and how fast it is expected to be."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from analysis.documents.reading import read_document

FIT_FILE = "fit.json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MemoryUse(_Part):
    """Memory of the device, in GB (10^9 bytes).

    Attributes:
        device: What the device has.
        usable: What an engine may use of it.
        dense: All weights but the routed experts.
        kv_cache: Keys and values of all sequences, at the whole context.
        reserve: Activations and everything else; assumed.
        left: What is left for routed experts; negative if the rest does not fit.
        experts: All routed experts.
        expert_bytes: Size of one expert, in bytes.
        slots: Experts of each layer that fit, if all layers get equally many.
        layers: MoE layers.
        experts_per_layer: Experts of a layer.
        share: Share of all experts that fit.
    """

    device: float
    usable: float
    dense: float
    kv_cache: float
    reserve: float
    left: float
    experts: float
    expert_bytes: float
    slots: int = Field(ge=0)
    layers: int = Field(ge=1)
    experts_per_layer: int = Field(ge=1)
    share: float = Field(ge=0, le=1)


class FitWay(_Part):
    """One way to run the model.

    Attributes:
        name: What is done with experts that are not on the GPU.
        tokens_per_second: Expected speed of generation, all sequences together.
        hit_rate: Share of the distinct experts of a step that are on the GPU; None if all are, or whole layers.
        hit_rate_source: Where that number is from.
        gpu_layers: MoE layers whose experts are on the GPU; None if experts of every layer are.
        host_gigabytes: Host memory that experts take.
    """

    name: str
    tokens_per_second: float = Field(ge=0)
    hit_rate: float | None = None
    hit_rate_source: str | None = None
    gpu_layers: int | None = None
    host_gigabytes: float = 0.0


class Fit(_Part):
    """Whether and how a model fits.

    Attributes:
        model, precision, device, host: Names.
        context: Tokens of each of the `batch` sequences.
        kv_bits: Bits of each key and value.
        trace: Name of the trace that hit rates are from; None without one.
        union: Expected distinct experts of a layer in one step.
        union_source: Where that number is from.
        ways: The possible ways, the fastest first. Empty if the model does not fit in any.
        warnings: What may disappoint.
        assumptions: What was assumed, with sources, a line each.
    """

    version: int = 1
    model: str
    precision: str
    device: str
    host: str
    context: int
    batch: int
    kv_bits: int
    trace: str | None
    memory: MemoryUse
    union: float
    union_source: str
    ways: list[FitWay]
    warnings: list[str]
    assumptions: list[str]

    def to_json(self) -> str:
        """The file's content."""
        return self.model_dump_json(indent=1) + "\n"


def read_fit(path: Path) -> Fit:
    """Read the document from its file, or from the folder that has it as `fit.json`.

    Raises:
        TraceError: There is no such file, or it is not such a document.
    """
    return read_document(path, Fit, FIT_FILE, "specmoe fit MODEL --json FILE")
