"""What `specmoe simulate --out` wrote, read for the report."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field, ValidationError, model_validator

from profiler.errors import TraceError, first_line

SIMULATION_FILE = "simulation.json"
MAX_BYTES = 64 << 20
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
    if path.is_dir():
        path = path / SIMULATION_FILE
    try:
        if path.stat().st_size > MAX_BYTES:
            raise TraceError(f"{path} is larger than {MAX_BYTES >> 20} MiB: no simulation")
        return Simulation.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        what = "; ".join(filter(None, [where, first["msg"]]))
        raise TraceError(f"{path}: expected what 'specmoe simulate TRACE --out DIR' writes: {what}") from error
    except OSError as error:
        raise TraceError(f"{path}: {first_line(error)}") from error
