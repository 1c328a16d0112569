"""The trace format: the column types of every file, `metadata.json`, `manifest.json`, and routing as arrays.

Shape letters: T tokens, L MoE layers, K experts per token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION = 1

METADATA_FILE = "metadata.json"
MANIFEST_FILE = "manifest.json"
TOKENS_FILE = "tokens.parquet"
PROBLEMS_FILE = "problems.parquet"
JSONL_FILE = "routing.jsonl"
ROUTING_FOLDER = "routing"
# Optional: all router logits, and the router inputs of selected layers.
LOGITS_FOLDER, HIDDEN_FOLDER = "logits", "hidden"
GATES_FILE = "gates.safetensors"
# Tokens in the order in which they were computed, one folder per run. Exists only until the trace is complete.
CAPTURE_FOLDER = "capture"

# A uint16 must also hold the id of empty slots (E). The other limits are generous bounds on what untrusted metadata can make a
# reader allocate per row.
MAX_EXPERTS = 65_535
MAX_TOP_K = 1024
MAX_HIDDEN_SIZE = 1 << 20

# The gap of a trace whose source does not say how many experts there are.
INFERRED_EXPERTS = "num_experts was inferred from the highest expert id"

PREFILL, DECODE = "prefill", "decode"

PROBLEMS_SCHEMA = pa.schema(
    [
        ("problem_id", pa.int32()),
        ("dataset", pa.string()),
        ("source_key", pa.string()),
        ("prompt", pa.string()),
        ("output", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("output_tokens", pa.int32()),
        ("truncated_tokens", pa.int32()),
        ("cached_tokens", pa.int32()),
        ("finish_reason", pa.string()),
    ]
)

TOKENS_SCHEMA = pa.schema(
    [
        ("problem_id", pa.int32()),
        ("token_id", pa.int32()),
        ("vocab_id", pa.int32()),
        ("phase", pa.dictionary(pa.int8(), pa.string())),
    ]
)
# Columns without nulls. In a converted trace the others may be null, and there may be additional columns.
REQUIRED_COLUMNS = frozenset({"problem_id", "dataset", "source_key", "token_id", "phase"})


def expert_dtype(num_experts: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds every expert id: uint8 up to 256 experts, else uint16."""
    return np.dtype(np.uint8 if num_experts <= 256 else np.uint16)


def routing_schema(num_experts: int, top_k: int, *, weights: bool = True, empty_slots: bool = False) -> pa.Schema:
    """Arrow schema of `routing/*.parquet` for a model with `num_experts` experts, `top_k` of them per token.

    weights: whether to include the column of weights. empty_slots: whether entries of the lists may be null.
    """
    lists = {"expert_ids": pa.from_numpy_dtype(expert_dtype(num_experts))}
    if weights:
        lists["weights"] = pa.float16()
    columns = {name: pa.list_(pa.field("element", kind, nullable=empty_slots), top_k) for name, kind in lists.items()}
    return _rows_schema(columns)


def values_schema(column: str, width: int) -> pa.Schema:
    """Arrow schema of `logits/*.parquet` (width E) and `hidden/*.parquet` (width D): `column` holds float16 lists."""
    return _rows_schema({column: pa.list_(pa.field("element", pa.float16(), nullable=False), width)})


def _rows_schema(lists: dict[str, pa.DataType]) -> pa.Schema:
    """One row per (problem, token, layer). Columns are non-null: looking for nulls would take half of the decoding time."""
    columns = {"problem_id": pa.int32(), "layer": pa.int16(), "token_id": pa.int32(), **lists}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


