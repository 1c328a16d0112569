"""What `specmoe simulate --out` wrote, read for the report."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field, model_validator

from analysis.documents.reading import read_document

SIMULATION_FILE = "simulation.json"
# Rows that no policy is needed for: no cache, and a cache with room for everything.
BOUNDS = ("on demand", "all resident")


class SimulatedRow(BaseModel):
    """One simulation. share: of all experts that the cache holds; capacity: experts, of each layer or in all."""

    device: str | None
    capacity: int = Field(ge=0)
    share: float = Field(ge=0, le=1)
    gigabytes: float | None
    policy: str
    prefetch: str
    hit_rate: float = Field(ge=0, le=1)
    tokens_per_second: float | None
    times_on_demand: float | None
    gain: float | None = None


class SimulatedDevice(BaseModel):
    """A device, and what was assumed of it; None for copies that take no time."""

    name: str | None
    assumptions: list[str]


class Simulation(BaseModel):
    """Simulations of one trace. best: of each device and size, the fastest row that knows nothing of what comes."""

    model: str
    trace: str
    devices: list[SimulatedDevice]
    notes: list[str]
    best: list[SimulatedRow]
    rows: list[SimulatedRow] = Field(max_length=100_000)

    @model_validator(mode="after")
    def _can_be_shown(self) -> Simulation:
        named = {device.name for device in self.devices}
        if not self.rows or any(row.device not in named for row in [*self.rows, *self.best]):
            raise ValueError("it has no rows, or rows of a device that it does not describe")
        return self


def read_simulation(path: Path) -> Simulation:
    """A simulation's file, or that of its folder. Raises `TraceError` if it is none."""
    return read_document(path, Simulation, SIMULATION_FILE, "specmoe simulate TRACE --out DIR")
