"""The trace format: column types of every file, `metadata.json`, `manifest.json`, and routing as arrays.

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
# Optional: all router logits, and router inputs of chosen layers.
LOGITS_FOLDER, HIDDEN_FOLDER = "logits", "hidden"
GATES_FILE = "gates.safetensors"
# Tokens in the order in which they were computed, a folder for each run; exists only until a trace is complete.
CAPTURE_FOLDER = "capture"

# What a uint16 can hold besides the id of empty slots; and a generous bound on what a stranger's metadata can make a reader
# allocate per row.
MAX_EXPERTS = 65_535
MAX_TOP_K = 1024
MAX_HIDDEN_SIZE = 1 << 20

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
# What every row of the tables has; a converted trace may not know the rest (null), or know more (further columns).
REQUIRED_COLUMNS = frozenset({"problem_id", "dataset", "source_key", "token_id", "phase"})


def expert_dtype(num_experts: int) -> np.dtype[Any]:
    """Smallest unsigned type that holds every expert id: uint8 up to 256 experts, else uint16."""
    return np.dtype(np.uint8 if num_experts <= 256 else np.uint16)


def routing_schema(num_experts: int, top_k: int, *, weights: bool = True, empty_slots: bool = False) -> pa.Schema:
    """Arrow schema of `routing/*.parquet` for a model with `num_experts` experts, `top_k` of them per token.

    weights: whether there is that column. empty_slots: whether entries of the lists may be null.
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
    """One row per (problem, token, layer). No column has nulls: half of the decoding time would go into looking for them."""
    columns = {"problem_id": pa.int32(), "layer": pa.int16(), "token_id": pa.int32(), **lists}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


@dataclass(frozen=True)
class RoutingChunk:
    """Routing of whole problems, one row per token, tokens of a problem adjacent and in order.

    problem_ids_T, token_ids_T: int32 `[T]`; token_ids_T is the position in the sequence (prompt + output), from 0.
    expert_ids_TLK: uint8 or uint16 `[T, L, K]`, pairs sorted by weight, descending; in the order of the source where the trace
    has no weights. Slots without an expert, in traces that have such (`RecordMetadata.empty_slots`), come last and hold E.
    weights_TLK: float16 `[T, L, K]`, as the model applies them, NaN in empty slots; None if the trace has no weights.
    """

    problem_ids_T: npt.NDArray[np.int32]
    token_ids_T: npt.NDArray[np.int32]
    expert_ids_TLK: npt.NDArray[np.unsignedinteger[Any]]
    weights_TLK: npt.NDArray[np.float16] | None

    def __len__(self) -> int:
        return len(self.problem_ids_T)

    def take(self, tokens: slice | npt.NDArray[Any]) -> RoutingChunk:
        """The chunk with only these tokens: a slice (views), a mask, or indices."""
        weights_TLK = None if self.weights_TLK is None else self.weights_TLK[tokens]
        return RoutingChunk(self.problem_ids_T[tokens], self.token_ids_T[tokens], self.expert_ids_TLK[tokens], weights_TLK)


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelMetadata(_Document):
    """Facts of the recorded model; nothing downstream assumes any of them."""

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
    # Factor of all routing weights, included in the recorded ones; None where the config names none.
    routed_scaling_factor: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _consistent(self) -> ModelMetadata:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} exceeds num_experts {self.num_experts}")
        if self.moe_layers != sorted(set(self.moe_layers)) or not 0 <= self.moe_layers[0] <= self.moe_layers[-1] < 32768:
            raise ValueError("moe_layers must be ascending, without repeats, from 0 to 32767")
        return self


class RecordMetadata(_Document):
    """What the rows hold. Anything but the defaults comes from a converter whose source knew or kept less than a router does.

    weights: false if there are none; pairs are then in the order of the source, so which expert is the strongest is unknown.
    empty_slots: pairs without an expert (null in the files), of tokens that went to fewer than K.
    """

    weights: bool = True
    empty_slots: int = Field(default=0, ge=0)


class DatasetMetadata(_Document):
    """Where problems came from. shuffle_seed: of the order in which rows were taken; None for the file's own."""

    name: str
    hub_id: str | None = None
    config: str | None = None
    split: str | None = None
    data_files: str | None = None
    prompt_template: str | None = None
    shuffle_seed: int | None = None
    problems: int = Field(ge=0)


class Metadata(_Document):
    """`metadata.json`: what was recorded, how, and what is missing (`gaps`)."""

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


def _inside_the_trace(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or not pure.parts:
        raise ValueError(f"path {path!r} leaves the trace directory")
    return path


class ManifestEntry(_Document):
    """Size and hash of one file."""

    rows: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(_Document):
    """`manifest.json`, written last: a trace that has one is complete."""

    schema_version: int = SCHEMA_VERSION
    files: dict[Annotated[str, AfterValidator(_inside_the_trace)], ManifestEntry]