@dataclass(frozen=True)
class RoutingChunk:
    """Routing of T tokens as arrays, sorted by `(problem_id, token_id)`: the tokens of a problem are adjacent and in order.

    Shape letters: T tokens, L MoE layers, K experts per token, E experts.

    Attributes:
        problem_ids_T: int32 `[T]`, the problem of each token.
        token_ids_T: int32 `[T]`, the token's position in its sequence (prompt + output), from 0.
        expert_ids_TLK: uint8 or uint16 `[T, L, K]`, expert ids sorted by weight, descending. A trace without weights keeps the
            order of its source. In traces with empty slots (`RecordMetadata.empty_slots`), these come last and hold the id E.
        weights_TLK: float16 `[T, L, K]`, routing weights as the model applies them, NaN in empty slots. None if the trace has
            no weights.

    Example:
        >>> import numpy as np
        >>> from profiler import RoutingChunk
        >>> ids, weights = np.array([[[3, 1]], [[0, 3]]], np.uint8), np.array([[[0.7, 0.3]], [[0.6, 0.4]]], np.float16)
        >>> chunk = RoutingChunk(np.zeros(2, np.int32), np.arange(2, dtype=np.int32), ids, weights)
        >>> len(chunk)
        2
        >>> chunk.expert_ids_TLK[:, 0, 0]  # each token's strongest expert at the first MoE layer
        array([3, 0], dtype=uint8)
    """

    problem_ids_T: npt.NDArray[np.int32]
    token_ids_T: npt.NDArray[np.int32]
    expert_ids_TLK: npt.NDArray[np.unsignedinteger[Any]]
    weights_TLK: npt.NDArray[np.float16] | None

    def __len__(self) -> int:
        """The number of tokens, T."""
        return len(self.problem_ids_T)

    def take(self, tokens: slice | npt.NDArray[Any]) -> RoutingChunk:
        """Select tokens.

        Args:
            tokens: A slice, a boolean mask `[T]`, or indices.

        Returns:
            A chunk of these tokens; with a slice, its arrays are views.
        """
        weights_TLK = None if self.weights_TLK is None else self.weights_TLK[tokens]
        return RoutingChunk(self.problem_ids_T[tokens], self.token_ids_T[tokens], self.expert_ids_TLK[tokens], weights_TLK)


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelMetadata(_Document):
    """Facts of the recorded model. Code that reads traces takes them from here and assumes none of them."""

    id: str
    revision: str | None = None
    architecture: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    num_layers: int | None = Field(default=None, ge=1, le=10_000)
    moe_layers: list[int] = Field(min_length=1, max_length=10_000)
    num_experts: int = Field(ge=1, le=MAX_EXPERTS)
    top_k: int = Field(ge=1, le=MAX_TOP_K)
    renormalized: bool | None = None
    # Factor that the model applies to all routing weights; the recorded weights include it. None if the config has none.
    routed_scaling_factor: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _consistent(self) -> ModelMetadata:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} exceeds num_experts {self.num_experts}")
        if self.moe_layers != sorted(set(self.moe_layers)) or not 0 <= self.moe_layers[0] <= self.moe_layers[-1] < 32768:
            raise ValueError("moe_layers must be ascending, without repeats, from 0 to 32767")
        return self


class RecordMetadata(_Document):
    """What the routing rows contain. Only converted traces, whose source recorded less, differ from the defaults.

    weights: false if the trace has no weights. Pairs are then in the order of the source, so the strongest expert is unknown.
    empty_slots: the number of pairs without an expert (null in the files), from tokens routed to fewer than K experts.
    """

    weights: bool = True
    empty_slots: int = Field(default=0, ge=0)


class DatasetMetadata(_Document):
    """Where problems came from.

    Attributes:
        name: The name that problems have as their dataset.
        hub_id, config, split: The dataset on the Hugging Face hub; None if it is not from there.
        data_files: The local file or folder that it was read from.
        prompt_template: How a row became a prompt.
        shuffle_seed: The seed of the order in which rows were taken; None for the file's own order.
        problems: How many of its problems the trace has.
    """

    name: str
    hub_id: str | None = None
    config: str | None = None
    split: str | None = None
    data_files: str | None = None
    prompt_template: str | None = None
    shuffle_seed: int | None = None
    problems: int = Field(ge=0)


class Metadata(_Document):
    """The content of `metadata.json`: what was recorded, how, and what is missing.

    A pydantic model: immutable, and it rejects unknown fields with `pydantic.ValidationError`.

    Attributes:
        schema_version: Version of the trace format.
        model: Facts of the recorded model: id, MoE layers, number of experts, experts per token, and more.
        record: What the rows contain: whether they have weights, and how many slots have no expert.
        datasets: Where the problems came from.
        sampling: Settings of the sampling of outputs.
        engine: The engine that ran the model, "unknown" if a converted trace does not say.
        versions: Package name -> version.
        hook: How the routing was recorded.
        capture: Options and counts of the recording.
        gaps: What is missing from the trace and why, one line each.
        created: Time in UTC, ISO 8601.
        command: Command line that wrote the trace.

    Example:
        >>> from profiler import Metadata
        >>> model = {"id": "demo", "moe_layers": [1, 2], "num_experts": 8, "top_k": 2}
        >>> Metadata.model_validate({"model": model, "engine": "vllm", "hook": "example"}).model.top_k
        2
    """

    schema_version: int = SCHEMA_VERSION
    model: ModelMetadata
    record: RecordMetadata = RecordMetadata()
    datasets: list[DatasetMetadata] = []
    sampling: dict[str, Any] = {}
    engine: str
    versions: dict[str, str] = {}
    hook: str
    capture: dict[str, Any] = {}
    gaps: list[str] = []
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    command: list[str] = []

    @property
    def knows_strongest(self) -> bool:
        """Whether the order of a token's experts says which is the strongest: with weights, or if there is only one."""
        return self.record.weights or self.model.top_k == 1


def comparable_capture(metadata: Metadata) -> dict[str, Any]:
    """The `capture` of a trace's metadata, with the settings that earlier versions did not record, as they were then."""
    return {"moe_backend": "auto"} | metadata.capture


def _inside_the_trace(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or not pure.parts:
        raise ValueError(f"path {path!r} leaves the trace directory")
    return path


class ManifestEntry(_Document):
    """Row count, size and hash of one file."""

    rows: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(_Document):
    """`manifest.json`, written last: a trace that has one is complete."""

    schema_version: int = SCHEMA_VERSION
    files: dict[Annotated[str, AfterValidator(_inside_the_trace)], ManifestEntry]
