"""What an export is worth: written next to every exported file, and printed."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from profiler.errors import counted

REPORT_SUFFIX = ".report.json"
DEFINITIONS = {
    "hit_rate": "share of the choices of experts by held-out tokens that go to kept experts",
    "hit_rate_training": "the same for the tokens that the experts were chosen by: optimistic, for comparison only",
    "chance": "the hit rate of as many experts kept at random: kept experts over all experts",
    "best_static": "the hit rate of as many experts chosen likewise by the held-out tokens: what a fixed choice can reach",
    "mass": "as hit_rate, of the routing weight instead of the number of choices",
    "overlap": "mean over layers of the sum over experts of the smaller of the expert's shares of the choices in training and "
    "held-out tokens: 1 if a load table of the training part is right on the held-out part",
    "overlap_uniform": "the same for a table in which all experts are equal",
}


class ExportReport(BaseModel):
    """How a choice of experts was made, and its value on problems that it was not made from. See `DEFINITIONS`.

    Attributes:
        trace, model: Names of the trace and of its model.
        format: The exported format.
        tokens: Tokens by which the experts were chosen, of `problems` problems of the training part.
        held_out: The part of the split on which the choice was measured, with `held_out_tokens` and `held_out_problems`.
        phase: Which tokens were counted: "decode" (generated ones) or "all".
        by: What experts were ranked by: "tokens" or "weight".
        scope: "layer" (equally many experts in each layer), "global" (ranked over all layers), "layers" (whole layers), or
            "none" (a table of loads from which the engine chooses itself).
        kept, experts: Experts that are kept, and that there are, in all layers.
        kept_by_layer: Layer of the decoder -> kept experts.
        hit_rate_by_layer: Layer of the decoder -> hit rate on the held-out part.
        unverified: What could not be tried without the engine.
        notes: What a reader of any of the numbers must know.
    """

    model_config = ConfigDict(extra="forbid")

    version: int = 1
    trace: str
    model: str
    format: str
    problems: int
    tokens: int
    held_out: str
    held_out_problems: int
    held_out_tokens: int
    phase: str
    by: str
    scope: str
    kept: int = Field(ge=0)
    experts: int = Field(ge=1)
    hit_rate: float | None = None
    hit_rate_training: float | None = None
    chance: float | None = None
    best_static: float | None = None
    mass: float | None = None
    overlap: float
    overlap_uniform: float
    kept_by_layer: dict[int, int] = {}
    hit_rate_by_layer: dict[int, float] = {}
    unverified: str
    notes: list[str] = []
    definitions: dict[str, str] = DEFINITIONS

    def to_json(self) -> str:
        """The file's content."""
        return self.model_dump_json(indent=1) + "\n"

    def lines(self) -> list[str]:
        """The report as text, a line each."""
        chosen = {
            "layer": "equally many in each layer",
            "global": "ranked over all layers",
            "layers": "whole layers",
            "none": "",
        }[self.scope]
        lines = [
            f"chosen by {self.by} of {self.tokens:,} {self._tokens} of {counted(self.problems, 'training problem')}; "
            "measured on "
            f"{self.held_out_tokens:,} of {counted(self.held_out_problems, 'problem')} ({self.held_out} part)"
        ]
        if self.hit_rate is not None:
            lines += [
                f"{self.kept} of {self.experts} experts kept, {chosen}",
                f"hit rate {self.hit_rate:.3f} held out; chance {self.chance or 0:.3f}; best fixed choice "
                f"{self.best_static or 0:.3f}; on the training problems {self.hit_rate_training or 0:.3f}",
            ]
            if self.mass is not None:
                lines.append(f"share of the routing weight {self.mass:.3f} held out")
        lines.append(f"loads overlap {self.overlap:.3f} with the held-out part; equal loads {self.overlap_uniform:.3f}")
        return [*lines, *self.notes, f"not verified: {self.unverified}"]

    @property
    def _tokens(self) -> str:
        return "generated tokens" if self.phase == "decode" else "tokens"


def report_path(out: Path) -> Path:
    """Where the report of an exported file is written: next to it."""
    return out.with_name(out.name + REPORT_SUFFIX)
