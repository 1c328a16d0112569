"""What a format's writer gets: the counts, the choice, and the model's facts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.exporters.counts import ExpertCounts
from profiler.exporters.report import ExportReport
from profiler.trace.schema import ModelMetadata


@dataclass(frozen=True)
class Content:
    """Everything that an export may contain.

    Attributes:
        model: The model's facts.
        num_layers: Layers of the decoder, with and without experts.
        counts: The counts of the training part, by which the experts were chosen.
        held_out: The counts of the part that the choice was measured on.
        score_LE: What experts were ranked by, `[L, E]`: tokens or weights of `counts`.
        kept_LE: Whether each expert is kept, bool `[L, E]`.
        batch: Tokens per step that whole layers were chosen for.
        layer_key: Name of a layer's MoE module in the engine, with `{layer}` for the decoder layer; None for the usual one.
        report: The value of the choice.
    """

    model: ModelMetadata
    num_layers: int
    counts: ExpertCounts
    held_out: ExpertCounts
    score_LE: npt.NDArray[Any]
    kept_LE: npt.NDArray[np.bool_]
    batch: int
    layer_key: str | None
    report: ExportReport

    @property
    def kept_per_layer(self) -> int:
        """Kept experts of every layer, where all layers keep equally many."""
        return int(self.kept_LE[0].sum())

    def of_all_layers(self, values_LE: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A table with a row for every decoder layer, `[decoder layers, E]`: zeros for layers without experts."""
        table = np.zeros((self.num_layers, values_LE.shape[1]), dtype=values_LE.dtype)
        table[self.model.moe_layers] = values_LE
        return table
