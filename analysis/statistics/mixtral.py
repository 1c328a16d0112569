"""Table 5 of "Mixtral of Experts" (Jiang et al., 2024, arXiv 2401.04088), compared with a trace of Mixtral."""

from __future__ import annotations

from dataclasses import dataclass

from analysis.statistics.locality import Repetition
from profiler.trace.schema import ModelMetadata

LAYERS = (0, 15, 31)
TABLE_5: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "ArXiv": ((14.0, 27.9, 22.7), (46.5, 62.3, 52.9)),
    "DM Mathematics": ((14.1, 28.4, 19.7), (44.9, 67.0, 44.5)),
    "Github": ((14.9, 28.1, 19.7), (49.9, 66.9, 49.2)),
    "Gutenberg": ((13.9, 26.1, 26.3), (49.5, 63.1, 52.2)),
    "PhilPapers": ((13.6, 25.3, 22.1), (46.9, 61.9, 51.3)),
    "PubMed Abstracts": ((14.2, 24.6, 22.0), (48.6, 61.6, 51.8)),
    "StackExchange": ((13.6, 27.2, 23.6), (48.2, 64.6, 53.6)),
    "Wikipedia (en)": ((14.4, 23.6, 25.3), (49.8, 62.1, 51.8)),
}
"""Percent of consecutive tokens with the same first choice, and with the same expert as first or second, at LAYERS."""


@dataclass(frozen=True)
class Comparison:
    """One layer of one dataset, in percent, compared with the lowest and highest value of the paper's domains.

    within: both values lie within the paper's range, widened by a tenth of its width on either side to allow for data that the
    paper did not use.
    """

    dataset: str
    layer: int
    first: float
    first_range: tuple[float, float]
    first_or_second: float
    first_or_second_range: tuple[float, float]
    within: bool


def is_mixtral_8x7b(model: ModelMetadata) -> bool:
    """Whether the model is the one that Table 5 describes."""
    name = f"{model.id} {model.architecture or ''}".lower()
    return "mixtral" in name and len(model.moe_layers) == 32 and (model.num_experts, model.top_k) == (8, 2)


def compare_with_table_5(repetitions: list[Repetition], model: ModelMetadata) -> list[Comparison]:
    """Compare every dataset at the paper's three layers; empty unless the model is Mixtral 8x7B."""
    if not is_mixtral_8x7b(model):
        return []
    compared = []
    for repetition in repetitions:
        for column, layer in enumerate(LAYERS):
            ours = (100 * float(repetition.first[0, layer]), 100 * float(repetition.first_or_second[0, layer]))
            ranges = [
                (min(row[kind][column] for row in TABLE_5.values()), max(row[kind][column] for row in TABLE_5.values()))
                for kind in (0, 1)
            ]
            within = all(
                low - (high - low) / 10 <= value <= high + (high - low) / 10
                for value, (low, high) in zip(ours, ranges, strict=True)
            )
            compared.append(Comparison(repetition.dataset, layer, ours[0], ranges[0], ours[1], ranges[1], within))
    return compared
