"""The document of `specmoe replay`: measurements with real transfers, next to the simulation of the same tokens."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ReplayRow(BaseModel):
    """One case. capacity: number of experts in a layer's cache, 0 for no cache. estimated, estimated_*: by the simulation.

    hit_rate, late: share of the requested experts that were in the cache, and whose transfer was still in progress.
    """

    model_config = ConfigDict(extra="forbid")

    case: str
    capacity: int = Field(ge=0)
    tokens_per_second: float
    estimated: float
    hit_rate: float
    late: float
    estimated_hit_rate: float
    estimated_late: float
    prefetched_per_token: float


class ReplayResult(BaseModel):
    """All cases on one device. assumptions: the costs measured and used by the simulation, one line each."""

    model_config = ConfigDict(extra="forbid")

    version: int = 1
    device: str
    tokens: int
    assumptions: list[str]
    rows: list[ReplayRow]

    def to_json(self) -> str:
        """The file's content."""
        return self.model_dump_json(indent=1) + "\n"
