"""The document of `specmoe curve`: hit rates by cache size, working sets, and slots for each layer."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field, model_validator

from analysis.documents.reading import read_document

CURVES_FILE = "curve.json"
CURVE_DEFINITIONS = {
    "hits": "experts in the cache when their layer's router chose them for a generated token (with several tokens in a step: "
    "distinct experts)",
    "is_exact": "true: every size, from one pass over the requests (Mattson's stack distances), with the hits of a simulation "
    "of that size; false: simulated at these sizes only",
    "knee": "the size at which the curve is farthest above the straight line between its ends: up to there a slot gains more "
    "than the average slot does",
    "working_sets": "distinct experts of a layer that consecutive generated tokens of one problem use (every window of so many "
    "tokens), or that one step of a batch requests (every step that decodes so many sequences)",
    "percentile_90": "the fewest experts that suffice for at least 90 % of these windows or steps",
    "slots": "the same number of slots in all: divided evenly (even); divided so that the hits of the training problems are "
    "most, by dynamic programming over their curves (by_curves); or in one cache for all layers (shared). All caches are lru",
}


class HitRateCurve(BaseModel):
    """Hits of one policy by cache size. C counts the sizes.

    Attributes:
        policy: The eviction policy.
        is_global: Whether one cache serves all layers; else each layer has one.
        is_exact: Whether every size is here, from one pass; else those that were simulated.
        sizes: Slots of each layer's cache, or of the one for all layers, ascending, from 0 up to room for every expert, `[C]`.
        hits: Hits of all layers, `[C]`.
        requested: Requested experts of all layers.
        hits_by_layer: `[L, C]`; empty if one cache serves all layers.
        requested_by_layer: `[L]`; empty likewise.
        knee: One of `sizes`; see `CURVE_DEFINITIONS`.
    """

    policy: str
    is_global: bool
    is_exact: bool
    sizes: list[int] = Field(min_length=1)
    hits: list[int]
    requested: int
    hits_by_layer: list[list[int]] = []
    requested_by_layer: list[int] = []
    knee: int

    @model_validator(mode="after")
    def _has_hits_of_every_size(self) -> HitRateCurve:
        if any(len(hits) != len(self.sizes) for hits in (self.hits, *self.hits_by_layer)) or self.knee not in self.sizes:
            raise ValueError("a curve lacks hits of a size, or the size of its knee")
        return self

    @property
    def hit_rates(self) -> list[float]:
        """Hits as a share of what was requested, `[C]`."""
        return [hits / max(1, self.requested) for hits in self.hits]

    def hit_rate(self, size: int) -> float:
        """The hit rate at one of `sizes`."""
        return self.hit_rates[self.sizes.index(size)]


class WorkingSetRow(BaseModel):
    """How many experts of a layer some tokens use.

    Attributes:
        is_batch: Whether these are the tokens of one step of a batch; else consecutive tokens of one problem.
        tokens: How many tokens.
        count: Windows, or steps, of so many tokens.
        mean, percentile_90: Over all layers.
        mean_by_layer, percentile_90_by_layer: `[L]`.
    """

    is_batch: bool
    tokens: int
    count: int
    mean: float
    percentile_90: int
    mean_by_layer: list[float]
    percentile_90_by_layer: list[int]


class SlotHitRates(BaseModel):
    """Hit rates with slots divided evenly, by the curves of training, and in one cache for all layers."""

    even: float
    by_curves: float
    shared: float


class SlotsRow(BaseModel):
    """One number of slots, divided among the layers.

    Attributes:
        share: Of all experts.
        slots: In all layers together.
        by_layer: Slots of each layer by the curves of training, `[L]`.
        training: Hit rates on the problems that the slots were chosen for.
        evaluated: Hit rates on the problems of this document.
    """

    share: float
    slots: int
    by_layer: list[int]
    training: SlotHitRates
    evaluated: SlotHitRates


class CacheCurves(BaseModel):
    """Curves of one part of a trace.

    Attributes:
        moe_layers: The decoder's index of each MoE layer, `[L]`.
        num_experts, top_k: E and K.
        part: Part of the split, with `problems` problems and `tokens` tokens, of which `decode_tokens` were generated.
        batch: Sequences decoded at the same time, for curves and slots.
        training_problems: Problems that popularity and slots come from; None if these are the same problems.
        summary: The main results in sentences.
        notes: What a reader of any of the numbers must know.
    """

    version: int = 1
    trace: str
    model: str
    moe_layers: list[int]
    num_experts: int
    top_k: int
    part: str
    problems: int
    tokens: int
    decode_tokens: int
    batch: int
    training_problems: int | None
    definitions: dict[str, str] = CURVE_DEFINITIONS
    summary: list[str]
    notes: list[str]
    curves: list[HitRateCurve] = Field(min_length=1)
    working_sets: list[WorkingSetRow]
    slots: list[SlotsRow]

    @model_validator(mode="after")
    def _divides_among_its_layers(self) -> CacheCurves:
        for row in self.slots:
            if len(row.by_layer) != len(self.moe_layers) or not all(0 <= each <= self.num_experts for each in row.by_layer):
                raise ValueError(f"slots: {row.slots} slots are not divided among {len(self.moe_layers)} layers of experts")
        return self

    def to_json(self) -> str:
        """The file's content."""
        return self.model_dump_json(indent=None) + "\n"


def read_curves(path: Path) -> CacheCurves:
    """Read curves from their file, or from the folder that holds it.

    Args:
        path: `curve.json`, or the folder that `specmoe curve --out` wrote.

    Raises:
        TraceError: There is no such file, or it does not hold curves.

    Example:
        >>> curves = read_curves(Path("curves/math"))  # doctest: +SKIP
        >>> curves.curves[0].knee, curves.curves[0].hit_rate(8)  # doctest: +SKIP
    """
    return read_document(path, CacheCurves, CURVES_FILE, "specmoe curve TRACE --out DIR")
